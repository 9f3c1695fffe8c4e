from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tweo_timm.train.meters import EpochMeters

CPU = torch.device("cpu")
NAMES = ["blocks.0", "blocks.1"]

# One micro-batch: images, loss, L_TWEO where it was measured, and the peaks of two blocks.
numbers = st.floats(0, 1e4, width=32)
micro_batches = st.lists(
    st.tuples(st.integers(1, 64), numbers, st.none() | numbers, st.tuples(numbers, numbers)), min_size=1, max_size=30
)


def count(into: EpochMeters, samples: int, loss: float, tweo: float | None, peaks: tuple[float, ...]) -> None:
    result = {"loss": torch.tensor(loss)}
    if tweo is not None:
        result |= {"task_loss": torch.tensor(loss / 2), "tweo_loss": torch.tensor(tweo)}
    into.update(result, torch.tensor(peaks), samples)


@settings(derandomize=True, deadline=None)
@given(micro_batches)
def test_means_weigh_by_images_and_peaks_are_the_largest(batches):
    epoch = EpochMeters(NAMES, CPU)
    for batch in batches:
        count(epoch, *batch)
    samples, losses = np.array([b[0] for b in batches]), np.array([b[1] for b in batches])
    measured = [(b[0], b[2]) for b in batches if b[2] is not None]
    assert epoch.means()["loss"] == pytest.approx(np.average(losses, weights=samples), rel=1e-12)
    if measured:
        weights, values = zip(*measured, strict=True)
        assert epoch.means()["tweo_loss"] == pytest.approx(np.average(values, weights=weights), rel=1e-12)
    assert epoch.peaks() == [max(b[3][i] for b in batches) for i in range(2)]


@settings(derandomize=True, deadline=None)
@given(micro_batches, st.sets(st.integers(0, 30)), st.integers(0, 30))
def test_sums_depend_to_no_bit_on_log_lines_and_checkpoints_between(batches, logged, saved):
    straight, broken = EpochMeters(NAMES, CPU), EpochMeters(NAMES, CPU)
    for index, batch in enumerate(batches):
        count(straight, *batch)
        count(broken, *batch)
        if index in logged:
            broken.means(), broken.peaks()
        if index == saved:
            state = broken.state_dict()
            broken = EpochMeters(NAMES, CPU)
            broken.load_state_dict(state)
    assert (broken.means(), broken.peaks()) == (straight.means(), straight.peaks())


def test_a_peak_that_is_no_number_stays():
    epoch = EpochMeters(NAMES, CPU)
    for peak in (1.0, math.nan, 2.0):
        count(epoch, 1, 0.5, None, (peak, 3.0))
    assert math.isnan(epoch.peaks()[0])
    assert epoch.peaks()[1] == 3.0


def test_the_sums_of_a_checkpoint_of_an_earlier_version_are_taken_up():
    peaks = torch.tensor([2.0, 9.0])
    sums = torch.tensor([8.0, 6.0, 1.5], dtype=torch.float64)
    epoch = EpochMeters(NAMES, CPU)
    epoch.load_state_dict({"sums": sums, "counts": [4, 4, 2], "peaks": peaks, "outliers": {}})
    count(epoch, 4, 4.0, 0.25, (5.0, 3.0))
    assert epoch.means() == {"loss": (8 + 16) / 8, "task_loss": (6 + 8) / 8, "tweo_loss": (1.5 + 1.0) / 6}
    assert epoch.peaks() == [5.0, 9.0]
    assert peaks.tolist() == [2.0, 9.0]


def test_nothing_counted_is_zero():
    assert EpochMeters([], CPU).means() == {"loss": 0.0, "task_loss": 0.0, "tweo_loss": 0.0}
    assert EpochMeters([], CPU).peaks() == []
