"""A fixed random sample of a data set: the images that calibrate and diagnose, for every command."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset


def fixed_sample(dataset: Any, count: int, batch_size: int, seed: int, workers: int) -> list[Tensor]:
    """Read a random sample of a data set, or the first images of a stream.

    Args:
        dataset: what `open_dataset` returned, with its transform set.
        count: how many images, fewer if the split is smaller.
        batch_size: images in a batch.
        seed: chooses the images.
        workers: loader processes.

    Returns:
        Batches (B, C, H, W), float32, on the CPU.
    """
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return list(_rebatched(dataset, count, batch_size))
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count]
    batches: DataLoader[Any] = DataLoader(Subset(dataset, chosen.tolist()), batch_size=batch_size, num_workers=workers)
    images = [images for images, _ in batches]
    dataset.alterations.report()
    return images


def _rebatched(dataset: Any, count: int, batch_size: int) -> Iterator[Tensor]:
    images: list[Tensor] = []
    for image, _ in dataset:
        images.append(image)
        if len(images) == min(batch_size, count):
            yield torch.stack(images)
            count -= len(images)
            images = []
        if count == 0:
            return
    if images:
        yield torch.stack(images)
