from __future__ import annotations

import json

import pytest
import timm
import torch
from torch import nn

from tests.quant.families import FAMILIES, make_images, make_model
from tweo_timm.blocks import find_blocks
from tweo_timm.diagnose.colinearity import colinearity, terms_of


def test_the_published_vit_b_example_follows_from_its_factors():
    s, w_dot_u, v_dot_x = 18.189, -9.1847, -5.6165
    basis = torch.eye(3, dtype=torch.float64)
    a = s * torch.outer(basis[0], basis[1]) + 0.1 * torch.outer(basis[1], basis[0])  # u_1 = e0, v_1 = e1
    terms = terms_of(torch.tensor([w_dot_u, 0.0, 0.0]), a, torch.tensor([0.0, v_dot_x, 0.0]))
    assert float(terms["singular_values"][0]) == pytest.approx(18.189)
    assert float(terms["values"][0]) == pytest.approx(938.28, abs=0.05)
    assert abs(float(terms["w_dot_u"][0])) == pytest.approx(9.1847, abs=1e-5)
    assert abs(float(terms["v_dot_x"][0])) == pytest.approx(5.6165, abs=1e-5)


@pytest.mark.parametrize("shape", [(12, 4), (4, 12), (7, 7)])
def test_the_terms_sum_to_the_bilinear_form(shape):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(*shape, generator=generator) * 30
    w, x = torch.randn(shape[0], generator=generator), torch.randn(shape[1], generator=generator)
    exact = float(w.double() @ a.double() @ x.double())
    assert float(terms_of(w, a, x)["values"].sum()) == pytest.approx(exact, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_activation_and_biases_the_sum_is_what_the_forward_pass_computed(family):
    model, images = make_model(family), make_images(family, 3)
    record = colinearity(model, images)
    assert record["with_activation"] == pytest.approx(record["mlp_measured"], rel=1e-4, abs=1e-6)
    spectrum = zip(record["singular_values"], record["w_dot_u"], record["v_dot_x"], strict=True)
    assert sum(s * w * v for s, w, v in spectrum) == pytest.approx(record["sum_of_terms"], rel=1e-8, abs=1e-10)
    assert record["top_term"] == record["terms"][0]["value"]
    assert record["kind"] == ("gated" if family == "eva02" else "plain")
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    "family", ["vit", "deit3", "beit", "eva02", "dinov3", "cait", "hiera", "swin", "xcit", "maxvit"]
)
def test_the_layer_scale_is_the_blocks_own(family):
    """What the MLP is said to contribute is what the block's stream gained after its second norm."""
    model, images = make_model(family), make_images(family, 2)
    record = colinearity(model, images, block=list(find_blocks(model))[1] if family == "vit" else None)
    owner = model.get_submodule(record["mlp"].rpartition(".")[0])
    seen = {}
    owner.norm2.register_forward_pre_hook(lambda m, args: seen.update(mid=args[0]))
    with torch.no_grad():
        model(images)
    mid = seen["mid"].reshape(2, -1, seen["mid"].shape[-1])[record["image"], record["token"], record["channel"]]
    assert float(mid) + record["mlp_measured"] == pytest.approx(record["measured"], abs=1e-5)


def test_the_layer_scale_of_edgenext_is_folded_in():
    torch.manual_seed(0)
    model, images = timm.create_model("edgenext_xx_small", num_classes=3).eval(), torch.randn(2, 3, 64, 64)
    name = list(find_blocks(model))[-1]
    block = model.get_submodule(name)
    with torch.no_grad():
        block.gamma.copy_(torch.linspace(0.5, 2, len(block.gamma)))
    record = colinearity(model, images, block=name)
    seen = {}
    block.register_forward_hook(lambda m, args, out: seen.update(gain=(out - args[0]).flatten(2)))
    with torch.no_grad():
        model(images)
    gain = float(seen["gain"][record["image"], record["channel"], record["token"]])
    assert record["mlp_measured"] == pytest.approx(gain, abs=1e-5)
    assert record["layer_scale"] == pytest.approx(float(block.gamma.detach()[record["channel"]]))


def test_blocks_that_see_an_image_in_several_rows_are_explained():
    torch.manual_seed(0)
    model, images = timm.create_model("mobilevit_xxs", num_classes=3).eval(), torch.randn(3, 3, 64, 64)
    seen = {}
    name, block = next(iter(find_blocks(model).items()))
    block.register_forward_hook(lambda m, a, out: seen.update(x=out.detach().reshape(len(out) // 4, -1, out.shape[-1])))
    with torch.no_grad():
        model(images)
    whole = seen["x"]
    record = colinearity(model, images, block=name)
    assert abs(record["measured"]) == pytest.approx(float(whole.abs().max()), rel=1e-5)
    at = whole[record["image"], record["token"], record["channel"]]
    assert float(at) == pytest.approx(record["measured"], rel=1e-5)
    assert colinearity(model, images)["block"] in find_blocks(model)


def test_the_peak_and_its_place_are_found():
    model, images = make_model("swin"), make_images("swin", 5)
    record = colinearity(model, list(images.split(2)))
    assert record == colinearity(model, images)
    seen = {}
    for name, block in find_blocks(model).items():
        block.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out.flatten(1, 2)}))
    with torch.no_grad():
        model(images)
    at = seen[record["block"]][record["image"], record["token"], record["channel"]]
    assert float(at) == pytest.approx(record["measured"], rel=1e-5)
    assert abs(record["measured"]) == pytest.approx(max(float(x.abs().max()) for x in seen.values()), rel=1e-5)


def test_a_planted_aligned_direction_is_the_top_term_and_the_linear_form_is_valid():
    model, images = make_model("vit"), make_images("vit", 2)
    with torch.no_grad():
        mlp = model.blocks[1].mlp
        model.blocks[1].norm2.bias.copy_(5 * torch.nn.functional.one_hot(torch.tensor(3), 32))
        mlp.fc1.weight.add_(
            4 * torch.outer(torch.ones(128) / 128**0.5, torch.nn.functional.one_hot(torch.tensor(3), 32))
        )
        mlp.fc2.weight[9] = 3.0
    record = colinearity(model, images)
    assert (record["block"], record["channel"]) == ("blocks.1", 9)
    assert record["alignment"] > 0.5
    assert record["linear_valid"]
    assert record["top_term"] == pytest.approx(record["sum_of_terms"], rel=0.5)


def test_a_linear_form_of_the_wrong_sign_or_size_is_called_invalid():
    model, images = make_model("vit"), make_images("vit", 2)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias.fill_(-6.0)  # GELU passes nothing
        model.blocks[1].mlp.fc2.bias.zero_()
    record = colinearity(model, images, block="blocks.1")
    assert not record["linear_valid"]
    assert "half and twice" in record["rule"]


def test_the_two_halves_of_a_packed_gated_mlp_are_told_apart():
    for arch in ("vit_giant_patch14_reg4_dinov2",):
        model = timm.create_model(
            arch, img_size=28, embed_dim=32, depth=2, num_heads=2, num_classes=4, init_values=0.5, pretrained=False
        ).eval()
        record = colinearity(model, torch.randn(2, 3, 28, 28))
        assert record["kind"] == "gated"
        assert record["with_activation"] == pytest.approx(record["mlp_measured"], rel=1e-4, abs=1e-6)
        assert "gate held" in record["note"]


def test_a_norm_behind_the_mlp_is_noted():
    record = colinearity(make_model("swinv2"), make_images("swinv2", 2))
    assert "A norm follows" in record["note"]


def test_what_cannot_be_decomposed_is_refused_with_a_reason():
    model, images = make_model("vit"), make_images("vit", 2)
    with pytest.raises(ValueError, match=r"'blocks.9' is not one of this model's: blocks.0"):
        colinearity(model, images, block="blocks.9")
    with pytest.raises(ValueError, match="channel 99"):
        colinearity(model, images, channel=99)
    with pytest.raises(ValueError, match="no image"):
        colinearity(model, [])
    xcit = make_model("xcit")
    with pytest.raises(ValueError, match=r"sees 1 tokens of 17"):
        colinearity(xcit, make_images("xcit", 2), block="cls_attn_blocks.1")
    model.blocks[0].mlp = nn.Identity()
    with pytest.raises(ValueError, match="no module with fc1"):
        colinearity(model, images, block="blocks.0")


class Convolving(nn.Module):
    """An MLP that looks like any other, and mixes tokens."""

    def __init__(self, layer: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = layer, nn.GELU(), second

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x).roll(1, 1)))


def test_an_mlp_that_does_more_than_it_seems_is_refused():
    model, images = make_model("vit"), make_images("vit", 2)
    model.blocks[0].mlp = Convolving(nn.Linear(32, 8), nn.Linear(8, 32))
    with pytest.raises(ValueError, match="does more than"):
        colinearity(model, images, block="blocks.0")
    model.blocks[0].mlp = Convolving(nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1))
    with pytest.raises(ValueError, match="convolutions"):
        colinearity(model, images, block="blocks.0")


def test_a_named_channel_and_the_mode_of_the_model_are_kept():
    model, images = make_model("vit").train(), make_images("vit", 2)
    assert colinearity(model, images, block="blocks.0", channel=4)["channel"] == 4
    assert model.training
