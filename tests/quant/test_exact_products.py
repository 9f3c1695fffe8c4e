"""Int8 products are exact on a processor that adds two of them in 16 bits, which saturate at 32767."""

from __future__ import annotations

import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.quant.families import make_images, make_model
from tweo_timm import __version__, machine
from tweo_timm.quant.export import TARGETS, export_onnx
from tweo_timm.quant.static import quantize_static

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx.reference.op_run import OpRun  # noqa: E402

from tweo_timm.quant.latency import write_rivals  # noqa: E402
from tweo_timm.quant.ort import open_session, run_onnx  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript.*")

SCHEMES = ("w8a8-ct", "w7a8-tt")
PAIR_LIMIT = 2**15 - 1
PRODUCTS_SATURATE = machine.int8_saturates()


class Exported:
    """A tiny ViT, quantized, and its two files."""

    def __init__(self, scheme: str, folder: Path) -> None:
        self.images = make_images("vit", 6)
        quantized = quantize_static(make_model("vit", depth=1), [self.images], scheme)
        self.files = {target: folder / f"{target}.onnx" for target in TARGETS}
        for target, path in self.files.items():
            export_onnx(quantized, path, self.images, target=target)
        with torch.no_grad():
            self.logits = quantized(self.images)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    return {scheme: Exported(scheme, tmp_path_factory.mktemp(scheme)) for scheme in SCHEMES}


@pytest.fixture
def saturating(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor whose products saturate, as far as the package knows."""
    monkeypatch.setattr(machine, "int8_saturates", lambda: True)


def relative(got: Tensor, wanted: Tensor) -> float:
    """Of the middle image: a value on the edge between two integers may fall either way, and spoils one image."""
    return float(((got - wanted).norm(dim=1) / wanted.norm(dim=1)).median())


def bytes_of(path: Path) -> dict[str, np.ndarray]:
    """The int8 and uint8 initializers of a file."""
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    return {name: array for name, array in arrays.items() if array.dtype in (np.int8, np.uint8)}


def assert_no_two_read_the_same(path: Path) -> None:
    own = bytes_of(path)
    readers = Counter(name for node in onnx.load(path).graph.node for name in node.input if name in own)
    assert set(readers) == set(own)
    assert set(readers.values()) == {1}


def assert_exact_with_the_option(path: Path, images: Tensor, wanted: Tensor, folder: Path) -> None:
    """The file agrees, and where onnxruntime obeys the option (on x86) no weight is int8 any more.

    Before 1.24 it did so only where products saturate.
    """
    assert relative(run_onnx(path, images), wanted) < 1e-5
    open_session(path, 1, folder / "optimized.onnx")
    obeys_everywhere = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 24)
    if platform.machine() in ("x86_64", "AMD64") and (obeys_everywhere or PRODUCTS_SATURATE):
        assert {array.dtype for array in bytes_of(folder / "optimized.onnx").values()} == {np.dtype("uint8")}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_node_reads_integers_of_its_own(scheme: str, target: str, exported: dict[str, Exported]) -> None:
    assert_no_two_read_the_same(exported[scheme].files[target])


@pytest.mark.usefixtures("saturating")
@pytest.mark.parametrize("target", TARGETS)
def test_both_files_load_and_agree_with_the_option_that_our_sessions_set(
    target: str, exported: dict[str, Exported], tmp_path: Path
) -> None:
    vit = exported["w8a8-ct"]
    assert_exact_with_the_option(vit.files[target], vit.images, vit.logits, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
def test_weights_of_seven_bits_agree_and_no_pair_of_their_products_can_saturate(
    target: str, exported: dict[str, Exported]
) -> None:
    vit = exported["w7a8-tt"]
    assert relative(run_onnx(vit.files[target], vit.images), vit.logits) < 1e-5
    arrays = bytes_of(vit.files[target]).values()
    weights = [array.astype(np.int32) for array in arrays if array.dtype == np.int8 and array.ndim > 1]
    assert len(weights) >= 6  # patches, qkv, proj, fc1, fc2, head
    assert max(np.abs(weight).max() for weight in weights) == 63
    for weight in weights:
        rows = weight if weight.ndim == 2 else weight.reshape(len(weight), -1).T  # (in, out)
        pairs = np.abs(rows[:-1]) + np.abs(rows[1:])  # any neighbours: an engine may pad or cut the inputs
        assert 255 * pairs.max() <= PAIR_LIMIT


class Product(OpRun):
    """MatMulIntegerToFloat of x86 without VNNI: two products are added in 16 bits, the pairs in 32."""

    op_domain = "com.microsoft"
    saturates = True

    def _run(self, a: Any, b: Any, a_scale: Any, b_scale: Any, a_zero: Any, b_zero: Any, bias: Any) -> tuple[Any]:
        left, right = a.astype(np.int32), b.astype(np.int32)
        left = np.pad(left, [(0, 0)] * (left.ndim - 1) + [(0, left.shape[-1] % 2)])
        right = np.pad(right, [(0, left.shape[-1] - len(right)), (0, 0)])
        pairs = left[..., 0::2, None] * right[0::2] + left[..., 1::2, None] * right[1::2]
        if self.saturates:
            pairs = pairs.clip(-(2**15), PAIR_LIMIT)
        assert not b_zero.any()
        sums = pairs.sum(-2) - a_zero.astype(np.int32) * right.sum(0)
        return ((sums * (a_scale * b_scale) + bias).astype(np.float32),)


def simulated(path: Path, images: Tensor, saturates: bool) -> Tensor:
    operator = type("MatMulIntegerToFloat", (Product,), {"saturates": saturates})
    return torch.from_numpy(ReferenceEvaluator(str(path), new_ops=[operator]).run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize(("scheme", "saturated"), [("w8a8-ct", (5e-3, 1.0)), ("w7a8-tt", (0, 1e-5))])
def test_pairs_that_saturate_move_the_logits_at_eight_bits_and_not_at_seven(
    scheme: str, saturated: tuple[float, float], exported: dict[str, Exported]
) -> None:
    """Simulated in NumPy, apart from onnxruntime's kernels, which do not saturate on every processor."""
    vit = exported[scheme]
    path = vit.files["onnxruntime"]
    assert relative(simulated(path, vit.images, saturates=False), vit.logits) < 1e-5
    low, high = saturated
    assert low <= relative(simulated(path, vit.images, saturates=True), vit.logits) < high


@pytest.mark.usefixtures("saturating")
@pytest.mark.parametrize("target", TARGETS)
def test_a_layer_that_two_blocks_share_is_exact_too(target: str, tmp_path: Path) -> None:
    model, images = make_model("vit"), make_images("vit")
    model.blocks[1].mlp = model.blocks[0].mlp
    quantized = quantize_static(model, [images], "w8a8-tt")
    export_onnx(quantized, tmp_path / "tied.onnx", images, target=target)
    assert_no_two_read_the_same(tmp_path / "tied.onnx")
    with torch.no_grad():
        assert_exact_with_the_option(tmp_path / "tied.onnx", images, quantized(images), tmp_path)


class Twice(nn.Module):
    """One Linear, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


@pytest.mark.usefixtures("saturating")
def test_the_dynamic_rival_of_a_model_that_calls_a_layer_twice_is_exact_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(4, 8)
    dynamic = write_rivals(model, x, tmp_path)["dynamic int8 ONNX"]
    assert_no_two_read_the_same(dynamic)
    (exact,) = ReferenceEvaluator(str(dynamic)).run(None, {"images": x.numpy()})
    assert_exact_with_the_option(dynamic, x, torch.from_numpy(exact), tmp_path)


@pytest.mark.parametrize(("scheme", "options"), [("w8a8-ct", {"session.x64quantprecision": "1"}), ("w7a8-tt", {})])
def test_a_file_says_its_scheme_what_a_session_needs_and_who_wrote_it(
    scheme: str, options: dict[str, str], exported: dict[str, Exported]
) -> None:
    for path in exported[scheme].files.values():
        metadata = open_session(path).get_modelmeta().custom_metadata_map
        assert json.loads(metadata["session_options"]) == options
        assert (metadata["scheme"], metadata["tweo_timm"]) == (scheme, __version__)


def test_a_float_file_says_so(tmp_path: Path) -> None:
    export_onnx(make_model("vit", depth=1), tmp_path / "float.onnx", make_images("vit"))
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "float.onnx").metadata_props}
    assert (metadata["scheme"], metadata["session_options"], metadata["tweo_timm"]) == ("float32", "{}", __version__)
