"""Accuracy of a model without a head: is the image whose features are nearest of the same class?

Each image is given the class of its nearest neighbour among the other images of the split, by cosine. Neighbours are
looked for among the float model's features, whatever precision the image itself was computed in: that is how stored
features meet new ones. No training, no further images; the number depends on the split, and is comparable within it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tweo_timm.evaluate.images import Images
from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.run.dataset import place
from tweo_timm.run.passes import batches
from tweo_timm.run.world import World

_CHUNK = 1024
"""Images compared with all others at a time."""


@dataclass
class Neighbourhood:
    """The outcome of one pass over the split.

    Attributes:
        correct: whether each image's nearest neighbour is of its class, bool (N,).
        not_finite: how many images have features that are not finite.
    """

    correct: Tensor
    not_finite: int


class NearestNeighbours:
    """Judges models without a head on one split; the first, the float model, is the one whose features are stored.

    Args:
        images: the split.
        options: how images are placed.
        world: the device.
    """

    def __init__(self, images: Images, options: ValidateOptions, world: World) -> None:
        self._images, self._options, self._world = images, options, world
        self._bank: Tensor | None = None

    @torch.inference_mode()
    def __call__(self, model: Callable[[Tensor], Any]) -> Neighbourhood:
        """Run a model over the split; it returns features (B, D)."""
        seen, truths = [], []
        for batch, targets, real in batches(
            self._images.loader, lambda batch: place(batch, self._options, self._world.device)
        ):
            if real:
                seen.append(model(batch).flatten(1).float().cpu())
                truths.append(targets.cpu())
        features, classes = torch.cat(seen), torch.cat(truths)
        self._bank = features if self._bank is None else self._bank
        right = nearest_are_right(features, classes, self._bank)
        return Neighbourhood(right, int((~features.isfinite().all(-1)).sum()))


def nearest_are_right(features: Tensor, targets: Tensor, bank: Tensor) -> Tensor:
    """Say which images have a nearest neighbour of their own class.

    Args:
        features: (N, D), of the model that is judged.
        targets: classes, (N,).
        bank: (N, D), the float model's features of the same images in the same order.

    Returns:
        bool (N,); never of an image whose own features are not finite.
    """
    bank = torch.nn.functional.normalize(bank.double(), dim=1)
    found = []
    for start in range(0, len(features), _CHUNK):
        chunk = features[start : start + _CHUNK]
        similar = torch.nn.functional.normalize(chunk.double(), dim=1) @ bank.T
        own = torch.arange(len(chunk))
        similar[own, start + own] = -torch.inf
        nearest = similar.nan_to_num(-torch.inf).argmax(1)
        found.append((targets[nearest] == targets[start : start + _CHUNK]) & chunk.isfinite().all(1))
    return torch.cat(found)
