"""A percentile of calibration is that of all inputs of a layer, and nothing else of the scheme changes."""

import pytest
import torch

from tests.quant.families import make_images, make_model
from tweo_timm.quant.static import quantization_scales, quantize_static


def inputs_of(model, images):
    """All values of |input| of every Linear and convolution, float64."""
    seen = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            layer.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        model(images)
    return {name: torch.cat([x.double().abs().flatten() for x in found]) for name, found in seen.items()}


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("percent", [90, 99.9])
def test_a_step_reaches_to_the_percentile_of_all_values_however_they_are_batched(family, percent):
    images = make_images(family, 6)
    found = quantization_scales(
        quantize_static(make_model(family), images.split(4), "w8a8-ct", calibration=f"percentile:{percent}")
    )
    plain = quantization_scales(quantize_static(make_model(family), [images], "w8a8-ct"))
    for name, values in inputs_of(make_model(family), images).items():
        reach = 127 * found[name]["input_scale"]
        below, above = (float((values < factor * reach).double().mean()) for factor in (1 - 1 / 64, 1 + 1 / 64))
        assert below <= percent / 100 <= above
        assert found[name]["input_scale"] < plain[name]["input_scale"]
        assert found[name]["weight_scale"] == plain[name]["weight_scale"]


def test_a_percentile_above_all_values_but_the_largest_is_nearly_the_largest():
    model, images = make_model("vit"), make_images("vit", 2)
    found = quantization_scales(quantize_static(model, [images], "w8a8-tt", calibration="percentile:99.9999999"))
    for name, entry in quantization_scales(quantize_static(model, [images], "w8a8-tt")).items():
        assert found[name]["input_scale"] == pytest.approx(entry["input_scale"], rel=1 / 64)


def test_an_outlier_is_cut_off_and_the_model_says_by_what():
    model, images = make_model("vit"), make_images("vit", 6)
    images[0, 0, 0, 0] = 1e4
    quantized = quantize_static(model, [images], "w8a8-tt", calibration="percentile:99.9")
    assert quantized.quantization["calibration"] == "percentile:99.9"
    assert 127 * quantization_scales(quantized)["patch_embed.proj"]["input_scale"] < 10


@pytest.mark.parametrize("calibration", ["percentile:100", "percentile:5", "percentile", "mse", "percentile:99,9"])
def test_another_calibration_is_refused_and_names_the_known(calibration):
    with pytest.raises(ValueError, match=r"is not understood: give absmax, or percentile:P"):
        quantize_static(make_model("vit"), [make_images("vit")], "w8a8-tt", calibration=calibration)


@pytest.mark.parametrize("scheme", ["w8a8-tk", "w8a8-tt+res", "w8a8-tt+attn", "fp8", "fp16"])
def test_a_scheme_of_other_steps_is_refused_with_a_remedy(scheme):
    with pytest.raises(ValueError, match=r"is not calibrated by a percentile.* use a scheme such as w8a8-ct"):
        quantize_static(make_model("vit"), [make_images("vit")], scheme, calibration="percentile:99.99")
