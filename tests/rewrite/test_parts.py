"""The parts of a repair, each exact by itself."""

import copy

import pytest
import torch

from tests.rewrite.families import make_images, make_model
from tests.rewrite.test_rotate import relative
from tweo_timm import rotate
from tweo_timm.rewrite.center import center
from tweo_timm.rewrite.head import add_feature_head


@pytest.mark.parametrize(
    ("family", "centred"),
    [
        ("dinov2", ["blocks"]),
        ("eva02 base", ["blocks"]),
        ("cait", ["blocks"]),
        ("swin", ["layers.2"]),
        ("vit with RmsNorm", []),
        ("vit without a last norm", []),
    ],
)
def test_a_centred_stream_has_no_mean_and_computes_the_same(family, centred):
    model, images = make_model(family), make_images(family)
    original, means = copy.deepcopy(model), {}
    assert center(model) == centred
    for name in centred:
        block = (model.blocks if name == "blocks" else model.layers[2].blocks)[-1]
        block.register_forward_hook(lambda module, args, output: means.update(mean=output.mean(-1).abs().max()))
    assert relative(original, model, images) < 1e-12
    assert all(float(mean) < 1e-12 for mean in means.values())


@pytest.mark.parametrize("family", ["dinov2", "distilled", "swin", "dinov3", "vit, all tokens", "cait", "beit"])
def test_a_feature_head_returns_the_features_through_a_rotation(family):
    original, images = make_model(family, num_classes=0), make_images(family)
    model = copy.deepcopy(original)
    width = add_feature_head(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    rotate(model)
    assert relative(original, model, images) < 1e-12
    assert width == model.num_classes


def test_a_model_with_a_head_needs_no_other():
    with pytest.raises(ValueError, match="has a head"):
        add_feature_head(make_model("vit"))
    with pytest.raises(ValueError, match="hides the basis"):
        add_feature_head(make_model("siglip without a head"))
