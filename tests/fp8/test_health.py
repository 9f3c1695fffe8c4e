import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.models import tiny_vit
from tests.needed import dynamos_own, needs
from tweo_timm import Fp8HealthMonitor, Fp8Recipe, fp8_state, patch_fp8, warm_up_fp8


def armed_step(x, weight, recipe=None, dy=None):
    """One observed step of a single layer; returns its rows by tensor."""
    model = nn.Sequential(nn.Linear(*reversed(weight.shape), bias=False))
    model[0].weight.data.copy_(weight)
    patch_fp8(model, recipe or Fp8Recipe(scaling="unit"))
    monitor = Fp8HealthMonitor(model)
    monitor.arm()
    y = model(x)
    y.backward(torch.ones_like(y) if dy is None else dy)
    return {row["tensor"]: row for row in monitor.rows(epoch=3, update=7)}


def test_rows_match_a_float64_computation_on_the_same_operand():
    torch.manual_seed(0)
    x = torch.randn(8, 16) * 300
    x[0, 0] = 1e4
    x[1, :4] = 1e-4
    row = armed_step(x, torch.eye(16))["x"]
    exact = x.double().numpy()
    rounded = x.clamp(-448, 448).to(torch.float8_e4m3fn).double().numpy()
    keep = np.abs(exact) < np.abs(exact).max()

    def sqnr_db(mask):
        return 10 * math.log10((exact[mask] ** 2).sum() / ((rounded - exact)[mask] ** 2).sum())

    assert row["amax"] == 1e4
    assert row["scale"] == 1
    assert row["saturated"] == pytest.approx((np.abs(exact) > 448).mean())
    assert row["flushed"] == pytest.approx(4 / exact.size)
    assert row["sqnr_db"] == pytest.approx(sqnr_db(np.ones_like(keep)), abs=1e-4)
    assert row["sqnr_without_peak_db"] == pytest.approx(sqnr_db(keep), abs=1e-4)


def test_one_huge_element_hides_a_ruined_tensor_unless_it_is_left_out():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 1e-3
    x[0, 0] = 448.0
    row = armed_step(x, torch.eye(64))["x"]
    assert row["sqnr_db"] is None or row["sqnr_db"] > 60
    assert row["sqnr_without_peak_db"] < 10


def test_undefined_ratios_are_none_and_rows_are_json():
    rows = armed_step(torch.zeros(2, 16), torch.eye(16), dy=torch.full((2, 16), math.inf))
    assert rows["x"]["sqnr_db"] is None
    assert rows["w"]["sqnr_db"] is None
    assert rows["dy"]["sqnr_db"] is None
    assert rows["dy"]["saturated"] == 1
    assert rows["x"]["epoch"] == 3
    assert rows["x"]["update"] == 7
    json.dumps([{**row, "amax": min(row["amax"], 1e30)} for row in rows.values()], allow_nan=False)


def test_monitor_is_silent_until_armed_and_changes_nothing():
    def run(watch):
        model = tiny_vit()
        patch_fp8(model)
        monitor = Fp8HealthMonitor(model)
        counts = []
        for step in range(3):
            if watch and step == 1:
                monitor.arm()
            model(torch.randn(2, 3, 32, 32)).sum().backward()
            counts.append(len(monitor.rows(0, step)))
        return counts, fp8_state(model), [p.grad for p in model.parameters()]

    counts, state, gradients = run(watch=True)
    silent, expected_state, expected_gradients = run(watch=False)
    assert counts == [0, 27, 0]
    assert silent == [0, 0, 0]
    assert all(torch.equal(state[key], expected_state[key]) for key in state)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))


def test_model_without_fp8_is_refused():
    with pytest.raises(ValueError, match="not in FP8"):
        Fp8HealthMonitor(nn.Sequential(nn.Linear(2, 2)))


@needs("compiled fp8")
@dynamos_own
def test_armed_step_of_a_compiled_model_reports_every_layer():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    patch_fp8(model)
    monitor = Fp8HealthMonitor(model)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(4, 16)
    compiled(x).sum().backward()
    monitor.arm()
    compiled(x).sum().backward()
    assert {(row["layer"], row["tensor"]) for row in monitor.rows(0, 0)} == {
        (n, t) for n in "02" for t in ("x", "w", "dy")
    }


def test_warm_up_moves_scales_and_nothing_else():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))
    patch_fp8(model)
    x = torch.randn(8, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    warm_up_fp8(model, lambda: model(x).square().mean().mul(1e-6).backward())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(scale.ne(1).all() for key, scale in fp8_state(model).items() if key.endswith("scale"))
    model(x).square().mean().mul(1e-6).backward()
    assert model[3].weight.grad.any()
