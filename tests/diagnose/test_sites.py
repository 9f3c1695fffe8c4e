from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tests.quant.families import FAMILIES, make_images, make_model
from tweo_timm.blocks import find_blocks
from tweo_timm.diagnose.sites import record_sites
from tweo_timm.quant.static import quantize_static
from tweo_timm.records import plain


def sites_of(model, images, **kwargs):
    with record_sites(model, **kwargs) as recorder, torch.no_grad():
        for batch in images if isinstance(images, list) else [images]:
            model(batch)
    return {(row["kind"], row["name"]): row for row in recorder.summary()["sites"]}, recorder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_site_is_seen_in_every_family(family):
    model, images = make_model(family), make_images(family, 4)
    rows, recorder = sites_of(model, images)
    blocks = list(find_blocks(model))
    assert [name for kind, name in rows if kind == "block"] == blocks
    position = ("cpb_mlp", "meta_mlp", "rel_pos", "pos_embed")
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not any(p in n for p in position)}
    assert {name for kind, name in rows if kind == "linear_input"} == linears
    assert {name for kind, name in rows if kind == "linear_output"} == linears
    attention = [name for kind, name in rows if kind == "attention_input"]
    assert len(attention) == len(blocks) * (2 if family == "maxvit" else 1)
    assert {name for kind, name in rows if kind == "norm"} >= {
        n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) and not any(p in n for p in position)
    }
    json.dumps(recorder.summary(), allow_nan=False)


def test_peaks_and_means_equal_stored_activations_with_windows_folded_back():
    model, images = make_model("swin"), make_images("swin", 4)
    seen = {}
    model.layers[0].blocks[1].attn.qkv.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    rows, _ = sites_of(model, images)
    row = rows["linear_input", "layers.0.blocks.1.attn.qkv"]
    x = seen["x"].reshape(4, -1, 16).double()
    assert row["peak_abs"] == pytest.approx(float(x.abs().max()), rel=1e-6)
    assert row["mean_abs"] == pytest.approx(float(x.abs().mean()), rel=1e-6)
    place = x.abs()[:, row["peak_token"], row["peak_channel"]].max()
    assert float(place) == pytest.approx(row["peak_abs"], rel=1e-6)
    assert row["peak_token"] < 256


@pytest.mark.parametrize("family", ["vit", "swin", "maxvit"])
def test_statistics_do_not_depend_on_the_batch_size(family):
    model, images = make_model(family), make_images(family, 6)
    whole, parts = sites_of(model, images)[0], sites_of(model, list(images.split(4)))[0]
    assert whole.keys() == parts.keys()
    for site, row in whole.items():
        for key in ("peak_abs", "mean_abs", "kurtosis", "share_of_images_above_448", "count"):
            assert parts[site][key] == pytest.approx(row[key], rel=1e-4), (site, key)


def test_a_seeded_activation_is_found_with_its_site_token_and_channel():
    model, images = make_model("vit"), make_images("vit", 2)
    with torch.no_grad():
        model.blocks[0].norm2.bias[7] = 900.0
    with record_sites(model) as recorder, torch.no_grad():
        model(images)
    summary = recorder.summary()
    row = next(row for row in summary["sites"] if (row["kind"], row["name"]) == ("norm", "blocks.0.norm2"))
    assert row["peak_channel"] == 7
    assert row["share_of_images_above_448"] == 1
    assert summary["peak_abs"] >= 899


def test_kinds_can_be_chosen_and_hooks_are_taken_off():
    model, images = make_model("beit"), make_images("beit", 2)
    rows, recorder = sites_of(model, images, kinds=("norm",))
    assert {kind for kind, _ in rows} == {"norm"}
    before = recorder.summary()
    with torch.no_grad():
        model(images * 100)
    assert recorder.summary() == before
    assert not any(m.qkv_bias_separate for m in model.modules() if hasattr(m, "qkv_bias_separate"))
    with pytest.raises(ValueError, match="'gelu' is not known"), record_sites(model, kinds=("gelu",)):
        pass


def test_a_quantized_model_can_be_recorded_without_disturbing_its_arithmetic():
    model, images = make_model("vit"), make_images("vit", 2)
    quantized = quantize_static(model, [images], "w8a8-tt+res+attn")
    expected = quantized(images)
    rows, _ = sites_of(quantized, images)
    assert ("linear_input", "blocks.0.mlp.fc1") in rows
    assert torch.equal(quantized(images), expected)


def test_recording_nothing_is_an_error():
    model = make_model("vit")
    with record_sites(model) as recorder:
        pass
    recorder.gather()  # one process: nothing to do
    with pytest.raises(RuntimeError, match="no activation"):
        recorder.summary()


def test_two_processes_hold_the_whole_after_gathering(tmp_path):
    model, images = make_model("vit"), make_images("vit", 4)
    whole, recorder = sites_of(model, images)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        recorder.gather()
    finally:
        torch.distributed.destroy_process_group()
    assert {(r["kind"], r["name"]): r for r in recorder.summary()["sites"]} == whole


def test_merging_two_shards_equals_one_run(monkeypatch):
    model, images = make_model("vit"), make_images("vit", 4)
    whole, _ = sites_of(model, images)
    _, first = sites_of(model, images[:1])
    _, second = sites_of(model, images[1:])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def all_gather_object(everyone, mine):
        everyone[:] = [{site: stats.state() for site, stats in r.stats.items()} for r in (first, second)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    first.gather()
    merged = {(r["kind"], r["name"]): r for r in first.summary()["sites"]}
    assert merged.keys() == whole.keys()
    for site, row in whole.items():
        assert merged[site]["peak_abs"] == pytest.approx(row["peak_abs"], rel=1e-6)
        assert merged[site]["kurtosis"] == pytest.approx(row["kurtosis"], rel=1e-5)
        assert merged[site]["count"] == row["count"]


def test_records_hold_plain_numbers_and_null_where_not_finite():
    value = plain({"a": torch.tensor([1.0, float("nan")]), 2: (torch.tensor(3), float("inf")), "c": "text", "d": None})
    assert value == {"a": [1.0, None], "2": [3, None], "c": "text", "d": None}
