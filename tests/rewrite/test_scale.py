"""Powers of two: the same outputs, and activations smaller by that power where they are asked to be."""

import copy

import pytest
import torch

from tests.quant.families import make_images, make_model
from tweo_timm import record_outliers
from tweo_timm.rewrite.scale import linear_pairs, scale_pairs, scale_stream, stages_of

FAMILIES = ("vit", "deit3", "beit", "eva02", "dinov3", "cait", "swin")


def peaks(model, images):
    with record_outliers(model) as record, torch.no_grad():
        model(images)
    return {block["name"]: block["peak_abs"] for block in record.summary()["blocks"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_times_a_power_of_two_changes_nothing_but_eps(family):
    model, images = make_model(family), make_images(family)
    with torch.no_grad():
        expected, before = model(images), peaks(model, images)
        stages = stages_of(model)
        scale_stream(model, {stage.name: 3 for stage in stages})
        torch.testing.assert_close(model(images), expected, rtol=0.1, atol=2e-2)
        for module in model.modules():
            if hasattr(module, "eps"):
                module.eps /= 64
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    after = peaks(model, images)
    for block in (block for stage in stages for block in stage.blocks):
        assert after[block] == pytest.approx(before[block] / 8, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_power_of_two_between_two_linear_maps_changes_no_output(family):
    model, images = make_model(family), make_images(family)
    expected = model(images)
    before = copy.deepcopy(model.state_dict())
    pairs = linear_pairs(model)
    assert pairs
    scale_pairs(model, dict.fromkeys(pairs, 4))
    torch.testing.assert_close(model(images), expected, rtol=1e-6, atol=1e-7)
    for pair in pairs.values():
        rows = slice(*pair.rows)
        name = f"{pair.writer}.weight"
        assert torch.equal(model.state_dict()[name][rows] * 16, before[name][rows])


def test_an_unnormalized_output_keeps_its_scale():
    model = make_model("vit")
    model.reset_classifier(0)
    model.norm = torch.nn.Identity()
    model.fc_norm = torch.nn.Identity()
    with pytest.raises(ValueError, match="model's output"):
        scale_stream(model, {"blocks": 1})
