from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from torch import nn

from tests.quant.families import FAMILIES, make_images, make_model
from tweo_timm.blocks import find_blocks
from tweo_timm.diagnose.random_init import open_blocks, random_model, reinitialised
from tweo_timm.diagnose.stethoscope import stethoscope


def rows_of(record, arm):
    return {row["name"]: row for row in record["arms"][arm]}


def test_the_trained_arm_equals_a_float64_computation_on_stored_outputs():
    model, images = make_model("swin"), make_images("swin", 5)
    record = stethoscope(model, images)
    stored = {}
    for name, block in find_blocks(model).items():
        block.register_forward_hook(lambda m, a, out, name=name: stored.update({name: out.flatten(1).double()}))
    with torch.no_grad():
        model(images)
    for name, row in rows_of(record, "trained_data").items():
        x = stored[name]
        assert row["avg_max"] == pytest.approx(float(x.amax(1).mean()), rel=1e-5)
        assert row["avg_min"] == pytest.approx(float(x.amin(1).mean()), rel=1e-5)
        assert row["mean_abs"] == pytest.approx(float(x.abs().mean()), rel=1e-5)
        assert row["mean_peak"] == pytest.approx(float(x.abs().amax(1).mean()), rel=1e-5)
        assert row["peak_abs"] == pytest.approx(float(x.abs().max()), rel=1e-5)


def test_the_rows_of_one_image_are_counted_as_one_image():
    torch.manual_seed(0)
    model, images = timm.create_model("mobilevit_xxs", num_classes=3).eval(), torch.randn(3, 3, 64, 64)
    rows = rows_of(stethoscope(model, images), "trained_data")
    stored = {}
    for name, block in find_blocks(model).items():
        block.register_forward_hook(lambda m, a, out, name=name: stored.update({name: out.detach()}))
    with torch.no_grad():
        model(images)
    for name, row in rows.items():
        assert len(stored[name]) == 4 * 3  # four patches each
        x = stored[name].double().abs().reshape(3, -1)
        assert row["mean_abs"] == pytest.approx(float(x.mean()), rel=1e-5)
        assert row["mean_peak"] == pytest.approx(float(x.amax(1).mean()), rel=1e-5)
        assert row["mean_peak"] <= row["peak_abs"]


def test_an_outlier_of_the_weights_is_data_independent():
    model, images = make_model("vit"), make_images("vit", 4)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[5] = 200.0
    record = stethoscope(model, images)
    verdicts = {row["name"]: row for row in record["verdicts"]}
    assert verdicts["blocks.1"]["verdict"] == "data-independent"
    assert verdicts["blocks.1"]["random_pixel_ratio"] == pytest.approx(1, abs=0.05)
    assert verdicts["blocks.1"]["random_weight_ratio"] < 0.1
    assert record["counts"]["data-independent"] == 1


def test_an_outlier_that_needs_its_images_is_data_dependent():
    model = make_model("vit")
    images = make_images("vit", 4) * 500  # far brighter than any pixel in [0, 255] becomes
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias.zero_()
    verdicts = stethoscope(model, images)["verdicts"]
    assert [row["verdict"] for row in verdicts] == ["data-dependent"] * 2


def test_an_untrained_model_is_inconclusive():
    model, images = reinitialised(make_model("vit"), 5)[0], make_images("vit", 4)
    assert stethoscope(model, images)["counts"]["inconclusive"] == 2


def test_batches_and_seeds_decide_as_promised():
    model, images = make_model("vit"), make_images("vit", 6)
    whole, parts = stethoscope(model, images), stethoscope(model, list(images.split(4)))
    for arm in whole["arms"]:
        for a, b in zip(whole["arms"][arm], parts["arms"][arm], strict=True):
            assert {**a, "name": 0} == pytest.approx({**b, "name": 0}, rel=1e-6)
    assert stethoscope(model, images) == whole
    other = stethoscope(model, images, seed=1)
    assert other["arms"]["trained_data"] == whole["arms"]["trained_data"]
    assert other["arms"]["trained_random_pixels"] != whole["arms"]["trained_random_pixels"]
    assert other["arms"]["shuffled_data"] != whole["arms"]["shuffled_data"]


def test_random_pixels_pass_the_preprocessing():
    model, images = make_model("vit"), make_images("vit", 2)
    seen = []
    handle = model.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    stethoscope(model, images, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
    handle.remove()
    pixels = seen[1]  # the second arm
    levels = (
        pixels * torch.tensor([0.2, 0.25, 0.5]).view(1, 3, 1, 1) + torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)
    ) * 255
    assert (levels - levels.round()).abs().max() < 1e-3
    assert levels.min() >= -1e-3
    assert levels.max() <= 255 + 1e-3
    assert levels.round().unique().numel() == 256


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_heard_and_left_as_it_was(family):
    model, images = make_model(family).train(), make_images(family, 2)
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    record = stethoscope(model, images)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    blocks = list(find_blocks(model))
    assert all([row["name"] for row in arm] == blocks for arm in record["arms"].values())
    assert record["degenerate"] == (family in ("deit3", "beit", "dinov3", "swinv2", "swinv2_cr", "naflex"))
    assert ("random_opened_data" in record["arms"]) == record["degenerate"]
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_drawing_again_gives_finite_parameters_like_those_of_a_new_model(family):
    import timm

    arch, kwargs = FAMILIES[family]
    fresh, rules = reinitialised(make_model(family), seed=3)
    new = dict(timm.create_model(arch, num_classes=10, **kwargs).named_parameters())
    assert set(rules) <= {n for n in new if n.endswith(("cls_token", "pos_embed", "temperature")) or "gamma" in n}
    for name, parameter in fresh.named_parameters():
        assert parameter.isfinite().all(), name
        if name not in rules and parameter.numel() > 100 and family not in ("hiera", "maxvit"):  # see random_init.py
            std, new_std = float(parameter.detach().std()), float(new[name].detach().std())
            assert std == pytest.approx(new_std, rel=0.35, abs=1e-7), name


def test_a_model_that_timm_can_create_by_name_is_created():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    fresh, origin, rules = random_model(model, seed=1)
    assert (origin, rules) == ("created", {})
    assert not torch.equal(fresh.head.weight, model.head.weight)
    assert random_model(make_model("vit"), seed=1)[1] == "drawn again"


def test_a_factory_of_the_user_wins():
    model, images = make_model("vit"), make_images("vit", 2)
    record = stethoscope(model, images, model_factory=lambda: make_model("vit", seed=7))
    assert record["random_init"] == "factory"
    assert record["drawn_by_rule"] == {}
    expected = stethoscope(make_model("vit", seed=7), images)["arms"]["trained_data"]
    assert record["arms"]["random_data"] == expected


def test_opening_sets_small_constant_factors_only():
    model = reinitialised(make_model("deit3"), 0)[0]
    opened = open_blocks(model)
    assert opened == [f"blocks.{b}.ls{i}.gamma" for b in (0, 1) for i in (1, 2)]
    assert torch.equal(model.blocks[0].ls1.gamma, torch.ones(32))
    assert open_blocks(make_model("deit3")) == []


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="no image"):
        stethoscope(make_model("vit"), [])
    model = make_model("vit")
    model.pretrained_cfg = None
    with pytest.raises(ValueError, match="mean and std"):
        stethoscope(model, make_images("vit"))


def test_parameters_without_an_initialiser_are_drawn_by_a_rule_that_is_reported():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
            self.table = nn.Parameter(torch.zeros(4, 3))

    fresh, rules = reinitialised(Bare(), 0)
    assert rules == {"weight": "1", "shift": "0", "table": "truncated normal, std 0.02"}
    assert torch.equal(fresh.weight, torch.ones(3))
    assert torch.equal(fresh.shift, torch.zeros(3))
    assert 0 < fresh.table.abs().max() < 0.1
