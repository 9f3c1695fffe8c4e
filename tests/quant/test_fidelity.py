from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from tests.quant.families import make_images, make_model
from tweo_timm.quant.fidelity import fidelity
from tweo_timm.quant.static import quantize_static


def outputs(model, name, images):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0].flatten(1).double().numpy()


def test_ratios_equal_a_float64_computation_on_stored_activations():
    model, images = make_model("vit"), make_images("vit", 8)
    quantized = quantize_static(model, [images], "w6a6-tt+res")
    record = fidelity(model, quantized, images)
    rows = {row["name"]: row for row in record["layers"]}
    for name in ("patch_embed.proj", "blocks.1.mlp.fc2", "blocks.0", "head"):
        y, y_q = outputs(model, name, images), outputs(quantized, name, images)
        rest = np.ones_like(y, bool)
        rest[np.arange(8), np.abs(y).argmax(1)] = False
        whole = 10 * np.log10((y**2).sum() / ((y - y_q) ** 2).sum())
        without = 10 * np.log10((y[rest] ** 2).sum() / ((y - y_q)[rest] ** 2).sum())
        assert rows[name]["sqnr_db"] == pytest.approx(whole, abs=1e-4)
        assert rows[name]["sqnr_without_peak_db"] == pytest.approx(without, abs=1e-4)
        assert rows[name]["kind"] == ("block" if name == "blocks.0" else "layer")
    y, y_q = outputs(model, "head", images), outputs(quantized, "head", images)
    assert record["relative_error"] == pytest.approx(np.linalg.norm(y - y_q) / np.linalg.norm(y), rel=1e-5)
    assert record["top1_agreement"] == (y.argmax(1) == y_q.argmax(1)).mean()
    assert record["num_images"] == 8
    json.dumps(record, allow_nan=False)


def test_the_whole_ratio_hides_an_outlier_and_the_ratio_without_peaks_shows_it():
    model, images = make_model("vit"), make_images("vit", 8)
    with torch.no_grad():
        model.pos_embed[0, 1, 7] = 300.0
    rows = fidelity(model, quantize_static(model, [images], "w8a8-tt+res"), images)["layers"]
    block = next(row for row in rows if row["name"] == "blocks.0")
    assert block["sqnr_db"] - block["sqnr_without_peak_db"] > 10


@pytest.mark.parametrize("family", ["beit", "maxvit", "swinv2"])
def test_every_layer_and_block_is_compared_however_images_are_batched(family):
    model, images = make_model(family), make_images(family, 6)
    quantized = quantize_static(model, [images], "w8a8-ct")
    whole = fidelity(model, quantized, images)
    parts = fidelity(model, quantized, list(images.split(2)))
    assert [row["name"] for row in whole["layers"]] == [row["name"] for row in parts["layers"]]
    assert parts["relative_error"] == pytest.approx(whole["relative_error"], rel=1e-2)
    assert min(row["sqnr_db"] for row in whole["layers"] if row["sqnr_db"] is not None) > 10


def test_no_noise_and_no_signal_are_null():
    model, images = make_model("vit"), make_images("vit", 2)
    with torch.no_grad():
        model.head.weight.zero_(), model.head.bias.zero_()
    record = fidelity(model, quantize_static(model, [images], "w8a8-tt"), images)
    head = next(row for row in record["layers"] if row["name"] == "head")
    assert head["sqnr_db"] is None
    assert record["relative_error"] is None


def test_wrong_arguments_are_refused():
    model, images = make_model("vit"), make_images("vit", 2)
    with pytest.raises(ValueError, match="no quantized layer"):
        fidelity(model, copy.deepcopy(model), images)
    with pytest.raises(ValueError, match="at least one image"):
        fidelity(model, quantize_static(model, [images], "w8a8-tt"), [])
