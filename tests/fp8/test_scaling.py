"""The vectorised update against the kernel's own steps, written out element by element in float32 NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tweo_timm import Fp8Recipe
from tweo_timm.fp8.scaling import NOT_SEEN, DelayedScales, current_scale, delayed_update

FLOAT32_MAX = np.finfo(np.float32).max


def kernel_update(scale, history, reduced, fp8_max, margin, algorithm):
    """One update of `kernel_bulk`, tensor by tensor, in IEEE float32; NumPy's fmax ignores NaN as the kernel's does."""
    scale, history = scale.copy(), history.copy()
    scaled_max = np.float32(fp8_max * 2.0**-margin)
    for j in range(scale.size):
        last = reduced[j] if reduced[j] != 0 else history[0, j]
        amax = np.float32(0)
        if last != 0:
            column = np.append(history[1:, j], last)
            for value in column:
                amax = np.fmax(amax, value)
            history[:, j] = column
            history[0, j] = 0
        if algorithm == "most_recent":
            amax = last
        if np.isfinite(amax) and amax > 0:
            with np.errstate(over="ignore"):
                scale[j] = scaled_max / amax
        if np.isinf(scale[j]):
            scale[j] = FLOAT32_MAX
    return scale, history


def random_amaxes(rng, num_steps, num_tensors):
    amax = rng.lognormal(0, 1, (num_steps, num_tensors)).astype(np.float32)
    kind = rng.integers(0, 12, amax.shape)
    amax[kind == 0] = 0
    amax[kind == 1] = np.inf
    amax[kind == 2] = np.nan
    amax[kind == 3] *= np.float32(1e6)
    amax[kind == 4] /= np.float32(1e6)
    amax[kind == 5] = np.float32(1e-42)
    return amax


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("length", [1, 2, 16])
@pytest.mark.parametrize(("fp8_max", "margin"), [(448.0, 0), (57344.0, 0), (448.0, 3), (57344.0, -2)])
def test_thousand_steps_of_hostile_maxima_are_bit_identical_to_the_kernel(algorithm, length, fp8_max, margin):
    num_tensors = 13
    scale, history = np.ones(num_tensors, np.float32), np.zeros((length, num_tensors), np.float32)
    scale_t, history_t = torch.from_numpy(scale.copy()), torch.from_numpy(history.copy())
    rng = np.random.default_rng([length, int(fp8_max), margin + 8])
    for amax in random_amaxes(rng, 1000, num_tensors):
        scale, history = kernel_update(scale, history, amax, fp8_max, margin, algorithm)
        scale_t, history_t = delayed_update(
            scale_t, history_t, torch.from_numpy(amax), fp8_max=fp8_max, margin=margin, algorithm=algorithm
        )
        assert np.array_equal(scale_t.numpy().view(np.int32), scale.view(np.int32))
        assert np.array_equal(history_t.numpy(), history, equal_nan=True)


def updated(amaxes, algorithm="max", length=4):
    scale, history = torch.ones(1), torch.zeros(length, 1)
    for amax in amaxes:
        scale, history = delayed_update(
            scale, history, torch.tensor([amax]), fp8_max=448.0, margin=0, algorithm=algorithm
        )
    return scale.item(), history[:, 0].tolist()


def test_zero_amax_does_not_roll_the_history():
    assert updated([2.0, 0.0, 0.0]) == updated([2.0])


def test_infinite_amax_keeps_the_old_scale_until_it_leaves_the_window():
    scales = [updated([2.0, math.inf, *[1.0] * n])[0] for n in range(5)]
    assert scales == [224.0, 224.0, 224.0, 224.0, 448.0]


def test_nan_amax_is_ignored_but_takes_a_place_in_the_window():
    scale, history = updated([2.0, math.nan])
    assert scale == 224.0
    assert math.isnan(history[-1])


def test_vanishing_amax_gives_the_largest_finite_scale():
    assert updated([1e-44])[0] == FLOAT32_MAX


def test_division_is_a_true_division():
    """A reciprocal and a product differ in the last bit for a quarter of all maxima."""
    amax = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) + 0.5
    scale, _ = delayed_update(
        torch.ones(10_000), torch.zeros(2, 10_000), amax, fp8_max=448.0, margin=0, algorithm="max"
    )
    assert np.array_equal(scale.numpy(), np.float32(448) / amax.numpy())
    assert not np.array_equal((448.0 / amax).numpy(), scale.numpy())


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(st.floats(2.0**-30, 2.0**30, width=32), min_size=1, max_size=6))
def test_largest_value_of_the_window_lands_on_the_largest_fp8_value(amaxes):
    scale, _ = updated(amaxes, length=4)
    assert scale * max(amaxes[-4:]) == pytest.approx(448.0, rel=1e-6)


@pytest.mark.parametrize(
    ("amax", "expected"), [(0.0, 1.0), (math.inf, 1.0), (math.nan, 1.0), (1e-44, FLOAT32_MAX), (2.0, 224.0)]
)
def test_current_scale_falls_back_to_one(amax, expected):
    assert current_scale(torch.tensor(amax), fp8_max=448.0, margin=0).item() == expected


def test_margin_leaves_powers_of_two_free():
    assert current_scale(torch.tensor(1.0), fp8_max=448.0, margin=2).item() == 112.0


def test_update_never_writes_into_a_scale_that_a_backward_may_hold():
    recipe = Fp8Recipe(amax_history_len=2)
    state = DelayedScales.create(3, recipe, torch.device("cpu"))
    held = state.scale
    state.amax.copy_(torch.tensor([NOT_SEEN, 2.0, 4.0]))
    state.update(recipe, 448.0)
    assert held.tolist() == [1.0, 1.0, 1.0]
    assert state.scale.tolist() == [1.0, 224.0, 112.0]
    assert state.amax.tolist() == [NOT_SEEN] * 3
