from __future__ import annotations

import importlib
import logging
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from tests.quant.families import make_images, make_model
from tweo_timm import machine
from tweo_timm.quant import export
from tweo_timm.quant.deploy import Agreement, export_record, fault_of, self_error_ratio_of
from tweo_timm.quant.export import export_onnx, require_export_extra
from tweo_timm.quant.onnx_file import OnnxModel
from tweo_timm.quant.qdq import patch_size_of, patches_of
from tweo_timm.quant.scheme import Scheme
from tweo_timm.quant.static import quantization_scales, quantize_static

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from tweo_timm.quant import latency  # noqa: E402
from tweo_timm.quant.ort import node_census, run_onnx  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript.*")


def operators(path: Any) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def initializers(path: Any) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


class Exported:
    """A tiny ViT in float, quantized, and as the files of export_record."""

    def __init__(self, folder: Path) -> None:
        self.model = make_model("vit")
        self.images = make_images("vit", 6)
        self.quantized = quantize_static(self.model, [self.images], "w8a8-tt")
        with torch.no_grad():
            self.logits = self.quantized(self.images)
        labels = self.logits.argmax(-1)
        labels[0] = (labels[0] + 1) % 10
        batches = [(self.images[:4], labels[:4]), (self.images[4:], labels[4:])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(latency, "ROUNDS", 1)  # how fast it is matters elsewhere
            self.record = export_record(self.model, self.quantized, batches, folder / "vit.onnx")
        self.qdq, self.fused = (Path(file["path"]) for file in self.record["files"])


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("vit"))


def test_both_files_give_the_logits_of_the_fake_quantized_model(vit: Exported) -> None:
    for path in (vit.qdq, vit.fused):
        assert relative(run_onnx(path, vit.images), vit.logits) < 1e-5  # the same integers: 1e-7 measured


def test_the_batch_is_dynamic_and_changes_no_result(vit: Exported) -> None:
    whole = run_onnx(vit.fused, vit.images)
    singles = run_onnx(vit.fused, torch.split(vit.images, 1))
    torch.testing.assert_close(singles, whole, rtol=1e-5, atol=1e-6)


def test_the_standard_file_is_valid_symmetric_int8_and_has_no_operator_of_a_vendor(vit: Exported) -> None:
    model = onnx.load(vit.qdq)
    onnx.checker.check_model(model, full_check=True)
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", export.OPSET)}
    values = initializers(vit.qdq)
    zeros = [
        values[node.input[2]] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]
    assert zeros
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)


def test_every_frozen_scale_is_in_the_file(vit: Exported) -> None:
    node_scales = Counter(
        float(initializers(vit.qdq)[node.input[1]])
        for node in onnx.load(vit.qdq).graph.node
        if node.op_type == "QuantizeLinear"
    )
    wanted = Counter(np.float32(entry["input_scale"]).item() for entry in quantization_scales(vit.quantized).values())
    assert node_scales == wanted


def test_every_linear_layer_with_its_bias_becomes_one_int8_node_in_onnxruntime(vit: Exported) -> None:
    layers = len(quantization_scales(vit.quantized))  # the patch embedding included
    packed = 2  # query, key and value of each block are three nodes
    nodes = vit.record["files"][1]["nodes"]
    assert nodes["int8"] == {"MatMulIntegerToFloat": layers + 2 * packed}
    assert "Conv" not in nodes["float_products"]
    assert nodes["float_other"]["Gelu"] == 2  # BiasGelu would mean that a bias was left over
    assert nodes["float_other"].get("Add", 0) + nodes["float_other"].get("SkipLayerNormalization", 0) <= 5


@pytest.mark.parametrize("name", ["fast_with_rest", "conv1x1", "dilated", "grouped", "overlapping", "same"])
def test_patches_are_cut_where_a_convolution_is_a_product_and_nowhere_else(name: str) -> None:
    conv = {
        "fast_with_rest": nn.Conv2d(3, 5, (2, 3), stride=(2, 3)),
        "conv1x1": nn.Conv2d(3, 5, 1),
        "dilated": nn.Conv2d(3, 5, 2, stride=2, dilation=2),
        "grouped": nn.Conv2d(4, 4, 2, stride=2, groups=2),
        "overlapping": nn.Conv2d(3, 5, 3, stride=2),
        "same": nn.Conv2d(3, 5, 1, padding="same"),
    }[name]
    size = patch_size_of(conv)
    assert (size is not None) == (name in ("fast_with_rest", "conv1x1"))
    if size is not None:
        x = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(0))
        tokens, grid = patches_of(x, size)
        y = nn.functional.linear(tokens, conv.weight.flatten(1), conv.bias).transpose(1, 2).unflatten(2, grid)
        torch.testing.assert_close(y, conv(x))


def test_the_record_says_what_a_report_needs(vit: Exported) -> None:
    record = vit.record
    assert (record["scheme"], record["images"]) == ("w8a8-tt", 6)
    assert record["top1"] == pytest.approx(100 * 5 / 6)
    assert Path(record["scales"]).exists()
    for file, target in zip(record["files"], ("qdq", "onnxruntime"), strict=True):
        assert file["target"] == target
        assert file["top1"] == pytest.approx(record["top1"])
        assert file["top1_agreement"] == 1
        assert file["error_ratio"] < 1e-3
        assert file["fault"] is None
        assert file["size_mb"] == pytest.approx(Path(file["path"]).stat().st_size / 1e6, abs=1e-3)
    assert record["self_error_ratio"] < 1e-3


def test_a_deep_untrained_model_is_as_far_from_itself_as_its_file_can_be() -> None:
    """timm's PiT, with random weights: its file's error ratio is about one, and says nothing."""
    torch.manual_seed(0)
    model, images = timm.create_model("pit_ti_224").eval(), torch.randn(2, 3, 224, 224)
    quantized = quantize_static(model, [images], "w8a8-tt")
    with torch.no_grad():
        logits = quantized(images)
        assert self_error_ratio_of(quantized, images, logits, model(images)) > 0.1  # 1.07 measured
        assert torch.equal(quantized(images), logits)  # what was put on its layers is off again


def test_an_onnx_file_is_a_module_that_any_scorer_takes(vit: Exported) -> None:
    logits = OnnxModel(vit.fused, threads=1).eval()(vit.images)
    torch.testing.assert_close(logits, run_onnx(vit.fused, vit.images))


def test_folded_compensation_adds_no_node_and_low_bits_add_only_clips(vit: Exported, tmp_path: Path) -> None:
    quantized = quantize_static(vit.model, [vit.images], "w4a4-tt+qwt")
    done = export_onnx(quantized, tmp_path / "qwt.onnx", vit.images)
    assert len(done["folded"]) > 4
    assert done["kept"] == []
    assert any(module.compensation is not None for module in quantized.modules() if hasattr(module, "compensation"))
    rounded = operators(tmp_path / "qwt.onnx")
    assert rounded["Clip"] == rounded["QuantizeLinear"]
    del rounded["Clip"]
    assert rounded == operators(vit.qdq)
    with torch.no_grad():
        noise = relative(quantized(vit.images), vit.model(vit.images))
        assert relative(run_onnx(tmp_path / "qwt.onnx", vit.images), quantized(vit.images)) < noise / 4


def test_residual_and_attention_sites_are_in_the_graph_and_cut_the_float_islands(vit: Exported, tmp_path: Path) -> None:
    quantized = quantize_static(vit.model, [vit.images], "w8a8-ct+res+attn")
    export_onnx(quantized, tmp_path / "res.onnx", vit.images, target="onnxruntime")
    sites = [entry for entry in quantization_scales(quantized).values() if entry["kind"] in ("stream", "product")]
    plain = operators(vit.qdq)["QuantizeLinear"]
    assert operators(tmp_path / "res.onnx")["QuantizeLinear"] == plain + len(sites)
    nodes = node_census(tmp_path / "res.onnx")
    assert "FusedMatMul" not in nodes["float_products"]
    assert nodes["float_islands"] > vit.record["files"][1]["nodes"]["float_islands"]  # one stream becomes many pieces
    with torch.no_grad():
        noise = relative(quantized(vit.images), vit.model(vit.images))
        assert relative(run_onnx(tmp_path / "res.onnx", vit.images), quantized(vit.images)) < noise / 4


def test_a_float_model_exports_as_it_is(tmp_path: Path) -> None:
    model, images = make_model("deit_distilled", depth=1), make_images("deit_distilled", 2)
    record = export_record(model, None, [(images, torch.tensor([0, 1]))], tmp_path / "float.onnx")
    (file,) = record["files"]
    assert record["scheme"] is None
    assert record["scales"] is None
    assert file["error_ratio"] is None
    assert record["self_error_ratio"] is None
    assert file["relative_error"] < 1e-5
    assert file["nodes"]["int8"] == {}
    assert file["nodes"]["float_islands"] == 1


ODD = {
    "dinov3": {"depth": 1},  # register tokens, LayerScale, rotary embeddings
    "swinv2": {"depths": (2,), "num_heads": (2,)},  # cosine attention, shifted windows
    "deit_distilled": {"depth": 1},
    "eva02": {"depth": 1},
}


@pytest.mark.parametrize(
    "family",
    ["dinov3", "swinv2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deit_distilled", "eva02"))],
)
def test_odd_models_export_and_agree(family: str, tmp_path: Path) -> None:
    check_family(family, ODD[family], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deit3", "beit", "cait", "xcit", "swin", "swinv2_cr", "maxvit", "naflex"])
def test_every_family_exports_and_agrees(family: str, tmp_path: Path) -> None:
    check_family(family, {}, tmp_path)


class WindowedAttention(nn.Module):
    """Projects all tokens and then cuts them into windows: its tokens are not the second axis of what is projected."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        q, k, v = self.qkv(x).reshape(-1, 4, 3, 2, x.shape[-1] // 2).permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(x.shape))


def test_windows_that_are_cut_after_the_projection_stay_apart(tmp_path: Path) -> None:
    model = make_model("vit", depth=1, class_token=False, global_pool="avg")
    model.blocks[0].attn = WindowedAttention(model.embed_dim)
    images = make_images("vit", 4)
    quantized = quantize_static(model.eval(), [images], "w8a8-tt")
    export_onnx(quantized, tmp_path / "model.onnx", images[:1], target="onnxruntime")
    assert operators(tmp_path / "model.onnx")["MatMulIntegerToFloat"] == 6  # patches, qkv as one, proj, fc1, fc2, head
    with torch.no_grad():
        assert relative(run_onnx(tmp_path / "model.onnx", images), quantized(images)) < 1e-2


@pytest.mark.parametrize("target", export.TARGETS)
def test_an_export_says_nothing_of_its_tools_internals(
    target: str, vit: Exported, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    export_onnx(vit.quantized, tmp_path / "model.onnx", vit.images, target=target)
    assert caplog.messages == []


def test_attention_over_three_axes_with_a_bias_exports_fused(tmp_path: Path) -> None:
    sizes = {"img_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 2, "neck_chans": 16, "num_classes": 10}
    model = timm.create_model("samvit_base_patch16_224", **sizes).eval()
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for module in model.modules():  # zero as timm makes them
            for bias in (getattr(module, "rel_pos_h", None), getattr(module, "rel_pos_w", None)):
                if bias is not None:
                    bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(1)))
    quantized = quantize_static(model, [images], "w8a8-tt+res")
    export_onnx(quantized, tmp_path / "model.onnx", images)
    with torch.no_grad():
        assert relative(run_onnx(tmp_path / "model.onnx", images[:2]), quantized(images[:2])) < 1e-2


@pytest.mark.parametrize("scheme", ["w8a8-tt+res", "w8a8-tt+res+attn"])
def test_attention_over_five_axes_exports_fused_or_with_its_operands_quantized(scheme: str, tmp_path: Path) -> None:
    check_family("hiera", {}, tmp_path, scheme)


def check_family(family: str, overrides: dict[str, Any], folder: Path, scheme: str = "w8a8-tt+res") -> None:
    model, images = make_model(family, **overrides), make_images(family, 4)
    quantized = quantize_static(model, [images], scheme)
    export_onnx(quantized, folder / "model.onnx", images[:1], target="onnxruntime")
    with torch.no_grad():
        wanted, original = quantized(images), model(images)
    # the distance is that of values which rounded to the neighbouring integer, and stays below the quantization's own
    assert (run_onnx(folder / "model.onnx", images) - wanted).norm() < (wanted - original).norm()


def test_run_time_steps_are_refused_by_name_with_a_remedy(tmp_path: Path) -> None:
    quantized = quantize_static(make_model("vit"), [make_images("vit")], "w8a8-tk")
    with pytest.raises(ValueError, match=r"^w8a8-tk cannot be exported: its steps are computed at run time.*w8a8-ct"):
        export_onnx(quantized, tmp_path / "x.onnx", make_images("vit"))


def test_an_unknown_target_is_refused_and_names_the_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'tensorrt'; accepted are qdq, onnxruntime"):
        export_onnx(make_model("vit"), tmp_path / "x.onnx", make_images("vit"), target="tensorrt")


def test_a_model_that_cannot_be_traced_is_refused_with_the_reason(tmp_path: Path) -> None:
    class Fickle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(RuntimeError, match=r"Fickle cannot be exported to ONNX: .*dynamic_batch=False"):
        export_onnx(Fickle(), tmp_path / "x.onnx", make_images("vit"))


def test_without_the_extra_one_message_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(RuntimeError, match=r"needs onnxscript: pip install '\.\[export\]' in the clone"):
        export_onnx(make_model("vit"), tmp_path / "x.onnx", make_images("vit"))
    with pytest.raises(RuntimeError, match="onnxscript"):
        OnnxModel("x.onnx")
    monkeypatch.undo()
    require_export_extra()


def test_the_module_of_onnxruntime_names_the_command_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tweo_timm.quant.ort")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[export\]' in the clone"):
        importlib.import_module("tweo_timm.quant.ort")


def test_no_images_are_refused(vit: Exported, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one image"):
        export_record(vit.model, vit.quantized, [], tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="no images"):
        run_onnx(vit.qdq, [])


def test_a_path_whose_ending_would_be_cut_off_is_refused(vit: Exported, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"w8a8-tt'; its name ends in \.onnx"):
        export_record(vit.model, vit.quantized, [], tmp_path / "vit.w8a8-tt")


def test_agreement_equals_numpy_over_batches() -> None:
    rng = np.random.default_rng(0)
    original, model, file = (rng.standard_normal((7, 5)).astype(np.float32) for _ in range(3))
    agreement = Agreement()
    for part in (slice(0, 3), slice(3, 7)):
        agreement.update(*(torch.from_numpy(logits[part]) for logits in (model, file, original)))
    summary = agreement.summary()
    error = np.linalg.norm(file.astype(np.float64) - model)
    assert summary["top1_agreement"] == pytest.approx((model.argmax(1) == file.argmax(1)).mean())
    assert summary["relative_error"] == pytest.approx(error / np.linalg.norm(model.astype(np.float64)))
    assert summary["error_ratio"] == pytest.approx(error / np.linalg.norm(model.astype(np.float64) - original))
    assert summary["max_abs_error"] == pytest.approx(np.abs(file.astype(np.float64) - model).max())


@pytest.mark.parametrize(
    ("ratio", "relative_error", "said"),
    [
        (0.4, 0.02, None),
        (1.0, 0.02, None),
        (3.1, 0.2, r"^x\.onnx is off: its error ratio is 3\.1 \(accepted: 1; the model from itself: 0\.5\)"),
        (float("nan"), float("nan"), "error ratio is nan"),
        (None, 1e-4, None),
        (None, None, None),  # logits of nothing but zeros
        (None, 0.3, r"differ from the model's by 0\.3 of their norm \(accepted: 0\.1\)"),
        (None, float("nan"), "by nan"),
    ],
)
@pytest.mark.parametrize("saturates", [True, False])
def test_a_file_that_is_further_from_its_model_than_quantization_is_wrong_and_the_processor_is_named(
    saturates: bool,
    ratio: float | None,
    relative_error: float | None,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "int8_saturates", lambda: saturates)
    file = {"path": "a/x.onnx", "error_ratio": ratio, "relative_error": relative_error}
    fault = fault_of(file, None if ratio is None else 0.5)
    if said is None:
        assert fault is None
        return
    assert re.search(said, fault)
    assert machine.describe()["processor"] in fault
    assert ("products saturate unless" in fault, "products are exact" in fault) == (saturates, not saturates)
    assert ("--quantize w7a8-tt" in fault) == (ratio is not None)


def test_the_scheme_travels_with_the_report(vit: Exported) -> None:
    assert Scheme.parse(vit.record["files"][0]["scheme"]) == Scheme()


def openvino_error_ratio(name: str, scheme: str, folder: Path, **environment: str) -> float:
    """How far OpenVINO's logits are from the quantized model's, in a process with these variables."""
    pytest.importorskip("openvino", reason="a second engine for the standard file: pip install openvino")
    model, images = make_model(name), make_images(name, 6)
    quantized = quantize_static(model, [images], scheme)
    export_onnx(quantized, folder / "model.onnx", images)
    np.save(folder / "images.npy", images.numpy())
    program = (
        "import numpy, openvino; settings = {'INFERENCE_PRECISION_HINT': 'f32'}; "
        "compiled = openvino.compile_model('model.onnx', 'CPU', settings); "
        "numpy.save('logits.npy', compiled([numpy.load('images.npy')])[0])"
    )
    subprocess.run([sys.executable, "-c", program], cwd=folder, env=os.environ | environment, check=True)
    agreement = Agreement()
    with torch.no_grad():
        agreement.update(quantized(images), torch.from_numpy(np.load(folder / "logits.npy")), model(images))
    return float(agreement.summary()["error_ratio"])


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_openvino_computes_the_standard_file_as_the_model_does(name: str, tmp_path: Path) -> None:
    scheme = "w7a8-tt" if machine.int8_saturates() else "w8a8-tt"
    assert (
        openvino_error_ratio(name, scheme, tmp_path) < 0.5
    )  # 2e-6 and 0.19 measured: a value on an edge falls either way


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the products of x86 without VNNI")
@pytest.mark.parametrize(("scheme", "wrong"), [("w8a8-tt", True), ("w7a8-tt", False)])
def test_openvino_without_vnni_is_wrong_with_weights_of_eight_bits_and_right_with_seven(
    scheme: str, wrong: bool, tmp_path: Path
) -> None:
    ratio = openvino_error_ratio("swin", scheme, tmp_path, ONEDNN_MAX_CPU_ISA="AVX2")
    assert (ratio > 1, ratio < 0.5) == (wrong, not wrong)  # 19 and 2e-6 measured
