"""Files whose numbers are E4M3, and files whose floats are float16, run in onnxruntime and agree with their schemes."""

import pytest
import torch
from packaging import version

from tests.quant.families import make_images, make_model
from tweo_timm.quant.deploy import Agreement, fault_of
from tweo_timm.quant.static import quantize_static

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx import TensorProto  # noqa: E402

from tweo_timm.quant.export import export_onnx  # noqa: E402
from tweo_timm.quant.ort import run_onnx  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript.*")


MORE = [("swin", "fp8"), ("vit", "fp8-unit")]
not_in_old_engines = pytest.mark.skipif(
    version.parse(onnxruntime.__version__) < version.parse("1.31"),
    reason="onnxruntime 1.20 takes E4M3 products of attention for integers, and rounds int8 between float16 otherwise",
)


def relative(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def logits_of(model, images):
    with torch.no_grad():
        return model(images)


def nodes(path, *kinds):
    return [node for node in onnx.load(path).graph.node if node.op_type in kinds]


@not_in_old_engines
@pytest.mark.parametrize(
    ("family", "scheme"),
    [("vit", "fp8+res+attn"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)],
)
def test_a_file_of_e4m3_gives_the_logits_of_its_scheme_where_values_saturate_too(family, scheme, tmp_path):
    model, images = make_model(family), make_images(family, 6)
    quantized = quantize_static(model, [images], scheme)
    export_onnx(quantized, tmp_path / "fp8.onnx", images)
    for factor in (1, 5, 200):  # beyond what calibration saw
        wanted = logits_of(quantized, factor * images)
        limit = 1e-5 if family == "vit" else 1e-2  # 1.3e-7 measured; in Swin one value lies on an edge: 3e-3
        assert relative(run_onnx(tmp_path / "fp8.onnx", factor * images), wanted) < limit
    stored = [t for t in onnx.load(tmp_path / "fp8.onnx").graph.initializer if t.data_type == TensorProto.FLOAT8E4M3FN]
    assert sum(len(tensor.dims) > 1 for tensor in stored) == 10  # patches, four a block, head
    onnx.checker.check_model(onnx.load(tmp_path / "fp8.onnx"), full_check=True)


@pytest.mark.parametrize("family", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
def test_a_float16_file_is_as_near_to_the_float_model_as_torchs_own_half_precision(family, tmp_path):
    model, images = make_model(family), make_images(family, 6)
    file = tmp_path / "half.onnx"
    assert export_onnx(model, file, images, dtype="float16")["dtype"] == "float16"
    wanted, half = logits_of(model, images), logits_of(quantize_static(model, [images], "fp16"), images)
    got = run_onnx(file, images)
    assert got.dtype == torch.float32
    assert 0 < relative(got, wanted) < 2 * relative(half, wanted)  # 0.8 and 1.1 times measured
    assert_float16_inside(file)
    assert {entry.key: entry.value for entry in onnx.load(file).metadata_props}["scheme"] == "fp16"


def assert_float16_inside(path):
    """No float32 between the two casts, and norms that add up in float32."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    assert TensorProto.FLOAT not in {*kinds.values(), *(tensor.data_type for tensor in model.graph.initializer)}
    assert TensorProto.FLOAT16 in kinds.values()
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    assert len(norms) == 5 if "vit" in str(path) else norms
    assert all({a.name: a.i for a in node.attribute}.get("stash_type", 1) == 1 for node in norms)


@not_in_old_engines
@pytest.mark.parametrize("scheme", ["w8a8-ct", pytest.param("fp8+res", marks=pytest.mark.slow)])
def test_a_quantized_float16_file_has_its_integers_between_float16_and_is_as_near_to_the_float_model(scheme, tmp_path):
    model, images = make_model("vit"), make_images("vit", 6)
    quantized = quantize_static(model, [images], scheme)
    done = export_onnx(quantized, tmp_path / "half.onnx", images, dtype="float16")
    assert_float16_inside(tmp_path / "half.onnx")
    agreement = Agreement()
    agreement.update(logits_of(quantized, images), run_onnx(tmp_path / "half.onnx", images), logits_of(model, images))
    found = agreement.summary()
    assert 0.5 < found["damage_ratio"] < 1.5
    assert fault_of({**done, **found}, None) is None
    assert "leave out --export-dtype" in str(fault_of({**done, **found, "damage_ratio": 2.1}, None))


def test_a_norm_whose_squares_float16_cannot_hold_is_right_in_a_float16_file(tmp_path):
    model, images = make_model("vit", depth=1), make_images("vit", 2)
    with torch.no_grad():
        model.pos_embed[..., 3] += 1000.0  # 1e6 / 32 is the mean of squares
    export_onnx(model, tmp_path / "half.onnx", images, dtype="float16")
    assert relative(run_onnx(tmp_path / "half.onnx", images), logits_of(model, images)) < 0.05


def planted(name, value):
    model = make_model("vit", depth=1)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    return model


def test_what_float16_cannot_hold_is_refused_by_name(tmp_path):
    images = make_images("vit", 2)
    with pytest.raises(ValueError, match=r"blocks.0.mlp.fc1.bias holds 1e\+05, which float16 cannot hold"):
        export_onnx(planted("blocks.0.mlp.fc1.bias", 1e5), tmp_path / "x.onnx", images, dtype="float16")
    model = make_model("vit", depth=1)
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.mul_(1e-5)
    quantized = quantize_static(model, [images], "w8a8-tt")
    with pytest.raises(ValueError, match=r"the weight of blocks.0.mlp.fc2 has a step of .*export in float32"):
        export_onnx(quantized, tmp_path / "x.onnx", images, dtype="float16")


@pytest.mark.slow
def test_channels_of_zeros_alone_need_no_step_that_float16_lacks(tmp_path):
    model, images = make_model("vit", depth=1), make_images("vit", 2)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[:3] = 0
    quantized = quantize_static(model, [images], "w8a8-ct")
    export_onnx(quantized, tmp_path / "x.onnx", images, dtype="float16")
    assert bool(torch.isfinite(run_onnx(tmp_path / "x.onnx", images)).all())


@pytest.mark.parametrize(
    ("scheme", "form", "message"),
    [
        ("fp8", {"target": "onnxruntime"}, "multiplies integers, not E4M3: export for target 'qdq'"),
        ("w8a8-tt", {"target": "onnxruntime", "dtype": "float16"}, "export float16 for target 'qdq'"),
        ("w8a8-tt", {"dtype": "bfloat16"}, "dtype is 'bfloat16'; accepted are float32, float16"),
        ("fp16", {}, "with --export-dtype float16 and without --quantize"),
    ],
)
def test_what_has_no_such_file_is_refused_with_a_remedy(scheme, form, message, tmp_path):
    quantized = quantize_static(make_model("vit", depth=1), [make_images("vit", 2)], scheme)
    with pytest.raises(ValueError, match=message):
        export_onnx(quantized, tmp_path / "x.onnx", make_images("vit", 2), **form)
