"""Records: what a diagnosis returns, as plain values that json.dumps writes and every JSON reader reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def plain(value: Any) -> Any:
    """Turn tensors, arrays and tuples into plain numbers and lists, and numbers that are not finite into None.

    JSON has no NaN or infinity: readers other than Python's refuse a file that holds them.
    """
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def as_batches(images: Tensor | Iterable[Tensor], batch_size: int = 16) -> list[Tensor]:
    """Return images as batches: a tensor (B, C, H, W) is split, an iterable of batches is listed.

    Raises:
        ValueError: without images.
    """
    batches = list(torch.split(images, batch_size)) if isinstance(images, Tensor) else list(images)
    if not sum(len(batch) for batch in batches):
        raise ValueError("there is no image to measure on: pass a batch of preprocessed images (B, C, H, W)")
    return batches
