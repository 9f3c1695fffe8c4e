from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tests.models import VIT, tiny_vit
from tests.quant.families import FAMILIES, make_images, make_model
from tweo_timm import patch_fp8, rotate
from tweo_timm.blocks import find_blocks
from tweo_timm.quant.quantizer import QuantizedLayer, Quantizer
from tweo_timm.quant.static import quantization_scales, quantize_static


def relative_error(a, b):
    return float((a - b).norm() / b.norm())


class Int8Layer(nn.Module):
    """Real integer arithmetic: int8 operands, int32 products and sums, in NumPy."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer = self.layer
        step = layer.input_quantizer.scale.numpy()
        x_int = np.clip(np.rint(x.numpy() / step), -127, 127).astype(np.int8)
        weight = layer.weight_int.numpy()
        if layer.geometry is not None:  # a patch embedding: stride equals kernel
            batch, channels, height, width = x_int.shape
            k = weight.shape[-1]
            patches = x_int.reshape(batch, channels, height // k, k, width // k, k).transpose(0, 2, 4, 1, 3, 5)
            sums = patches.reshape(batch, height // k, width // k, -1).astype(np.int32) @ weight.reshape(
                len(weight), -1
            ).T.astype(np.int32)
        else:
            sums = x_int.astype(np.int32) @ weight.T.astype(np.int32)
        assert sums.dtype == np.int32
        y = sums * (step * layer.weight_scale.numpy()) + (0 if layer.bias is None else layer.bias.numpy())
        y = torch.from_numpy(y.astype(np.float32))
        return y.permute(0, 3, 1, 2) if layer.geometry is not None else y


@pytest.mark.parametrize("scheme", ["w8a8-tt", "w8a8-ct+res"])
def test_fake_quantization_equals_a_run_with_int8_operands_and_int32_sums(scheme):
    model, images = make_model("vit"), make_images("vit", 64)
    quantized = quantize_static(model, [images], scheme)
    integer = copy.deepcopy(quantized)
    for parent in list(integer.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLayer):
                setattr(parent, name, Int8Layer(child))
    with torch.no_grad():
        fake, real = quantized(images), integer(images)
    assert torch.equal(fake.argmax(1), real.argmax(1))
    assert relative_error(fake, real) < 1e-5


def test_the_residual_stream_of_a_vit_block_equals_the_block_written_out():
    model, images = make_model("vit"), make_images("vit")
    quantized = quantize_static(model, [images], "w8a8-tt+res")
    seen = {}
    block = quantized.blocks[0]
    handle = quantized.patch_embed.register_forward_hook(lambda m, a, out: seen.update(embedded=out))
    handle2 = block.register_forward_hook(lambda m, a, out: seen.update(out=out))
    with torch.no_grad():
        quantized(images)
        steps = quantization_scales(quantized)
        x = torch.cat([quantized.cls_token.expand(4, -1, -1), seen["embedded"]], 1) + quantized.pos_embed

        def integers(x, site):
            return np.clip(np.rint(x.numpy() / np.float32(steps[f"blocks.0.{site}"]["scale"])), -127, 127)

        def rounded(x, site):
            return torch.from_numpy(integers(x, site) * np.float32(steps[f"blocks.0.{site}"]["scale"])).float()

        handle.remove(), handle2.remove()
        # The branches run outside the block, so nothing but the arithmetic written here rounds the stream.
        x = rounded(x + block.attn(block.norm1(x)), "add0")
        last = x + block.mlp(block.norm2(x))
    assert set(steps) >= {"blocks.0.add0", "blocks.0.add1", "blocks.1.add0", "blocks.1.add1"}
    assert np.array_equal(integers(seen["out"], "add1"), integers(last, "add1"))
    assert np.abs(integers(last, "add1")).max() >= 120


def test_attention_operands_are_rounded():
    model, images = make_model("vit"), make_images("vit")
    quantized = quantize_static(model, [images], "w8a8-tt+attn")
    scales = quantization_scales(quantized)
    attention = quantized.blocks[0].attn
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(3))
    seen = {}
    attention.proj.register_forward_hook(lambda m, args, out: seen.update(core=args[0]))
    handles = [attention.register_forward_pre_hook(lambda m, args: (x,))]  # a known input, inside the running block
    with torch.no_grad():
        quantized(images[:2])
        handles[0].remove()
        q, k, v = attention.qkv(x).reshape(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
        step = {site: scales[f"blocks.0.{site}"]["scale"] for site in ("product0_left", "product0_right")}
        step |= {site: scales[f"blocks.0.{site}"]["scale"] for site in ("product1_left", "product1_right")}
        grid = {
            site: (lambda t, s=s: (t / np.float32(s)).round().clamp(-127, 127) * np.float32(s))
            for site, s in step.items()
        }
        scores = grid["product0_left"](q * 16**-0.5) @ grid["product0_right"](k.transpose(-2, -1))
        core = grid["product1_left"](scores.softmax(-1)) @ grid["product1_right"](v)
    torch.testing.assert_close(seen["core"], core.transpose(1, 2).reshape(2, 17, 32), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_quantized_completely_and_stays_close_at_8_bits(family):
    model, images = make_model(family), make_images(family, 4)
    before = copy.deepcopy(model.state_dict())
    quantized = quantize_static(model, [images], "w8a8-ct+res+attn")
    leftover = [
        n for n, m in quantized.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m.weight is not None
    ]
    scales = quantization_scales(quantized)
    with torch.no_grad():
        expected, got = model(images), quantized(images)
        single = torch.cat([quantized(image[None]) for image in images])
    assert leftover == []
    for name in find_blocks(model):  # every block of every family adds to its stream twice, or more
        assert sum(site.startswith(name + ".add") for site in scales) >= 2, name
        assert sum(site.startswith(name + ".product") for site in scales) >= 4, name
    assert 1e-4 < relative_error(got, expected) < 0.1
    assert relative_error(single, got) < 1e-2  # float noise of norms can move single values by a step
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    json.dumps(scales)


@pytest.mark.parametrize("family", ["vit", "swinv2", "maxvit", "beit"])
def test_dynamic_scales_work_in_every_layout_and_need_no_range(family):
    model, images = make_model(family), make_images(family, 4)
    quantized = quantize_static(model, [images[:2]], "w8a8-ck+res+attn")
    scales = quantization_scales(quantized)
    assert all(scale.get("input_scale") is None and scale.get("scale") is None for scale in scales.values())
    with torch.no_grad():
        assert relative_error(quantized(images), model(images)) < 0.1


def test_fewer_bits_lose_more():
    model, images = make_model("vit"), make_images("vit", 8)
    with torch.no_grad():
        y = model(images)
        errors = [relative_error(quantize_static(model, [images], f"w{b}a{b}-tt")(images), y) for b in (8, 6, 4)]
    assert errors[0] < errors[1] / 2 < errors[2] / 4


def test_a_massive_activation_costs_resolution_in_the_stream_only():
    model, images = make_model("vit"), make_images("vit", 8)
    with torch.no_grad():
        model.pos_embed[0, 1, 7] = 300.0
        y = model(images)
        plain = relative_error(quantize_static(model, [images], "w8a8-tt")(images), y)
        stream = relative_error(quantize_static(model, [images], "w8a8-tt+res")(images), y)
    assert stream > 5 * plain


def test_scales_do_not_depend_on_how_calibration_is_batched():
    model, images = make_model("swin"), make_images("swin", 8)
    whole = quantization_scales(quantize_static(model, [images], "w8a8-tt+res"))
    parts = quantization_scales(quantize_static(model, (part for part in images.split(3)), "w8a8-tt+res"))
    assert whole.keys() == parts.keys()
    for name, scale in whole.items():
        key = "input_scale" if "input_scale" in scale else "scale"
        assert parts[name][key] == pytest.approx(scale[key], rel=1e-6)


def test_calibrated_scales_are_the_largest_magnitudes_of_the_float_model():
    model, images = make_model("deit3"), make_images("deit3")
    peaks = {}
    model.blocks[1].mlp.fc1.register_forward_pre_hook(lambda m, args: peaks.update(fc1=args[0].abs().max()))
    model.blocks[1].register_forward_hook(lambda m, args, out: peaks.update(out=out.abs().max()))
    with torch.no_grad():
        model(images)
    scales = quantization_scales(quantize_static(model, [images], "w8a6-tt+res"))
    assert scales["blocks.1.mlp.fc1"]["input_scale"] == pytest.approx(float(peaks["fc1"]) / 31, rel=1e-5)
    assert scales["blocks.1.add1"]["scale"] == pytest.approx(float(peaks["out"]) / 31, rel=1e-5)


def test_a_copy_of_the_quantized_model_runs_on_its_own_quantizers():
    model, images = make_model("vit"), make_images("vit")
    quantized = quantize_static(model, [images], "w8a8-tt+res")
    expected = quantized(images)
    twin = copy.deepcopy(quantized)
    for module in twin.modules():
        if isinstance(module, Quantizer):
            module.scale.mul_(50)
    assert not torch.equal(twin(images), expected)
    assert torch.equal(quantized(images), expected)


def test_the_quantized_model_survives_torch_export():
    model, images = make_model("vit"), make_images("vit", 2)
    quantized = quantize_static(model, [images], "w8a8-tt+res+attn")
    exported = torch.export.export(quantized, (images,), strict=False)
    torch.testing.assert_close(exported.module()(images), quantized(images), rtol=1e-4, atol=1e-4)


def test_an_exception_inside_a_block_leaves_no_interception_behind():
    model, images = make_model("vit"), make_images("vit", 2)
    quantized = quantize_static(model, [images], "w8a8-tt+res")
    expected = quantized(images)

    def fail(*_):
        raise KeyError("interrupted")

    handle = quantized.blocks[0].mlp.register_forward_hook(fail)
    with pytest.raises(KeyError, match="interrupted"):
        quantized(images)
    handle.remove()
    a = torch.full((2,), 0.1)
    assert torch.equal(a + a, torch.full((2,), 0.2))
    assert torch.equal(quantized(images), expected)


class Gated(nn.Module):
    """A block whose control flow depends on its input, an MLP, and one projection that may be read past its module."""

    def __init__(self, past: bool) -> None:
        super().__init__()
        self.qkv, self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.past = past

    def forward(self, x):
        a = F.linear(x, self.qkv.weight) if self.past else self.qkv(x)
        if x.shape[1] > 3:
            a = a + a
        return x + self.fc2(self.fc1(a))


class Toy(nn.Module):
    def __init__(self, past: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Gated(past)])
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.blocks[0](x)


def test_control_flow_that_differs_from_calibration_is_an_error(caplog):
    with caplog.at_level(logging.WARNING):
        quantized = quantize_static(Toy(), [torch.randn(2, 3, 8)], "w8a8-tt+res", blocks=r"blocks\.\d+")
    assert "unused" in caplog.text
    quantized(torch.randn(5, 3, 8))
    with pytest.raises(RuntimeError, match=r"'blocks.0' executed 2 additions.* 1 and 0 while calibrating"):
        quantized(torch.randn(5, 4, 8))


def test_a_weight_read_past_its_layer_is_an_error():
    with pytest.raises(RuntimeError, match=r"blocks.0.qkv"):
        quantize_static(Toy(past=True), [torch.randn(2, 3, 8)], "w8a8-tt", blocks=r"blocks\.\d+")


def test_what_cannot_be_quantized_is_refused_with_its_name():
    model, images = make_model("vit"), make_images("vit")
    with pytest.raises(ValueError, match="at least one image"):
        quantize_static(model, [], "w8a8-tt")
    with pytest.raises(ValueError, match=r"layer 'patch_embed.proj'.*nan"):
        quantize_static(model, [torch.full_like(images, float("nan"))], "w8a8-tt")
    with pytest.raises(ValueError, match="no quantized layer"):
        quantization_scales(model)
    toy = Toy()
    toy.attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(RuntimeError, match="MultiheadAttention"):
        quantize_static(toy, [torch.randn(2, 3, 8)], "w8a8-tt", blocks=r"blocks\.\d+")
    with pytest.raises(TypeError, match="Sequential"):
        quantize_static(nn.Sequential(Toy()), [torch.randn(2, 3, 8)], "w8a8-tt+res", blocks=r"0\.blocks\.\d+")


def test_attention_that_hides_its_products_is_refused():
    class Fused(Gated):
        def forward(self, x):
            return x + F.scaled_dot_product_attention(x, x, x) + self.fc2(self.fc1(self.qkv(x)))

    toy = Toy()
    toy.blocks[0] = Fused(past=False)
    with pytest.raises(
        ValueError, match=r"'blocks.0': scaled_dot_product_attention multiplies activations out of sight"
    ):
        quantize_static(toy, [torch.randn(2, 3, 8)], "w8a8-tt+attn", blocks=r"blocks\.\d+")


def test_a_model_that_is_quantized_or_in_fp8_already_is_refused():
    model, images = make_model("vit"), make_images("vit")
    with pytest.raises(ValueError, match="quantized already"):
        quantize_static(quantize_static(model, [images], "w8a8-tt"), [images], "w4a4-tt+res")
    patch_fp8(model)
    with pytest.raises(ValueError, match="unpatch_fp8"):
        quantize_static(model, [images], "w8a8-tt")


def test_what_a_model_does_in_its_first_forward_only_shifts_no_scale():
    """ConViT computes relative positions once, with an addition that no later forward has."""
    kwargs = {**VIT, "local_up_to_layer": 1}
    torch.manual_seed(0)
    fresh = timm.create_model("convit_tiny", num_classes=3, **kwargs).eval()
    images = torch.randn(8, 3, 32, 32)
    used = copy.deepcopy(fresh)
    used(images)
    batches = list(images.split(4))
    expected, found = (quantize_static(model, batches, "w8a8-tt+res") for model in (used, fresh))
    assert quantization_scales(found) == quantization_scales(expected)
    assert torch.equal(found(images), expected(images))


@pytest.mark.parametrize(
    ("batches", "part"),
    [
        ([(torch.zeros(2, 3, 32, 32), torch.zeros(2))], "a tuple, .* pass \\[images for images, _ in loader\\]"),
        ([{"pixel_values": torch.zeros(2, 3, 32, 32)}], "a dict, .* pass batches of images"),
    ],
)
def test_what_is_no_batch_of_images_is_refused_with_the_remedy(batches, part):
    with pytest.raises(ValueError, match=part):
        quantize_static(tiny_vit(), batches, "w8a8-tt")
    with pytest.raises(ValueError, match=part):
        rotate(tiny_vit(), "random", batches)


def test_one_tensor_is_one_batch():
    model, images = tiny_vit().eval(), torch.randn(2, 3, 32, 32)
    alone, listed = (quantize_static(model, given, "w8a8-tt")(images) for given in (images, [images]))
    assert torch.equal(alone, listed)
