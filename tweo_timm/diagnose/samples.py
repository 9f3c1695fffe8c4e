"""The images that a diagnosis measures on, as batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def as_batches(images: Tensor | Iterable[Tensor], batch_size: int = 16) -> list[Tensor]:
    """Return images as batches: a tensor (B, C, H, W) is split, an iterable of batches is listed.

    Raises:
        ValueError: without images.
    """
    batches = list(torch.split(images, batch_size)) if isinstance(images, Tensor) else list(images)
    if not sum(len(batch) for batch in batches):
        raise ValueError("there is no image to measure on: pass a batch of preprocessed images (B, C, H, W)")
    return batches
