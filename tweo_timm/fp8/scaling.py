"""Per-tensor scales: delayed, bit for bit as Transformer Engine's fused kernel computes them, and current.

A scale multiplies a tensor before it is rounded to FP8, so that its largest magnitude lands on the largest FP8
value. A delayed scale is computed from the maxima of earlier steps, so a tensor is read once; the price is a scale
that may be stale. The update below is the algorithm of the kernel ``delayed_scaling.cu`` of Transformer Engine 2.20:
a zero maximum does not roll the history, NaN is ignored, infinity keeps the old scale, the division is a true
float32 division. Transformer Engine's own Python fallback differs from that kernel in each of these and is not the
reference.

All functions are pure: they return new tensors, so a scale saved for a backward pass is never changed under it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tweo_timm.fp8.recipe import Fp8Recipe

_FLOAT32_MAX = torch.finfo(torch.float32).max

# A running maximum that nothing was recorded into. Below every real maximum, so that "did not run" differs from "was
# all zero".
NOT_SEEN = -1.0


def delayed_update(
    scale: Tensor, history: Tensor, amax: Tensor, *, fp8_max: float, margin: int, algorithm: str
) -> tuple[Tensor, Tensor]:
    """Compute the next scales and histories of many tensors at once.

    Args:
        scale: float32, shape ``[S]``, the scales in use.
        history: float32, shape ``[L, S]``, oldest at row 1 and newest at row L - 1; row 0 is the kernel's slot for
            the running maximum.
        amax: float32, shape ``[S]``, the maxima of this step after reduction over ranks.
        fp8_max: the largest value of the FP8 format.
        margin: powers of two left free below ``fp8_max``.
        algorithm: ``'max'`` or ``'most_recent'``.

    Returns:
        The new ``scale`` and ``history``.
    """
    last = torch.where(amax != 0, amax, history[0])
    seen = last != 0
    rolled = torch.cat([history[1:], last[None]])
    window = torch.where(rolled.isnan(), 0.0, rolled).amax(0)
    peak = last if algorithm == "most_recent" else torch.where(seen, window, 0.0)
    kept = torch.cat([torch.zeros_like(rolled[:1]), rolled[1:]])
    return _scale_from(peak, fp8_max, margin, otherwise=scale), torch.where(seen, kept, history)


def current_scale(amax: Tensor, *, fp8_max: float, margin: int) -> Tensor:
    """Return the scale that puts ``amax`` on ``fp8_max``; 1 where ``amax`` is zero, infinite or NaN."""
    return _scale_from(amax, fp8_max, margin, otherwise=torch.ones_like(amax))


def _scale_from(amax: Tensor, fp8_max: float, margin: int, otherwise: Tensor) -> Tensor:
    usable = amax.isfinite() & (amax > 0)
    # Not `fp8_max / amax`: PyTorch computes that as a reciprocal and a product, one unit off for a quarter of all
    # values.
    quotient = torch.div(torch.full_like(amax, fp8_max * 2.0**-margin), amax)
    scale = torch.where(usable, quotient, otherwise)
    return torch.where(scale.isinf(), _FLOAT32_MAX, scale)


@dataclass
class DelayedScales:
    """The delayed-scaling state of one direction (forward or backward) of a whole model, one column a tensor.

    Attributes:
        scale: float32 ``[S]``. Replaced at each update, never written in place.
        history: float32 ``[L, S]``. Replaced at each update.
        amax: float32 ``[S]``, the running maxima since the last update, written in place; NOT_SEEN where nothing was
            recorded.
    """

    scale: Tensor
    history: Tensor
    amax: Tensor

    @classmethod
    def create(cls, num_tensors: int, recipe: Fp8Recipe, device: torch.device) -> DelayedScales:
        """Return the state before the first step: scales of one and empty histories."""
        return cls(
            scale=torch.ones(num_tensors, device=device),
            history=torch.zeros(recipe.amax_history_len, num_tensors, device=device),
            amax=torch.full((num_tensors,), NOT_SEEN, device=device),
        )

    def update(self, recipe: Fp8Recipe, fp8_max: float) -> None:
        """Fold the running maxima into the histories, compute the next scales and start over."""
        self.scale, self.history = delayed_update(
            self.scale,
            self.history,
            self.amax.clamp_min(0.0),
            fp8_max=fp8_max,
            margin=recipe.margin,
            algorithm=recipe.amax_compute_algo,
        )
        self.amax.fill_(NOT_SEEN)

    def to(self, device: torch.device) -> None:
        """Move the state to ``device``."""
        self.scale, self.history, self.amax = (t.to(device) for t in (self.scale, self.history, self.amax))
