"""Float64 on every device: sums, solves and exact products are made on the CPU where the device has none.

Apple's GPU has no float64, nor have some of Intel's. Whether a device has it is tried, not looked up.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def has_float64(device_type: str) -> bool:
    """Say whether a kind of device, as torch names it, computes in float64; tried once per process."""
    try:
        torch.ones(1, dtype=torch.float64, device=device_type).add_(1)
    except (TypeError, RuntimeError):  # Apple's, Intel's
        return False
    return True


def wide(x: Tensor) -> Tensor:
    """Return a tensor as float64, on its own device if that can hold it and on the CPU otherwise."""
    return x.double() if has_float64(x.device.type) else x.cpu().double()


def back(x: Tensor, device: torch.device) -> Tensor:
    """Return what was computed from `wide` tensors to a device: as it is, or as float32 where there is no float64."""
    return x if x.device == device else x.float().to(device)
