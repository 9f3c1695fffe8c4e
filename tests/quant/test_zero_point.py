"""+zero: inputs on one side of 0 use all integers, exactly as an engine does, and others stay as they were."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.quant.families import make_images, make_model
from tweo_timm import export_onnx, quantize_static
from tweo_timm.quant.quantizer import QuantizedLayer, Quantizer, largest_integer
from tweo_timm.quant.static import quantization_scales


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.floats(-3, 0), st.floats(0.01, 50), st.sampled_from((8, 6, 4)))
def test_zero_is_on_the_grid_and_the_range_is_covered(least, most, bits):
    quantizer = Quantizer(bits, torch.tensor(most), least=torch.tensor(least))
    step = float(quantizer.scale)
    assert step <= 1.001 * (most - least) / (2 * largest_integer(bits)) + 1e-7
    x = torch.linspace(least, most, 301)
    assert float((quantizer(x) - x).abs().max()) <= step * 1.001
    assert float(quantizer(torch.zeros(1))) == 0
    stored = quantizer.integers(x)[0] + quantizer.zero_point
    assert float(stored.abs().max()) <= largest_integer(bits)


def test_a_layer_multiplies_as_a_reference_in_float64():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 16), torch.rand(8, 64) * 5 - 0.17
    quantizer = Quantizer(8, x.max(), least=x.min())
    quantized = QuantizedLayer(layer, quantizer, 8, per_channel=False).eval()
    expected = quantizer(x).double() @ quantized.weight.double().T + layer.bias.double()
    assert torch.allclose(quantized(x).double(), expected, atol=1e-5)


def test_only_inputs_of_fc2_get_one_and_the_error_falls():
    model, images = make_model("vit"), make_images("vit", 8)
    expected = model(images)
    without, with_zero = (quantize_static(model, [images], s) for s in ("w8a6-ct", "w8a6-ct+zero"))
    scales = quantization_scales(with_zero)
    assert {name for name, row in scales.items() if row["input_zero_point"]} == {
        f"blocks.{index}.mlp.fc2" for index in range(2)
    }
    errors = [float((m(images) - expected).detach().norm()) for m in (without, with_zero)]
    assert errors[1] < errors[0]


def test_onnxruntime_computes_the_same_and_the_symmetric_target_refuses_by_name(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, images = make_model("vit"), make_images("vit", 8)
    quantized = quantize_static(model, [images], "w7a8-tt+zero")
    with pytest.raises(ValueError, match="TensorRT"):
        export_onnx(quantized, tmp_path / "no.onnx", images[:2])
    export_onnx(quantized, tmp_path / "m.onnx", images[:2], target="onnxruntime")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    assert float((logits - quantized(images)).norm() / logits.norm()) < 0.01
