"""max |x| of several tensors in every step, in the form that costs a step least.

On a CPU those are numbers: to make a tensor of six of them takes longer there than the arithmetic of finding them. On
other devices it is a tensor, because reading a number would wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Peaks = list[float] | Tensor
"""max |x| of each of several tensors: a list on a CPU, float32 (L,) on the device elsewhere, and in compiled code."""


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return min x and max x of a floating tensor that has elements: scalars of its dtype, without gradients."""
    low, high = torch.aminmax(x.detach())
    return low, high


def peak_magnitudes(found: Sequence[tuple[Tensor, Tensor]]) -> Peaks:
    """Return max |x| of each of several tensors from their `extremes`, in one go for all."""
    if found[0][0].device.type == "cpu" and not torch.compiler.is_compiling():
        return [max(abs(low.item()), abs(high.item())) for low, high in found]
    return torch.stack([end for ends in found for end in ends]).abs_().view(-1, 2).amax(1).float()


def as_tensor(peaks: Peaks) -> Tensor:
    """Return peaks as float32 (L,)."""
    return torch.tensor(peaks, dtype=torch.float32, device="cpu") if isinstance(peaks, list) else peaks


def as_numbers(peaks: Peaks) -> list[float]:
    """Return peaks as numbers; waits for the device of a tensor."""
    return peaks if isinstance(peaks, list) else peaks.tolist()


def largest(peaks: Peaks) -> Tensor:
    """Return the largest peak, NaN if one is, as a float32 scalar where the peaks are."""
    if isinstance(peaks, list):
        total = sum(peaks)  # NaN if one is: Python's max may pass over it
        return torch.tensor(total if math.isnan(total) else max(peaks), dtype=torch.float32, device="cpu")
    return peaks.amax()
