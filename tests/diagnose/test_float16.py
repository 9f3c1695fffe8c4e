"""float16 readings against float16 itself: what a half-precision module and half-precision sums make infinite."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tests.quant.families import FAMILIES, make_images, make_model
from tweo_timm import rotate
from tweo_timm.diagnose.float16 import LOGITS, SQUARES, SUMS, VALUES, float16_readings
from tweo_timm.rewrite.change import generated_images

BLOCK = {"vit": "blocks.1", "swin": "layers.1.blocks.0"}
NORM = {"vit": "blocks.1.norm1", "swin": "layers.1.blocks.1.norm1"}


def inputs_of(model, names, images):
    """What enters the named modules, float32."""
    seen = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        model(images)
    return seen


def factors(readings, reading):
    return {site.name: site.factor for site in readings.sites[reading]}


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("planted", [0.0, 6e4, 7e4])
def test_a_site_overflows_where_a_half_precision_module_does(family, planted):
    model, images = make_model(family), make_images(family)
    with torch.no_grad():
        model.get_submodule(f"{BLOCK[family]}.mlp.fc2").bias[3] = planted
    readings, infinite = float16_readings(model, [images]), {}
    half = copy.deepcopy(model).half()
    linear = {name: layer for name, layer in half.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in linear.items():
        layer.register_forward_hook(lambda m, a, y, name=name: infinite.update({name: not bool(y.isfinite().all())}))
    with torch.no_grad():
        half(images.half())
    begun = [site.name for site in readings.overflowing(VALUES)]
    assert begun[:2] == ([f"{BLOCK[family]}.mlp.fc2", BLOCK[family]] if planted == 7e4 else [])
    if planted < 7e4:  # behind an infinity everything is one
        assert {name: factor < 1 for name, factor in factors(readings, VALUES).items() if name in linear} == infinite
    if planted:
        assert factors(readings, VALUES)[f"{BLOCK[family]}.mlp.fc2"] == pytest.approx(65504 / planted, rel=1e-3)


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("planted", [200.0, 290.0])
def test_squares_overflow_where_float16_squares_do(family, planted):
    model, images = make_model(family), make_images(family)
    with torch.no_grad():
        model.get_submodule(f"{BLOCK[family]}.mlp.fc2").bias[3] = planted
    found = factors(float16_readings(model, [images]), SQUARES)
    entered = inputs_of(copy.deepcopy(model), found, images)
    for name, x in entered.items():
        centred = (x - x.mean(-1, keepdim=True)).numpy().astype(np.float16)
        with np.errstate(over="ignore"):
            assert bool(np.isinf(centred * centred).any()) == (found[name] < 1)
    assert any(factor < 1 for factor in found.values()) == (planted == 290)


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_sums_overflow_where_a_float16_sum_of_squares_does(family, factor):
    model, images = make_model(family), make_images(family)
    name = NORM[family]
    own = factors(float16_readings(model, [images]), SUMS)[name]
    block = model.get_submodule(name.rpartition(".")[0])
    block.register_forward_pre_hook(lambda m, args: (args[0] * (own / factor), *args[1:]))
    found = factors(float16_readings(model, [images]), SUMS)[name]
    assert found == pytest.approx(factor, rel=1e-3)
    x = inputs_of(copy.deepcopy(model), [name], images)[name]
    squares = ((x - x.mean(-1, keepdim=True)).numpy().astype(np.float16)) ** 2
    with np.errstate(over="ignore"):
        while squares.shape[-1] > 1:  # pairs, so that no summand is lost beside a large sum
            half = squares.shape[-1] // 2
            squares = squares[..., :half] + squares[..., half:]
    assert bool(np.isinf(squares).any()) == (factor < 1)


@pytest.mark.parametrize("family", ["vit", "swin", "cait"])
def test_logits_are_read_whether_attention_is_fused_or_not(family):
    model, images = make_model(family), make_images(family)
    found = {}
    for fused in (True, False):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        found[fused] = factors(float16_readings(model, [images]), LOGITS)
    assert found[True] == pytest.approx(found[False], rel=1e-4)
    assert len(found[True]) == len([name for name, m in model.named_modules() if name.endswith("attn")])


def test_large_logits_are_named_and_are_no_stored_values():
    model, images = make_model("vit"), make_images("vit")
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[:64] *= 400
    readings = float16_readings(model, [images])
    assert [site.name for site in readings.overflowing(LOGITS)] == ["blocks.1.attn"]
    assert not readings.overflowing(VALUES)


def test_a_rotation_mends_values_and_squares_and_no_sum():
    model, images = make_model("vit"), make_images("vit")
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias[3] = 1000.0
    before = float16_readings(model, [images])
    rotate(model, "random")
    after = float16_readings(model, [images])
    assert after.headroom(SQUARES) > 1.5 * before.headroom(SQUARES)
    assert after.headroom(SUMS) == pytest.approx(before.headroom(SUMS), rel=1e-3)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_read_and_left_as_it_was(family):
    model = make_model(family).train()
    readings = float16_readings(model, [make_images(family, 2)])
    assert all(readings.headroom(reading) > 1 for reading in (VALUES, LOGITS, SQUARES, SUMS))
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_images_of_several_sizes_are_read_together():
    model = make_model("vit", dynamic_img_size=True)
    sizes = [generated_images(model), torch.randn(1, 3, 64, 64)]
    apart = [float16_readings(model, [images]).headroom(VALUES) for images in sizes]
    assert float16_readings(model, sizes).headroom(VALUES) == min(apart)
    with pytest.raises(ValueError, match="at least one image"):
        float16_readings(model, [])
