"""Calibration images as a caller gives them: any iterable of batches, or one batch.

A loader of images and labels is refused by name: a model that is called with a pair ends in an error about something
else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def image_batches(batches: Iterable[Any]) -> list[Tensor]:
    """Return calibration batches as a list of tensors; a tensor alone is one batch.

    Raises:
        ValueError: if a batch is no tensor.
    """
    found = [batches] if isinstance(batches, Tensor) else list(batches)
    for batch in found:
        if not isinstance(batch, Tensor):
            pair = isinstance(batch, (tuple, list)) and len(batch) == 2
            remedy = "images and labels? pass [images for images, _ in loader]" if pair else "pass batches of images"
            raise ValueError(f"a calibration batch is a {type(batch).__name__}, and not a tensor of images: {remedy}")
    return found
