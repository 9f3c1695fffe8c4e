from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from tests.quant.families import make_images, make_model
from tweo_timm.layers import call_projections
from tweo_timm.quant.compensate import compensate, fold_compensation
from tweo_timm.quant.compensation import Fit
from tweo_timm.quant.quantizer import QuantizedLayer
from tweo_timm.quant.scheme import SUFFIXES, Suffix
from tweo_timm.quant.static import quantization_scales, quantize_static
from tweo_timm.quant.stream import StreamQuantizer
from tweo_timm.tables import Entry, register


def outputs_of(model, name, images):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, out: seen.append((a[0], out)))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0]


def error(a, b):
    return float((a - b).double().square().sum())


def test_the_first_layer_gets_the_gain_and_shift_of_a_least_squares_reference():
    model, images = make_model("vit"), make_images("vit", 16)
    plain = quantize_static(model, [images], "w4a4-tt")
    quantized = quantize_static(model, [images[:5], images[5:]], "w4a4-tt+qwt")
    fit = [index for index in range(16) if index % 4 != 3]
    y = outputs_of(model, "patch_embed.proj", images)[1][fit].movedim(1, -1).reshape(-1, 32).double().numpy()
    q = outputs_of(plain, "patch_embed.proj", images)[1][fit].movedim(1, -1).reshape(-1, 32).double().numpy()
    layer = quantized.patch_embed.proj.compensation
    kept = 0
    for channel in range(32):
        (gain, shift), *_ = np.linalg.lstsq(np.stack([q[:, channel], np.ones(len(q))], 1), y[:, channel], rcond=None)
        if layer.gain[channel] != 1:
            kept += 1
            assert float(layer.gain[channel]) == pytest.approx(gain, rel=1e-4)
            assert float(layer.shift[channel]) == pytest.approx(shift, abs=1e-4)
    row = quantized.quantization["compensation"][0]
    assert row["name"] == "patch_embed.proj"
    assert row["channels_kept"] == kept > 16
    json.dumps(quantized.quantization)


def test_later_layers_are_fitted_on_what_compensated_layers_deliver():
    model, images = make_model("vit"), make_images("vit", 16)
    quantized = quantize_static(model, [images], "w4a4-tt+qwt")
    name = "blocks.1.mlp.fc2"
    layer = quantized.get_submodule(name)
    compensation, layer.compensation = layer.compensation, None
    fit = [index for index in range(16) if index % 4 != 3]
    y = outputs_of(model, name, images)[1][fit].reshape(-1, 32).double().numpy()
    q = outputs_of(quantized, name, images)[1][fit].reshape(-1, 32).double().numpy()  # all earlier ones compensated
    channel = int((compensation.gain != 1).nonzero()[0])
    (gain, shift), *_ = np.linalg.lstsq(np.stack([q[:, channel], np.ones(len(q))], 1), y[:, channel], rcond=None)
    assert float(compensation.gain[channel]) == pytest.approx(gain, rel=1e-3)
    assert float(compensation.shift[channel]) == pytest.approx(shift, abs=1e-3)


# Windows have an image in several rows, BEiT's attention and MaxViT's gates change a layer's output in place, XCiT has
# a layer that no image enters.
HARD = [("swin", "layers.0.blocks.1.attn.qkv"), ("beit", "blocks.0.attn.qkv"), ("xcit", "blocks.1.attn.qkv")]
HARD += [("maxvit", "stages.1.blocks.0.conv.se.fc1")]


@pytest.mark.parametrize(("family", "name"), HARD)
def test_fits_are_those_of_the_whole_models_whatever_happens_inside_and_between_blocks(family, name):
    model, images = make_model(family), make_images(family, 20)
    call_projections(model)
    quantized = quantize_static(model, [images], "w4a4-tt+res+qwt")
    layer = quantized.get_submodule(name)
    fitted, layer.compensation = layer.compensation, None
    pair = []
    for either in (model, quantized):
        handle = either.get_submodule(name).register_forward_hook(lambda m, a, out: pair.append(out.clone()))
        with torch.no_grad():
            either(images)
        handle.remove()
    fit = torch.arange(20) % 4 != 3
    y, q = (x.unflatten(0, (20, -1))[fit].flatten(0, 1).movedim(layer.channel_axis, -1).flatten(0, -2) for x in pair)
    for channel in (fitted.gain != 1).nonzero().flatten().tolist():
        known = np.stack([q[:, channel].double(), np.ones(len(q))], 1)
        (gain, shift), *_ = np.linalg.lstsq(known, y[:, channel].double().numpy(), rcond=None)
        assert float(fitted.gain[channel]) == pytest.approx(gain, rel=1e-4, abs=1e-5)
        assert float(fitted.shift[channel]) == pytest.approx(shift, abs=1e-4)


@pytest.mark.parametrize("kind", ["qwt", "qwtblock"])
def test_inside_blocks_a_few_images_at_a_time_are_enough_for_any_number_of_them(kind):
    model, images = make_model("vit"), make_images("vit", 40)
    quantized = quantize_static(model, [images], "w4a4-tt")
    quantized = quantize_static(model, [images], "w4a4-tt+qwtblock") if kind == "qwtblock" else quantized
    sizes = []
    for either in (model, quantized):
        for name, module in either.named_modules():
            if name.startswith("blocks.") and name.count(".") > 1:
                module.register_forward_hook(lambda m, args, out: sizes.append(len(out)))
    compensate(model, quantized, [images], kind)
    assert max(sizes) == 16


CASES = [("qwt", f) for f in ("vit", "swin", "cait", "beit")] + [
    ("qwtblock", "swin"),
    ("qwtlinear", "swin"),
    ("qwt", "maxvit"),
]


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_compensation_lowers_the_error_of_the_logits_on_other_images(kind, family):
    model, images, others = make_model(family), make_images(family, 32), make_images(family, 16, seed=9)
    with torch.no_grad():
        y = model(others)
        before = error(quantize_static(model, [images], "w4a4-tt+res")(others), y)
        quantized = quantize_static(model, [images], f"w4a4-tt+res+{kind}")
        after = error(quantized(others), y)
    assert after < before * 0.9
    rows = quantized.quantization["compensation"]
    assert any(row["explained"] > 0 for row in rows)
    assert all(row["explained"] >= 0 for row in rows)


def test_folding_moves_the_logits_by_less_than_1e_4_and_leaves_no_operation():
    model, images = make_model("deit3"), make_images("deit3", 16)
    quantized = quantize_static(model, [images], "w4a4-tt+res+qwt")
    with torch.no_grad():
        before = quantized(images)
        integers = quantized.blocks[0].mlp.fc1.weight_int.clone()
        report = fold_compensation(quantized)
        after = quantized(images)
    assert (before - after).abs().max() < 1e-4
    assert torch.equal(quantized.blocks[0].mlp.fc1.weight_int, integers)
    assert "blocks.0.mlp.fc1" in report["folded"]
    assert report["kept"] == []
    assert all(m.compensation is None for m in quantized.modules() if isinstance(m, QuantizedLayer))
    assert len(quantization_scales(quantized)["blocks.0.mlp.fc1"]["weight_scale"]) == 128
    assert min(quantization_scales(quantized)["blocks.0.mlp.fc1"]["weight_scale"]) > 0


def test_folding_reports_the_blocks_whose_compensation_follows_a_sum():
    model, images = make_model("vit"), make_images("vit", 16)
    quantized = quantize_static(model, [images], "w4a4-tt+qwtblock")
    before = quantized(images)
    report = fold_compensation(quantized)
    assert report["folded"] == []
    assert "blocks.0" in report["kept"]
    assert torch.equal(quantized(images), before)


def test_the_linear_comparator_equals_a_least_squares_reference():
    model, images = make_model("vit"), make_images("vit", 24)
    plain = quantize_static(model, [images], "w4a4-tt+qwtlinear")
    for module in plain.modules():
        if isinstance(module, StreamQuantizer):
            module.compensation = None
    quantized = quantize_static(model, [images], "w4a4-tt+qwtlinear")
    fit = [index for index in range(24) if index % 4 != 3]
    y = outputs_of(model, "blocks.0", images)[1][fit].reshape(-1, 32).double().numpy()
    x, q = (value[fit].reshape(-1, 32).double().numpy() for value in outputs_of(plain, "blocks.0", images))
    solution, *_ = np.linalg.lstsq(np.concatenate([x, np.ones((len(x), 1))], 1), y - q, rcond=None)
    compensation = quantized.quantized_stream["blocks/0"].compensation
    np.testing.assert_allclose(compensation.weight.numpy(), solution[:-1].T, atol=1e-4 * np.abs(solution).max())
    np.testing.assert_allclose(compensation.bias.numpy(), solution[-1], atol=1e-4 * np.abs(solution).max())


def test_blocks_that_change_the_tokens_have_no_linear_compensation_and_say_so():
    model, images = make_model("hiera"), make_images("hiera", 8)
    rows = quantize_static(model, [images], "w4a4-tt+qwtlinear").quantization["compensation"]
    assert rows[1]["name"] == "blocks.1"
    assert "different tokens" in rows[1]["skipped"]


def test_a_fit_that_does_not_help_on_held_out_images_is_dropped():
    model = make_model("vit")
    images = make_images("vit", 4)  # three images to fit 33 unknowns a channel: what they say about the fourth is noise
    rows = quantize_static(model, [images], "w8a8-tt+qwtlinear").quantization["compensation"]
    skipped = [row for row in rows if row["skipped"]]
    assert skipped
    assert all(row["channels_kept"] == 0 for row in skipped)


def test_the_float_model_is_left_in_the_mode_it_had():
    model, images = make_model("vit").train(), make_images("vit", 4)
    before = copy.deepcopy(model.state_dict())
    quantize_static(model, [images], "w8a8-tt+qwt")
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_an_error_in_the_float_model_arrives_where_it_can_be_seen():
    model, images = make_model("vit"), make_images("vit", 4)
    quantized = quantize_static(model, [images], "w8a8-tt")

    def fail(*_):
        raise KeyError("interrupted")

    model.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="interrupted"):
        compensate(model, quantized, [images], "qwt")


def test_models_that_do_not_run_the_same_layers_are_refused():
    model, images = make_model("vit"), make_images("vit", 4)
    quantized = quantize_static(model, [images], "w8a8-tt")
    model.blocks[0].mlp, model.blocks[1].mlp = model.blocks[1].mlp, model.blocks[0].mlp
    del model.blocks[1].mlp.drop1
    model.blocks[1].mlp.forward = lambda x: x
    with pytest.raises(RuntimeError, match="runs"):
        compensate(model, quantized, [images], "qwt")


def test_wrong_arguments_are_refused():
    model, images = make_model("vit"), make_images("vit", 4)
    quantized = quantize_static(model, [images], "w8a8-tt")
    with pytest.raises(ValueError, match="'qwt3' is not known"):
        compensate(model, quantized, [images], "qwt3")
    with pytest.raises(ValueError, match="at least 2"):
        compensate(model, quantized, [images[:1]], "qwt")
    assert fold_compensation(quantized) == {"folded": [], "kept": []}


class Factor(torch.nn.Module):
    """A toy compensation of whole layers: the one factor that fits best."""

    place = "layer"

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    @classmethod
    def fit(cls, pair):
        above = below = 0.0
        for chosen in (pair.held, ~pair.held):
            for _, target, got in pair.chunks(chosen):
                above, below = above + float((got * target).sum()), below + float(got.square().sum())
        return cls(above / below), Fit(0.5, 1, 1)

    def forward(self, entered, output):
        return output * self.factor

    def fold(self, layer):
        return False


def test_a_compensation_is_one_class_and_one_line_of_a_table(tmp_path):
    model, images = make_model("vit"), make_images("vit", 8)
    with register(SUFFIXES, "factor", Suffix("compensation", "factor", Entry(f"{__name__}:Factor"))):
        quantized = quantize_static(model, [images], "w4a4-tt+factor")
        with pytest.raises(ValueError, match=r"\[\+qwt\|\+qwtblock\|\+qwtlinear\|\+factor\]: bits"):
            quantize_static(model, [images], "w4a4-tt+factor+qwt")
    rows = quantized.quantization["compensation"]
    layer = quantized.patch_embed.proj
    toy, layer.compensation = layer.compensation, None
    y, q = (outputs_of(m, "patch_embed.proj", images)[1].reshape(-1).numpy() for m in (model, quantized))
    assert toy.factor == pytest.approx(np.dot(q, y) / np.dot(q, q), rel=1e-4)
    layer.compensation = toy
    assert rows[0] == {"name": "patch_embed.proj", "explained": 0.5, "channels_kept": 1, "channels": 1, "skipped": ""}
    assert fold_compensation(quantized) == {"folded": [], "kept": [row["name"] for row in rows]}
    with pytest.raises(ValueError, match=r"accepted are qwt, qwtblock, qwtlinear$"):
        compensate(model, quantized, [images], "factor")
