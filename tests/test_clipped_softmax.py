"""Clipped softmax against its equations in float64, and in everything that a trained model goes through."""

import copy
import math

import pytest
import timm
import torch

from tests.models import BUILDERS, batch, tiny_swin, tiny_vit
from tweo_timm import quantize_static, rotate
from tweo_timm.clipped_softmax import ClippedDropout, alpha_of, clip_softmax
from tweo_timm.diagnose.random_init import random_model
from tweo_timm.quant.export import export_onnx
from tweo_timm.quant.onnx_file import OnnxModel

ALPHA = 0.7


def probabilities(logits, alpha):
    """The paper's formula, zeta = 1, from exponentials."""
    powers = (logits - logits.amax(-1, keepdim=True)).exp()
    gamma = -alpha / logits.shape[-1]
    stretched = (1 - gamma) * powers / powers.sum(-1, keepdim=True) + gamma
    return torch.where(stretched > 0, stretched, torch.zeros_like(stretched))


def attention(layer, x_bnc, alpha, mask=None):
    """What timm's Attention and WindowAttention compute, written out; mask is (windows, N, N)."""
    batch, tokens, width = x_bnc.shape
    heads = layer.num_heads
    qkv = x_bnc @ layer.qkv.weight.T + layer.qkv.bias
    q, k, v = qkv.reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-2, -1) / math.sqrt(width // heads)
    if hasattr(layer, "relative_position_bias_table"):
        table = layer.relative_position_bias_table[layer.relative_position_index.reshape(-1)]
        logits = logits + table.reshape(tokens, tokens, heads).permute(2, 0, 1)
    if mask is not None:
        logits = logits + mask.repeat(batch // len(mask), 1, 1).unsqueeze(1)
    mixed = (probabilities(logits, alpha) @ v).transpose(1, 2).reshape(batch, tokens, width)
    return mixed @ layer.proj.weight.T + layer.proj.bias


def sharpened(model):
    """Attention of some contrast, as a trained model's: some of it is clipped, and some is not."""
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "qkv"):
                module.qkv.weight.mul_(8)
                module.qkv.bias.normal_(std=0.3)
    return model


@pytest.mark.parametrize("family", ["vit", "swin", "swin, masked"])
def test_forward_and_gradients_are_those_of_the_formula(family):
    model = sharpened(BUILDERS[family.split(",")[0]]().double())
    plain = next(module for module in model.modules() if hasattr(module, "attn_drop"))
    layer = copy.deepcopy(plain)
    clip_softmax(layer, ALPHA)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, plain.qkv.in_features, generator=generator, dtype=torch.float64)
    masks = {}
    if "masked" in family:
        banned = torch.rand(2, 16, 16, generator=generator, dtype=torch.float64) > 0.5
        masks = {"mask": torch.where(banned & ~torch.eye(16, dtype=torch.bool), -torch.inf, 0.0)}
    upstream = torch.randn(4, 16, plain.qkv.in_features, generator=generator, dtype=torch.float64)
    found, wanted = layer(x, **masks), attention(plain, x, ALPHA, **masks)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(found, plain(x, **masks), rtol=1e-3)
    found.backward(upstream)
    wanted.backward(upstream)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(layer.get_parameter(name).grad, parameter.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_names_and_weights_stay_and_0_changes_nothing(family):
    model, images = BUILDERS[family]().eval(), batch()[0]
    clipped = copy.deepcopy(model)
    clip_softmax(clipped, 0)
    assert torch.equal(clipped(images), model(images))
    clip_softmax(clipped, ALPHA)
    assert clipped.state_dict().keys() == model.state_dict().keys()
    assert (alpha_of(model), alpha_of(clipped)) == (0, ALPHA)
    assert not torch.equal(clipped(images), model(images))


def test_probabilities_reach_zero_stay_in_bounds_in_half_precision_and_are_dropped_as_before():
    layer = ClippedDropout(4.0, p=0.5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = torch.tensor([[1.0, 0, 0], [0.4, 0.35, 0.25]], dtype=dtype)
        kept = layer.eval()(given)
        assert float(kept.max()) <= 1
        assert float(kept.min()) == 0
    dropped = layer.train()(torch.eye(1000))
    assert {round(value, 4) for value in dropped.diagonal().tolist()} == {0, 2}


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "resnet10t", "vit_base_patch16_siglip_224"])
def test_other_attention_is_refused_by_its_class(name):
    small = {} if name.startswith("resnet") else {"depth": 1, "embed_dim": 32, "num_heads": 2}
    model = timm.create_model(name, **small)
    with pytest.raises(ValueError, match=r"(is not known|no attention): clipped softmax is for ViT and Swin"):
        clip_softmax(model, 1.0)
    assert alpha_of(model) == 0


@pytest.mark.parametrize("builder", [tiny_vit, tiny_swin])
def test_copies_quantized_models_and_random_arms_stay_clipped(builder):
    model, images = sharpened(builder()).eval(), batch(8)[0]
    clip_softmax(model, ALPHA)
    assert alpha_of(quantize_static(model, [images], "w8a8-tt+res+attn")) == ALPHA
    quantized = quantize_static(model, [images], "w8a8-tt")
    assert (quantized(images) - model(images)).norm() / model(images).norm() < 0.1
    assert alpha_of(random_model(model, seed=0)[0]) == ALPHA


def test_a_random_arm_that_timm_creates_is_clipped_too():
    model = timm.create_model("test_vit")
    clip_softmax(model, ALPHA)
    fresh, how, _ = random_model(model, seed=0)
    assert (how, alpha_of(fresh)) == ("created", ALPHA)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript.*")
@pytest.mark.parametrize("target", ["qdq", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_an_exported_file_computes_it(target, tmp_path):
    pytest.importorskip("onnxruntime")
    model, images = sharpened(tiny_vit(depth=1)).eval(), batch(8)[0]
    clip_softmax(model, ALPHA)
    quantized = quantize_static(model, [images], "w8a8-tt")
    export_onnx(quantized, tmp_path / "model.onnx", images, target=target)
    logits = OnnxModel(tmp_path / "model.onnx")(images)
    assert (logits - quantized(images)).norm() / quantized(images).norm() < 0.02


@pytest.mark.parametrize("builder", [tiny_vit, tiny_swin])
def test_a_rotation_is_exact_with_it(builder):
    model = sharpened(builder()).eval()
    clip_softmax(model, ALPHA)
    assert rotate(model).output_error < 1e-5
    assert alpha_of(model) == ALPHA
