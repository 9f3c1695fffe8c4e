"""Planted faults are found, each with its smallest fix; a sound model is called sound in one sentence."""

import json

import pytest
import torch

from tests.survey import planted
from tweo_timm.diagnose.float16 import VALUES, float16_readings
from tweo_timm.records import plain
from tweo_timm.schema import written
from tweo_timm.survey.bench import Variant
from tweo_timm.survey.findings import SurveyFix, SurveyRow, SurveySite
from tweo_timm.survey.fixes import FIXES, weight_exponents
from tweo_timm.survey.survey import FORMATS, sentence, survey


def surveyed(plant, family, formats=FORMATS, **how):
    found = survey(planted.bench(plant, family, **how), formats)
    rows = {(row.format, row.rotated): row for row in found.rows}
    return found, rows, {fix.format: fix for fix in found.fix}


VIT_AND_SLOWLY_SWIN = pytest.mark.parametrize("family", ["vit", pytest.param("swin", marks=pytest.mark.slow)])


@VIT_AND_SLOWLY_SWIN
def test_a_sound_model_is_called_sound_in_one_sentence(family):
    found, rows, fixes = surveyed(planted.sound, family, max_drop=8.0)
    formats = "fp16, bf16, fp8, fp8-unit, w8a8-tt and w8a8-tt+res"
    assert found.verdict.startswith(f"Sound: {formats} each lose at most 8 points of Top-1 on these 64 images")
    assert found.verdict.count(".") == 1
    assert not fixes
    assert all(rows[format, rotated].top1 is not None for format in FORMATS for rotated in (False, True))
    json.dumps(plain(written(found)), allow_nan=False)


@VIT_AND_SLOWLY_SWIN
def test_a_planted_value_is_named_with_its_factor_and_scaled_away(family):
    found, rows, fixes = surveyed(planted.value, family, ("fp16",))
    row, site = rows["fp16", False], f"{planted.SECOND[family]}.mlp.fc2"
    assert (row.survives, row.verdict, row.top1, row.spread) == (False, "does not", None, "concentrated")
    assert row.sites[0].name == site
    assert row.sites[0].factor == pytest.approx(65504 / 9e4, rel=1e-3)
    assert row.headroom == pytest.approx(65504 / 9e4, rel=1e-3)
    assert (fixes["fp16"].fix, fixes["fp16"].top1) == ("stream", 100.0)
    assert found.verdict.startswith(f"fp16 does not survive (first at {site}, 1.37 times too large, concentrated): ")
    assert float16_readings(found.variants["fp16"].model, [torch.zeros(1, 3, 32, 32)]).headroom(VALUES) > 1


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_planted_square_is_named_and_a_whole_layernorm_is_the_fix(family):
    found, rows, fixes = surveyed(planted.square, family, ("fp16",))
    assert rows["fp16", False].survives
    row = rows["fp16-squares", False]
    assert row.sites[0].name == f"{planted.SECOND[family]}.norm1"
    assert 0.8 < row.headroom < 1
    assert (fixes["fp16-squares"].fix, fixes["fp16-squares"].sites[0]) == ("norm", row.sites[0].name)
    assert rows["fp16-squares", True].survives  # the rotation mends the square, and not the sum
    assert not rows["fp16-sums", True].survives
    assert "keep LayerNormalization one operator" in found.verdict


AROUND = {
    "vit": ["blocks.0.add1", "blocks.1.add0"],
    "swin": ["layers.1.blocks.0.add2", "layers.1.blocks.1.add2"],
}
"""The two sites of the stream between the two blocks; a shifted window of Swin has an addition more."""


@VIT_AND_SLOWLY_SWIN
def test_a_planted_residual_outlier_is_named_and_rotated_away(family):
    found, rows, fixes = surveyed(planted.residual, family, ("w8a8-tt", "w8a8-tt+res"))
    assert rows["w8a8-tt", False].survives
    row = rows["w8a8-tt+res", False]
    assert not row.survives
    assert sorted(site.name for site in row.sites[:2]) == AROUND[family]
    assert rows["w8a8-tt+res", True].survives
    assert fixes["w8a8-tt+res"].fix == "rotation"
    assert fixes["w8a8-tt+res"].tried == 3
    assert all(name in found.verdict for name in AROUND[family])
    assert found.verdict.endswith("; w8a8-tt may survive, not decided by 64 images.")


@VIT_AND_SLOWLY_SWIN
def test_a_planted_bad_layer_is_named_and_per_channel_weights_are_the_fix(family):
    found, rows, fixes = surveyed(planted.felt_layer, family, ("w8a8-tt",), max_drop=8.0)
    row = rows["w8a8-tt", False]
    assert not row.survives
    assert (row.spread, row.sites[0].name) == ("concentrated", f"{planted.BAD[family]}.attn.qkv")
    assert row.sites[0].share > 0.8
    assert (fixes["w8a8-tt"].fix, fixes["w8a8-tt"].scheme) == ("channel", "w8a8-ct")
    assert f"most at {planted.BAD[family]}.attn.qkv, concentrated): weights per channel" in found.verdict


@VIT_AND_SLOWLY_SWIN
def test_a_worse_layer_is_mended_for_float16_by_a_power_of_two_behind_v(family):
    _, rows, fixes = surveyed(planted.worse_layer, family, ("fp16",))
    assert rows["fp16", False].sites[0].name == f"{planted.SECOND[family]}.attn.qkv"
    assert (fixes["fp16"].fix, fixes["fp16"].sites) == ("pairs", [f"{planted.SECOND[family]}.attn.proj"])


@VIT_AND_SLOWLY_SWIN
def test_logits_of_an_attention_that_is_not_fused_are_named_and_computed_in_float32(family):
    found, rows, fixes = surveyed(planted.logits, family, ("fp16",))
    site = f"{planted.SECOND[family]}.attn"
    assert not rows["fp16", False].survives
    assert rows["fp16", False].sites[0].name == rows["fp16-logits", False].sites[0].name == site
    assert (fixes["fp16"].fix, fixes["fp16"].sites, fixes["fp16"].top1) == ("logits", [site], 100.0)
    assert found.verdict.startswith(f"fp16 does not survive (first at {site}, ")


def test_float16_is_read_on_all_images_that_are_scored():
    few = planted.bench(planted.sound, "vit")
    larger = 10 * few.samples[0]
    every = planted.bench(planted.sound, "vit", scored=lambda: iter([*few.samples, larger]))
    for reading in ("fp16", "fp16-squares", "fp16-sums"):
        assert every.readings(every.model).headroom(reading) < few.readings(few.model).headroom(reading)


def test_what_a_module_computes_and_does_not_return_is_kept_in_float32_with_it():
    _, rows, fixes = surveyed(planted.embedding, "swin", ("fp16",))
    assert rows["fp16", False].sites[0].name == "patch_embed.proj"
    assert (fixes["fp16"].fix, fixes["fp16"].sites, fixes["fp16"].top1) == ("sites", ["patch_embed"], 100.0)


def test_of_one_format_the_sentence_speaks_in_the_singular_and_rounding_is_blamed_on_no_site():
    found, _, _ = surveyed(planted.sound, "vit", ("bf16",), max_drop=100.0)
    assert found.verdict.startswith("Sound: bf16 loses at most 100 points of Top-1")
    sites = [SurveySite(name="near", peak_abs=9.0, factor=2.0)]
    row = SurveyRow(
        format="fp16", rotated=False, survives=False, verdict="does not", drop=5.0, headroom=2.0, sites=sites
    )
    found.rows, found.fix = [row], [SurveyFix(format="fp16", fix="training", words="train")]
    assert sentence(found) == "fp16 does not survive (5.00 points lost): train; nothing else survives."


@pytest.mark.slow
def test_what_can_neither_be_scaled_nor_rotated_is_kept_in_float32():
    found, _, fixes = surveyed(planted.inner, "vit", ("fp16", "w8a8-tt"))
    assert (fixes["fp16"].fix, fixes["fp16"].sites, fixes["fp16"].top1) == ("sites", ["blocks.1.mlp"], 100.0)
    assert (fixes["w8a8-tt"].fix, fixes["w8a8-tt"].sites) == ("sites", ["blocks.1.mlp.fc2"])
    assert "blocks.1.mlp in float32" in found.verdict
    assert "blocks.1.mlp.fc2 in float," in found.verdict


def test_training_is_the_last_fix_and_is_not_claimed_to_be_measured(monkeypatch):
    for name in [name for name in FIXES if name not in ("training", "norm")]:
        monkeypatch.setitem(FIXES, name, lambda problem: iter(()))
    _, _, fixes = surveyed(planted.value, "vit", ("fp16",))
    assert (fixes["fp16"].fix, fixes["fp16"].top1) == ("training", None)
    assert list(FIXES)[-1] == "training"


def test_a_model_that_cannot_be_rotated_says_why_and_is_surveyed_all_the_same():
    found, rows, _ = surveyed(planted.sound, "swinv2", ("fp16", "w8a8-tt"))
    assert "res-post-norm" in found.not_rotated
    assert set(rows) == {(name, False) for name in ("fp16", "fp16-logits", "fp16-squares", "fp16-sums", "w8a8-tt")}


def test_a_format_that_a_model_does_not_allow_is_named_in_the_sentence():
    found, _, _ = surveyed(planted.sound, "vit", ("bf16", "fp16+res"), max_drop=100.0)
    assert found.verdict.endswith("; fp16+res cannot be tried, for the reason below.")
    found, rows, _ = surveyed(planted.sound, "vit", ("fp16+res",))
    assert (rows, found.verdict) == ({}, "Nothing is known; fp16+res cannot be tried, for the reason below.")


def test_a_model_that_is_not_finite_in_float_is_refused():
    def broken(model, family):
        model.head.bias[0] = torch.nan

    with pytest.raises(ValueError, match="are not finite: mend that first"):
        survey(planted.bench(broken, "vit"))


def test_float16_is_read_at_other_sizes_too():
    small = planted.bench(planted.sound, "vit")
    large = planted.bench(planted.sound, "vit", others=[(64, 100 * torch.randn(2, 3, 64, 64))])
    readings = [bench.readings(bench.model).headroom("fp16") for bench in (small, large)]
    assert readings[1] < readings[0] / 5
    odd = planted.bench(planted.sound, "vit", others=[(65, torch.randn(2, 3, 60, 60))])
    with pytest.raises(ValueError, match="cannot be read at 65 pixels"):
        odd.readings(odd.model)


def test_weights_of_a_bad_layer_are_measured_against_their_neighbours():
    bench = planted.bench(planted.bad_layer, "vit")
    assert weight_exponents(bench.model) == {"blocks.1.attn.proj": 10}
    assert bench.decide(Variant(bench.model, "w8a8-ct")).survives
