"""Three verdicts: they follow the interval, and few images decide nothing."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tweo_timm.survey.decide import decide, drop_interval


def outcome(right, count, not_finite=0):
    correct = torch.arange(count) < right
    return SimpleNamespace(correct=correct, not_finite=not_finite)


@pytest.mark.parametrize(
    ("right", "count", "survives", "verdict"),
    [
        (8000, 10000, True, "survives"),
        (7950, 10000, True, "survives"),
        (7800, 10000, False, "does not"),
        (7910, 10000, True, "not decided by 10000 images"),
        (64, 64, True, "not decided by 64 images"),
        (63, 64, False, "not decided by 64 images"),
        (10, 64, False, "does not"),
    ],
)
def test_the_verdict_is_what_the_images_can_tell(right, count, survives, verdict):
    before = outcome(8000 if count == 10000 else 64, count)
    found = decide(before, outcome(right, count), 1.0)
    assert (found.survives, found.verdict) == (survives, verdict)


def test_outputs_that_are_not_finite_do_not_survive():
    found = decide(outcome(9, 10), outcome(9, 10, not_finite=1), 100.0)
    assert (found.survives, found.verdict, found.top1) == (False, "does not", None)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_the_interval_holds_the_drop_and_has_a_width(pairs):
    before, after = (torch.tensor([pair[side] for pair in pairs]) for side in (0, 1))
    drop, low, high = drop_interval(before, after)
    assert drop == pytest.approx(100 * (float(before.double().mean()) - float(after.double().mean())), abs=1e-9)
    assert low < high
    assert low <= drop + 1e-9
    assert drop <= high + 1e-9
