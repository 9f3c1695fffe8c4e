"""fp16, bf16, fp8 and fp8-unit: torch's own casts and modules, what saturates, and what stays float."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tests.quant.families import make_images, make_model
from tweo_timm import export_onnx, quantize_static
from tweo_timm.quant.float8 import Float8Layer, Float8Quantizer, saturation, to_float8
from tweo_timm.quant.scheme import Scheme
from tweo_timm.quant.static import quantization_scales


def codes(x, step):
    """E4M3 as torch casts it, once what is larger has been cut off by hand."""
    return (x / step).clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("step", [1.0, 0.37, 2.0**-9])
def test_a_cast_to_e4m3_is_torchs_bit_for_bit_and_saturates(step):
    step = torch.tensor(step)
    grid = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.bfloat16).float()
    x = torch.cat([grid[grid.isfinite()], torch.randn(4096), torch.tensor([500.0, -1e30, torch.inf, -torch.inf])])
    got = to_float8(x, step)
    assert torch.equal(got.to(torch.float8_e4m3fn).view(torch.uint8), codes(x, step).view(torch.uint8))
    assert got.abs().max() == 448
    assert bool(to_float8(torch.tensor([torch.nan]), step).isnan())


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize(("scheme", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_is_torchs_own_module_and_keeps_its_infinities(family, scheme, dtype):
    model, images = make_model(family), make_images(family)
    for planted in (0.0, 9e4):
        with torch.no_grad():
            next(m for m in model.modules() if isinstance(m, torch.nn.Linear)).bias[0] = planted
            expected = copy.deepcopy(model).to(dtype)(images.to(dtype)).float()
            got = quantize_static(model, [], scheme)(images)
        assert got.dtype == torch.float32
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())
        assert bool(expected.isfinite().all()) == (planted == 0 or scheme == "bf16")
    assert next(model.parameters()).dtype == torch.float32


def test_a_layer_kept_in_float_computes_in_float_within_half_precision():
    model, images = make_model("vit"), make_images("vit")
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias.fill_(9e4)
        model.blocks[1].mlp.fc2.weight.mul_(1e-4)
        assert not bool(quantize_static(model, [], "fp16")(images).isfinite().all())
        kept = quantize_static(model, [], "fp16", keep_float=["blocks.1.mlp"])(images)
        torch.testing.assert_close(kept, model(images), rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match=r"blocks.1.mpl.*did you mean 'blocks.1.mlp'"):
        quantize_static(model, [], "fp16", keep_float=["blocks.1.mpl"])


@pytest.mark.parametrize(("scheme", "unit"), [("fp8", False), ("fp8-unit", True)])
def test_an_e4m3_layer_is_the_product_of_torchs_casts(scheme, unit):
    model, images = make_model("vit"), make_images("vit")
    layer, seen = model.blocks[1].mlp.fc1, []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    step_x, step_w = (torch.ones(()) if unit else t.detach().abs().max() / 448 for t in (seen[0], layer.weight))
    x, weight = (codes(t, s).float() for t, s in ((seen[0], step_x), (layer.weight, step_w)))
    expected = F.linear(x.double(), weight.double()) * (step_x * step_w).double() + layer.bias
    quantized = quantize_static(model, [images], scheme)
    got = quantized.blocks[1].mlp.fc1
    assert isinstance(got, Float8Layer)
    torch.testing.assert_close(got(seen[0]).double(), expected, rtol=1e-5, atol=1e-5)
    scales = quantization_scales(quantized)["blocks.1.mlp.fc1"]
    assert (scales["format"], scales["input_scale"]) == ("e4m3", pytest.approx(float(step_x)))


def test_attention_and_stream_stay_float_unless_the_scheme_names_them():
    model, images = make_model("vit"), [make_images("vit")]
    kinds = {}
    for scheme in ("fp8", "fp8+res+attn"):
        scales = quantization_scales(quantize_static(model, images, scheme))
        kinds[scheme] = {row["kind"] for row in scales.values()}
    assert kinds == {"fp8": {"linear", "conv"}, "fp8+res+attn": {"linear", "conv", "stream", "product"}}
    assert all(bool(torch.isfinite(quantize_static(model, images, s)(images[0])).all()) for s in kinds)


def test_what_saturates_is_counted_and_named():
    model, images = make_model("vit"), make_images("vit")
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[3:5] = 9e4
        quantized = quantize_static(model, [images], "fp8-unit")
        assert saturation(quantized)["values"] == 0
        quantized(images)
    found = saturation(quantized)
    tokens = images.shape[0] * model.pos_embed.shape[1]
    assert found["sites"]["blocks.0.mlp.fc2"] == 2 * tokens
    rounded = sum(int(m.seen) for m in quantized.modules() if isinstance(m, Float8Quantizer))
    assert found["share"] == found["values"] / rounded
    assert saturation(quantize_static(model, [images], "w8a8-tt")) is None


@pytest.mark.parametrize("text", ["fp16", "bf16+rot", "fp8", "fp8-unit+rotr", "fp8+res+attn+rot+smooth"])
def test_formats_are_written_as_they_are_read(text):
    assert str(Scheme.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "part"), [("fp16+res", "fp16 does not take [+]res"), ("fp8+qwt", "[+]qwt"), ("fp8+zero", "[+]zero")]
)
def test_a_suffix_that_a_format_does_not_take_is_refused_with_those_it_takes(text, part):
    with pytest.raises(ValueError, match=rf"{part}.*it takes .*[+]rot"):
        Scheme.parse(text)


def test_layers_and_sites_are_kept_in_float_by_name():
    model, images = make_model("vit"), [make_images("vit")]
    kept = ["blocks.0.mlp.fc2", "blocks.1.add1"]
    quantized = quantize_static(model, images, "w8a8-tt+res", keep_float=kept)
    scales = quantization_scales(quantized)
    assert set(quantization_scales(quantize_static(model, images, "w8a8-tt+res"))) - set(scales) == set(kept)
    assert isinstance(quantized.blocks[0].mlp.fc2, torch.nn.Linear)
    assert quantized.quantization["kept_float"] == kept
    with pytest.raises(ValueError, match=r"did you mean 'blocks\.0\.mlp\.fc2'"):
        quantize_static(model, images, "w8a8-tt+res", keep_float=["blocks.0.mlp.fc3"])


def test_half_precision_has_no_file_and_says_why(tmp_path):
    pytest.importorskip("onnx")
    with pytest.raises(ValueError, match="fp16 cannot be exported"):
        export_onnx(quantize_static(make_model("vit"), [], "fp16"), tmp_path / "x.onnx", make_images("vit"))
