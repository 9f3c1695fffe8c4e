from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch import nn

from tests.quant.families import FAMILIES, make_images, make_model
from tweo_timm.diagnose.readiness import fp8_readiness


class Net(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))

    def forward(self, x):
        return self.layers(x)


def by_name(record):
    return {row["name"]: row for row in record["layers"]}


def test_shapes_and_padding_are_those_of_multiples_of_16():
    record = fp8_readiness(Net(32, 48, 10), [torch.randn(4, 6, 32), torch.randn(4, 6, 32)])
    first, last = by_name(record)["layers.0"], by_name(record)["layers.1"]
    assert (first["aligned"], first["padding_cost"]) == (True, 0)
    assert (last["aligned"], last["padding_cost"]) == (False, pytest.approx(16 / 10 - 1))
    assert first["tokens_per_image"] == 6
    assert first["batch_multiple"] == 8  # 6 * 8 = 48
    assert record["padding_cost"] == pytest.approx((32 * 48 + 48 * 16) / (32 * 48 + 48 * 10) - 1)
    assert record["batch_multiple"] == 8
    assert "1 of 2 Linear layers fit" in record["verdict"]
    assert any("pad layers.1" in line for line in record["actions"])


def test_a_jump_of_amax_is_what_delayed_scaling_clips():
    calm = torch.linspace(-1, 1, 64).reshape(2, 32)
    jump = calm.clone()
    jump[0, :4] = 10.0
    row = by_name(fp8_readiness(Net(32, 16), [calm, jump, calm]))["layers.0"]
    assert row["worst_jump"] == pytest.approx(10)
    assert row["clipped_share"] == pytest.approx(4 / 64)
    assert row["amax"] == 10
    assert row["at_risk"]


def test_values_above_448_and_values_lost_to_zero_are_counted():
    x = torch.full((1, 32), 1e-3)
    x[0, 0] = 1000.0
    record = fp8_readiness(Net(32, 16), [x, x])
    row = by_name(record)["layers.0"]
    assert row["share_above_448"] == pytest.approx(1 / 32)
    assert 1e-3 <= 1000 / 448 * 2**-10  # what E4M3 rounds to zero under this scale
    assert row["flushed_share"] == pytest.approx(31 / 32)
    assert record["verdict"].startswith("at risk")
    assert any("overflow unscaled" in line for line in record["actions"])


def test_the_flush_threshold_is_that_of_the_cast():
    scale = 448 / 7.0
    for value, flushed in ((7.0 / 448 * 2**-10 * 0.99, True), (7.0 / 448 * 2**-10 * 1.02, False)):
        x = torch.full((1, 32), value)
        x[0, 0] = 7.0
        assert bool((x[0, 1] * scale).to(torch.float8_e4m3fn).float() == 0) == flushed
        row = by_name(fp8_readiness(Net(32, 16), [x]))["layers.0"]
        assert row["flushed_share"] == pytest.approx(31 / 32 if flushed else 0)


def test_calm_aligned_models_are_ready_and_one_batch_shows_no_jump():
    record = fp8_readiness(Net(32, 16), [torch.randn(4, 32)])
    assert record["verdict"].startswith("ready:")
    assert by_name(record)["layers.0"]["worst_jump"] is None
    assert any("several batches" in line for line in record["actions"])


def test_activations_that_are_not_finite_are_at_risk_and_null():
    x = torch.randn(1, 32)
    x[0, 0] = math.inf
    row = by_name(fp8_readiness(Net(32, 16), [x]))["layers.0"]
    assert row["amax"] is None
    assert row["at_risk"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_that_sees_images_is_in_the_report(family):
    model, images = make_model(family).train(), make_images(family, 4)
    switches = [m.qkv_bias_separate for m in model.modules() if hasattr(m, "qkv_bias_separate")]
    record = fp8_readiness(model, [images[:2], images[2:]])
    linears = {
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "cpb_mlp" not in n and "meta_mlp" not in n
    }
    assert set(by_name(record)) == linears
    assert model.training
    assert [m.qkv_bias_separate for m in model.modules() if hasattr(m, "qkv_bias_separate")] == switches
    json.dumps(record, allow_nan=False)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="no Linear layer"):
        fp8_readiness(nn.Sequential(nn.ReLU()), [torch.ones(1, 2)])
    with pytest.raises(ValueError, match="at least one batch"):
        fp8_readiness(Net(32, 16), [])
