"""The parts of a repair, each exact by itself."""

import copy

import pytest
import torch

from tests.rewrite.families import FAMILIES, make_images, make_model
from tests.rewrite.test_rotate import relative
from tweo_timm import rotate
from tweo_timm.rewrite.center import center
from tweo_timm.rewrite.head import add_feature_head
from tweo_timm.rewrite.shift import shift_norms
from tweo_timm.rewrite.values import rotate_values


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


@pytest.mark.parametrize("family", FAMILIES)
def test_rotated_values_compute_the_same(family):
    model, images = make_model(family), make_images(family)
    original = copy.deepcopy(model)
    rotated = rotate_values(model, seed=1)
    assert relative(original, model, images) < 1e-12
    assert rotated or "differential" in family or "parallel scaling" in family
    for name in rotated:
        before, after = (m.get_submodule(name).weight for m in (original, model))
        assert float((before - after).detach().norm() / before.detach().norm()) > 0.3, name


@pytest.mark.parametrize("family", ["dinov2", "swin", "cait", "dinov3"])
def test_shifted_norms_are_centred_on_their_range_and_compute_the_same(family):
    model, images = make_model(family), make_images(family)
    original, seen = copy.deepcopy(model), {}
    shifted = shift_norms(model, [images[:2], images[2:]])
    assert "blocks.0.norm1" not in shifted or family != "dinov3"  # no bias behind it could take the shift
    for name in shifted:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output.flatten(0, -2)})
        )
    assert relative(original, model, images) < 1e-12
    for name, output in seen.items():
        assert torch.allclose(output.amax(0), -output.amin(0), atol=1e-9), name
    assert len(seen) == len(shifted) > 0


def test_grouped_keys_share_their_rotation():
    sizes = {"embed_dim": 32, "qkv_fused": False, "num_kv_heads": 2, "num_heads": 4, "attn_type": "rope"}
    model, images = make_model("eva with plain attention", **sizes), make_images("eva with plain attention")
    original = copy.deepcopy(model)
    assert len(rotate_values(model)) == 2
    assert relative(original, model, images) < 1e-12
    rotate(model)
    assert relative(original, model, images) < 1e-12
