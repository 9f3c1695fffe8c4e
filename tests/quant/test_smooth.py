from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.quant.families import FAMILIES, make_images, make_model
from tweo_timm.quant.smooth import smooth
from tweo_timm.quant.static import quantize_static


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("swinv2", "swinv2_cr")])
def test_smoothing_changes_no_float_output(family):
    model, images = make_model(family), make_images(family)
    with torch.no_grad():
        before = model(images)
        report = smooth(model, [images])
        after = model(images)
    assert report["smoothed"]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


def test_the_readers_of_a_norm_are_found_through_shifts_and_windows():
    model, images = make_model("swin"), make_images("swin")
    report = smooth(model, [images])
    assert report["smoothed"]["layers.0.blocks.1.norm1"] == ["layers.0.blocks.1.attn.qkv"]
    assert report["smoothed"]["layers.0.blocks.1.norm2"] == ["layers.0.blocks.1.mlp.fc1"]
    assert report["smoothed"]["layers.1.downsample.norm"] == ["layers.1.downsample.reduction"]


def test_norms_that_something_else_reads_are_left_alone_and_named():
    report = smooth(make_model("xcit"), [make_images("xcit")])
    assert "conv2d" in report["skipped"]["blocks.0.norm3"]
    assert "cat" in report["skipped"]["cls_attn_blocks.0.norm1"]


def test_factors_are_those_of_the_paper():
    model, images = make_model("vit"), make_images("vit")
    norm, fc1 = model.blocks[0].norm2, model.blocks[0].mlp.fc1
    weight, column = norm.weight.detach().clone(), fc1.weight.detach().abs().amax(0)
    inputs = []
    handle = fc1.register_forward_pre_hook(lambda m, args: inputs.append(args[0].abs().flatten(0, 1).amax(0)))
    with torch.no_grad():
        model(images)
        handle.remove()
        smooth(model, [images], alpha=0.7)
    torch.testing.assert_close(weight / norm.weight, inputs[0] ** 0.7 / column**0.3, rtol=1e-4, atol=0)


def test_smoothing_helps_where_one_channel_towers_over_the_others():
    model, images = make_model("vit"), make_images("vit", 16)
    with torch.no_grad():
        for block in model.blocks:
            block.norm1.weight[3] *= 200
            block.attn.qkv.weight[:, 3] /= 200
        y = model(images)
        plain = (quantize_static(model, [images], "w8a8-ct")(images) - y).norm()
        quantized = quantize_static(model, [images], "w8a8-ct+smooth")
        smoothed = (quantized(images) - y).norm()
    assert smoothed < plain / 3
    assert "blocks.0.norm1" in quantized.quantization["smooth"]["smoothed"]


@pytest.mark.parametrize("family", ["swinv2"])
def test_a_model_without_a_norm_to_smooth_is_refused(family):
    with pytest.raises(ValueError, match="nothing to migrate"):
        smooth(make_model(family), [make_images(family)])


def test_wrong_arguments_are_refused():
    model, images = make_model("vit"), make_images("vit")
    with pytest.raises(ValueError, match="alpha is 2"):
        smooth(model, [images], alpha=2)
    with pytest.raises(ValueError, match="calibration image"):
        smooth(model, [])


class TokenMixer(nn.Module):
    """A Linear over tokens, as many as there are channels: its input features are not the norm's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.bare = nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False)
        self.shared = nn.Linear(4, 4)

    def forward(self, x):
        return self.mix(self.norm(x).transpose(1, 2)) + self.shared(self.bare(x)) + self.shared(x)


def test_a_change_of_the_function_is_noticed():
    with pytest.raises(RuntimeError, match="changed the float model's output"):
        smooth(TokenMixer(), [torch.randn(3, 4, 4) * torch.tensor([1.0, 5.0, 10.0, 50.0])])
