"""Whether a format survives: three verdicts, because a few images decide little.

A format survives if its outputs are finite and it loses at most so many points of Top-1. Whether the images at hand can
tell is another question: the drop is known within an interval, and where the limit lies inside it the verdict is "not
decided by N images". The interval is Bonett and Price's for paired proportions (2012): Wald's, with one more image on
either side, since Wald's own has no width where no image changed, as if seven images could prove anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

from torch import Tensor

SURVIVES, FAILS = "survives", "does not"


class Outcome(Protocol):
    """How a model did on the images.

    Attributes:
        correct: whether each image's first guess was right, bool (N,).
        not_finite: how many images have outputs that are not finite.
    """

    correct: Tensor
    not_finite: int


@dataclass(frozen=True)
class Decision:
    """What is known about the loss of one format.

    Attributes:
        top1: percent; None where outputs are not finite.
        drop: points of Top-1 lost against float; None likewise.
        interval: 95 % of the drop, points; None likewise.
        survives: finite, and the drop is at most the limit.
        verdict: "survives", "does not" or "not decided by N images".
    """

    top1: float | None
    drop: float | None
    interval: list[float] | None
    survives: bool
    verdict: str


def decide(before: Outcome, after: Outcome, max_drop: float) -> Decision:
    """Compare a model in a format with itself in float, image by image.

    Args:
        before: in float.
        after: in the format, on the same images.
        max_drop: points of Top-1 that may be lost.
    """
    if after.not_finite:
        return Decision(None, None, None, False, FAILS)
    drop, low, high = drop_interval(before.correct, after.correct)
    survives = drop <= max_drop + 1e-9
    verdict = f"not decided by {len(before.correct)} images"
    if high <= max_drop:
        verdict = SURVIVES
    elif low > max_drop:
        verdict = FAILS
    return Decision(top1_of(after), drop, [low, high], survives, verdict)


def top1_of(outcome: Outcome) -> float:
    """Return the share of images that were right, percent: of those guesses that are compared, where logits tie."""
    return 100 * float(outcome.correct.double().mean())


def drop_interval(before: Tensor, after: Tensor) -> tuple[float, float, float]:
    """Return how many points were lost, and the ends of the 95 % interval.

    Args:
        before: whether each image was right in float, bool (N,).
        after: the same in the format.
    """
    count, lost, won = len(before), int((before & ~after).sum()), int((~before & after).sum())
    p_lost, p_won = (lost + 1) / (count + 2), (won + 1) / (count + 2)
    spread = math.sqrt((p_lost + p_won - (p_lost - p_won) ** 2) / (count + 2))
    reach = NormalDist().inv_cdf(0.975) * spread
    low, high = max(p_lost - p_won - reach, -1.0), min(p_lost - p_won + reach, 1.0)
    return 100 * (lost - won) / count, 100 * low, 100 * high
