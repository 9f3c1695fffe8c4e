"""The settings of TWEO, the weight of its penalty over time, and its flags.

    L_total = L_task + weight(t) * L_TWEO        (arXiv:2511.23225; no official code is public)

Imports no torch, so that a command can read its settings before it waits for it. loss.py has the penalty itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tweo_timm.settings import (
    ABOVE_0,
    AT_LEAST_0,
    FRACTION,
    Bounds,
    Decides,
    SettingError,
    check_settings,
    flag,
    setting,
)

SCHEDULES = ("constant", "cosine", "linear")
REDUCTIONS = ("block", "element")
AUTO = "auto"
AUTO_BALANCE = 0.1
"""The share of the task's gradient that `--tweo-weight auto` allows the penalty's."""


@dataclass(frozen=True)
class TweoConfig:
    """Settings of the TWEO term. The defaults are the paper's.

    Attributes:
        weight: lambda, the factor of the penalty in the loss; 0 measures without acting.
        tau: the magnitude that costs 1 per element; the paper's useful range is 2 to 5.
        power: p, the exponent. With 4, half of tau costs 0.0625 and ten times tau costs 10000.
        eps: added to tau.
        schedule: how the weight moves from `weight` to `end_weight`: 'constant', 'cosine' or 'linear'.
        end_weight: the weight at the end of the window. Larger than `weight`, it makes a ramp, as a retrofit needs.
        reduction: 'block' is the paper's mean of the blocks' means; 'element' weighs every activation alike, so that
            the small last stages of a hierarchical model do not count eight times as much per element as the first.
        start: fraction of the training at which the weight begins to move.
        end: fraction of the training at which it has reached `end_weight`.
        balance: r, above 0: the weight is lower where the penalty's gradient would be more than this share of the
            task's (`tweo_timm.balance`); 0: the weight is what the schedule says. Not the paper's.

    Raises:
        ValueError: for a value out of range; the message names it and what is accepted.
        TypeError: for a value of the wrong type.
    """

    weight: float = setting(0.01, Bounds(0, 1e30), hint="0: off; 0.01 in the paper")
    tau: float = setting(3.0, Bounds(1e-3, 1e30), hint="3 in the paper")
    power: float = setting(4.0, Bounds(1, 64, open="low"), hint="4 in the paper")
    eps: float = setting(1e-6, AT_LEAST_0)
    schedule: str = setting("constant", choices=SCHEDULES)
    end_weight: float = setting(0.0, Bounds(0, 1e30))
    reduction: str = setting("block", choices=REDUCTIONS)
    start: float = setting(0.0, FRACTION)
    end: float = setting(1.0, FRACTION)
    balance: float = setting(0.0, AT_LEAST_0, hint="0: off; 0.1 under --tweo-weight auto")

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.start < self.end:
            raise SettingError("TweoConfig", "start", self.start, f"below the end of the window, which is {self.end:g}")
        still = {"end_weight": 0.0, "start": 0.0, "end": 1.0}
        moved = [name for name, value in still.items() if getattr(self, name) != value]
        if self.schedule == "constant" and moved:
            value = getattr(self, moved[0])
            raise SettingError(
                "TweoConfig",
                moved[0],
                value,
                f"{still[moved[0]]:g} under the constant schedule, which does not move the weight; "
                "choose schedule cosine or linear to use it",
            )

    def weight_at(self, progress: float) -> float:
        """Return the weight of the penalty at a point of the training.

        Args:
            progress: fraction of the optimizer updates done, 0 to 1.

        Raises:
            ValueError: if `progress` is outside [0, 1].
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress is a fraction of the training, 0 to 1, not {progress}")
        if self.schedule == "constant":
            return self.weight
        moved = min(max((progress - self.start) / (self.end - self.start), 0.0), 1.0)
        if self.schedule == "cosine":
            moved = 0.5 * (1 - math.cos(math.pi * moved))
        return self.weight + (self.end_weight - self.weight) * moved


@dataclass(frozen=True)
class TweoOptions:
    """TWEO: the penalty on extreme activations."""

    DECIDES = Decides.TRAINING

    tweo_weight: float | Literal["auto"] = flag(
        0.0, "Weight of the penalty; 0: off, the paper: 0.01, auto: less where it would pull harder than the task."
    )
    tweo_tau: float = flag(TweoConfig.tau, "Magnitude above which activations cost.")
    tweo_power: float = flag(TweoConfig.power, "Power of the cost; above 1.")
    tweo_schedule: str = flag(TweoConfig.schedule, "Course of the weight over the run.", choices=SCHEDULES)
    tweo_end_weight: float = flag(TweoConfig.end_weight, "Weight at the end of a cosine or linear schedule.")
    tweo_reduction: str = flag(
        TweoConfig.reduction, "Mean per block, then over blocks (the paper), or over all elements.", choices=REDUCTIONS
    )
    tweo_start: float = flag(TweoConfig.start, "Fraction of the run at which the schedule begins.")
    tweo_end: float = flag(TweoConfig.end, "Fraction of the run at which the schedule ends.")
    tweo_blocks: str | None = flag(
        None, "Names the transformer blocks where they are not found.", metavar="REGEX", decides=Decides.MODEL
    )
    outlier_interval: int = flag(
        50, "Batches between outlier statistics in training; 0: none.", bounds=AT_LEAST_0, decides=Decides.RECORDS
    )
    stop_on_peak: float | None = flag(None, "Stop the run when an activation exceeds this magnitude.", bounds=ABOVE_0)

    @property
    def tweo_acts(self) -> bool:
        """Whether the penalty has a weight at some time."""
        return self.tweo_weight == AUTO or float(self.tweo_weight) > 0 or self.tweo_end_weight > 0

    def tweo_config(self) -> TweoConfig:
        """The settings of the penalty.

        Raises:
            ValueError: for a value that is not accepted; the message names the flag.
        """
        names = ("weight", "tau", "power", "schedule", "end_weight", "reduction", "start", "end")
        values = {name: getattr(self, f"tweo_{name}") for name in names}
        if values["weight"] == AUTO:
            values |= {"weight": TweoConfig.weight, "balance": AUTO_BALANCE}
        try:
            return TweoConfig(**values)
        except SettingError as error:
            raise ValueError(error.spelled(f"--tweo-{error.name.replace('_', '-')}")) from error
