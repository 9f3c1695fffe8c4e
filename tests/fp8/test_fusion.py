"""Which norms may be fused: checked against what the norm's output really feeds."""

from functools import partial

import pytest
import timm
import torch
from torch import nn

from tests.models import SWIN, SWIN_ARCH, VIT, VIT_ARCH, tiny_swin, tiny_vit
from tweo_timm.fp8.fusion import is_plain_norm, mlp_names, norm_linear_pairs

FINE = {"patch_size": 2, "embed_dim": 32}


@pytest.mark.parametrize(
    ("name", "kwargs", "count"),
    [(VIT_ARCH, VIT, 4), ("deit3_small_patch16_224", VIT, 4), (SWIN_ARCH, {**SWIN, **FINE}, 3)],
)
def test_fused_norm_feeds_its_linear_layer_directly_and_nothing_else(name, kwargs, count):
    model = timm.create_model(name, **kwargs)
    pairs = norm_linear_pairs(model)
    assert len(pairs) == count
    for norm_name, linear_name in pairs:
        seen, consumers = {}, []

        def keep(module, args, output, seen=seen):
            seen["output"] = output

        def compare(module, args, seen=seen, consumers=consumers):
            if "output" in seen and args and args[0] is seen["output"]:
                consumers.append(module)

        handles = [model.get_submodule(norm_name).register_forward_hook(keep)]
        handles += [m.register_forward_pre_hook(compare) for m in model.modules() if not list(m.children())]
        model(torch.randn(1, 3, 32, 32))
        assert consumers == [model.get_submodule(linear_name)]
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_blocks_that_were_not_read_are_not_fused(name):
    assert norm_linear_pairs(timm.create_model(name, **VIT)) == []


def test_swins_first_norm_is_not_fused_because_windows_may_be_padded_after_it():
    pairs = norm_linear_pairs(tiny_swin(**FINE))
    assert not any(norm.endswith("norm1") for norm, _ in pairs)


@pytest.mark.parametrize("act_layer", [partial(nn.GELU, approximate="tanh"), "gelu_tanh"])
def test_whole_mlp_is_fused_for_the_tanh_gelu_only(act_layer):
    assert mlp_names(tiny_vit()) == []
    tanh = tiny_vit(act_layer=act_layer)
    assert mlp_names(tanh) == [("blocks.0.norm2", "blocks.0.mlp"), ("blocks.1.norm2", "blocks.1.mlp")]
    with_dropout = tiny_vit(act_layer=act_layer, proj_drop_rate=0.1)
    assert mlp_names(with_dropout) == []


def test_norm_without_weight_or_bias_is_not_plain():
    assert is_plain_norm(nn.LayerNorm(8))
    assert not is_plain_norm(nn.LayerNorm(8, elementwise_affine=False))
    assert not is_plain_norm(nn.LayerNorm((4, 8)))
    assert not is_plain_norm(nn.Identity())
