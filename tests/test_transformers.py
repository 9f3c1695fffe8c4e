"""Models of transformers are found, measured, put into FP8 and quantized by their structure, as timm's are."""

import pytest
import torch
from torch import nn

from tests.hf_models import MODELS, answer, images, make
from tweo_timm import (
    Fp8Recipe,
    Tweo,
    check_fp8_ran,
    describe_stream,
    find_blocks,
    patch_fp8,
    quantize_static,
    record_outliers,
    rotate,
)
from tweo_timm.quant.fidelity import fidelity
from tweo_timm.quant.static import quantization_scales
from tweo_timm.rewrite.features import RotatedFeatures
from tweo_timm.rewrite.head import add_feature_head

every_model = pytest.mark.parametrize("name", MODELS)


def block_outputs(model, name, x):
    """What the model itself says that its blocks return."""
    with torch.no_grad():
        output = model(x, output_hidden_states=True)
    if name == "swin":  # it tells the end of its stages only, after the merging of patches: the last stage has none
        return {1: output.hidden_states[-1]}
    states = output.hidden_states[1:]
    return dict(enumerate(states))


@every_model
def test_blocks_are_found_and_their_peaks_are_those_of_the_hidden_states_that_the_model_hands_out(name):
    model, x = make(name), images()
    with record_outliers(model) as record, torch.no_grad():
        model(x)
    rows = record.summary()["blocks"]
    assert [row["name"] for row in rows] == list(find_blocks(model)) == [MODELS[name][3].format(i) for i in range(2)]
    for index, state in block_outputs(model, name, x).items():
        assert rows[index]["peak_abs"] == pytest.approx(float(state.abs().max()), rel=1e-6)


@every_model
def test_every_linear_layer_trains_in_fp8_with_the_penalty(name):
    model = make(name).train()
    linears = [module for module, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    tweo = Tweo(model)
    report = patch_fp8(model, Fp8Recipe(backend="emulated"))
    (answer(model(images())).sum() + tweo.penalty()).backward()
    check_fp8_ran(model)
    assert list(report.converted) == linears
    assert report.skipped == {}


@every_model
def test_int8_of_smoothed_layers_and_stream_is_near_the_float_model(name):
    model, x = make(name), images()
    quantized = quantize_static(model, [x], "w8a8-ck+res+smooth")
    assert not quantized.quantization["unused_layers"]
    assert fidelity(model, quantized, x)["relative_error"] < 0.08
    with torch.no_grad():
        expected = answer(model(x))
        assert (answer(quantized(x)) - expected).norm() < 0.08 * expected.norm()


@pytest.mark.parametrize("name", ["swin"])
def test_the_stream_is_quantized_by_the_peaks_of_its_blocks(name):
    model, x = make(name), images()
    with record_outliers(model) as record, torch.no_grad():
        model(x)
    scales = quantization_scales(quantize_static(model, [x], "w8a8-tt+res"))
    for row in record.summary()["blocks"]:
        sites = [one["scale"] for site, one in scales.items() if one["kind"] == "stream" and row["name"] in site]
        assert len(sites) == 2
        assert sites[-1] == pytest.approx(row["peak_abs"] / 127, rel=1e-6)


def test_the_attention_pool_of_siglip_is_named_where_it_cannot_take_part():
    model = make("siglip", vision_use_head=True)
    report = patch_fp8(model, Fp8Recipe(backend="emulated"))
    assert "head.attention is a torch.nn.MultiheadAttention" in report.skipped["head.attention.in_proj_weight"]
    assert "14 linear layers converted, 2 Linear layers skipped" in str(report)
    with pytest.raises(RuntimeError, match=r"'head.attention' is a torch.nn.MultiheadAttention"):
        quantize_static(make("siglip", vision_use_head=True), [images()], "w8a8-tt")


def planted(name):
    """A model in float64 with one channel of its stream far above the others."""
    model = make(name).double()
    (stem,) = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    stem.bias.data[3] += 40
    return model


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_a_classifier_is_rotated_without_outliers_and_with_the_same_logits(name):
    model, x = planted(name), images().double()
    with torch.no_grad():
        before = answer(model(x))
        report = rotate(model, calibration_batches=[x])
        assert torch.allclose(answer(model(x)), before, rtol=1e-9, atol=1e-9)
    assert report.output_error < 1e-9
    blocks = [site for site in report.sites if site.name in find_blocks(model)]
    assert len(blocks) == 2
    assert all(site.after.peak_abs < 0.6 * site.before.peak_abs for site in blocks)


@pytest.mark.parametrize("name", ["dinov3", "siglip"])
def test_features_are_rotated_on_request_and_taken_back(name):
    model, x = planted(name), images().double()
    with pytest.raises(ValueError, match="no head"):
        rotate(model)
    with pytest.raises(ValueError, match="is no model of timm, and takes no head"):
        add_feature_head(model)
    with torch.no_grad():
        before = answer(model(x))
        report = rotate(model, calibration_batches=[x], allow_rotated_features=True)
        features = RotatedFeatures(report.rotations, report.norms).unrotate(answer(model(x)))
    assert torch.allclose(features, before, rtol=1e-9, atol=1e-9)
    blocks = [site for site in report.sites if site.name in find_blocks(model)]
    assert all(site.after.peak_abs < 0.6 * site.before.peak_abs for site in blocks)


def test_a_rotation_is_a_suffix_of_a_scheme_here_too():
    model, x = planted("vit").float(), images()
    plain, rotated = (quantize_static(model, [x], scheme) for scheme in ("w8a8-tt+res", "w8a8-tt+res+rotr"))
    errors = [fidelity(model, quantized, x)["relative_error"] for quantized in (plain, rotated)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("name", "sizes", "reason"),
    [
        ("clip", {}, "pre_layrnorm stands before the blocks"),
        ("swin", {}, r"streams of several widths \(16, 32\)"),
        ("siglip", {"vision_use_head": True}, r"head \(SiglipMultiheadAttentionPoolingHead\) reads the last norm"),
    ],
)
def test_what_cannot_be_rotated_is_refused_by_the_part_that_forbids_it(name, sizes, reason):
    with pytest.raises(ValueError, match=reason):
        describe_stream(make(name, **sizes))
