"""One iteration over a validation split, for whatever is measured in it.

It goes to the end of the loader in every process, also where only padding is left: a sharded model is run by all
processes together. What was announced is compared with what came: a stream that lost a shard would otherwise be
scored on the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.task.evaluator import evaluation_sample_limit
from torch import Tensor

from tweo_timm.run.pictures import UnreadableImage


def batches(loader: Any, place: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield (images, targets, real): a batch without padding, on the device, and how many of its images count.

    `real` is 0 where a process's share is padded up to the others': then one image comes all the same, for models
    that processes run together, and is to be neither scored nor recorded.

    Args:
        loader: timm's, of a split that `open_dataset` opened.
        place: brings images to the device and the dtype of the model.

    Raises:
        UnreadableImage: at the end, if the images of a stream are not as many as it announced.
    """
    left, read = evaluation_sample_limit(loader), 0
    for images, targets in loader:
        real = len(targets) if left is None else min(left, len(targets))
        left = None if left is None else left - real
        read += real
        images = place(images[: max(real, 1)])
        yield images, targets[: max(real, 1)].to(images.device), real
    loader.dataset.alterations.report()
    _check_count(loader.dataset, read)


def _check_count(dataset: Any, read: int) -> None:
    """Compare with the announced number; not in several processes, which cut a stream unevenly and repeat a part."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    reader = getattr(dataset, "reader", None)
    announced = getattr(reader, "num_samples", None)
    if not isinstance(dataset, torch.utils.data.IterableDataset) or several or not announced or read == announced:
        return
    raise UnreadableImage(
        f"the validation split holds {read} images and {announced} were announced: complete it, or correct its "
        "description (_info.json) or the number in --num-samples, train.py: --val-num-samples"
    )
