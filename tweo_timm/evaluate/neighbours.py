"""Accuracy of a model without a head: is the image whose features are nearest of the same class?

Each image is given the class of its nearest neighbour among the other images of the split, by cosine. Neighbours are
looked for among the float model's features, whatever precision the image itself was computed in: that is how stored
features meet new ones. No training, no further images; the number depends on the split, and is comparable within it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1024
"""Images compared with all others at a time."""


def nearest_are_right(features: Tensor, targets: Tensor, bank: Tensor) -> dict[int, Tensor]:
    """Say which images have one of their own class among their nearest neighbours.

    Args:
        features: (N, D), of the model that is judged.
        targets: classes, (N,).
        bank: (N, D), the float model's features of the same images in the same order.

    Returns:
        1 and 5 -> bool (N,): whether the nearest is, and whether one of the five nearest is.
    """
    bank = torch.nn.functional.normalize(bank.double(), dim=1)
    found: dict[int, list[Tensor]] = {1: [], 5: []}
    for start in range(0, len(features), _CHUNK):
        queries = torch.nn.functional.normalize(features[start : start + _CHUNK].double(), dim=1)
        similar = queries @ bank.T
        own = torch.arange(len(queries))
        similar[own, start + own] = -torch.inf
        order = similar.nan_to_num(-torch.inf).argsort(dim=1, descending=True, stable=True)
        for count, right in found.items():
            same = targets[order[:, :count]] == targets[start : start + _CHUNK, None]
            right.append((same & torch.isfinite(similar.gather(1, order[:, :count]))).any(1))
    return {count: torch.cat(right) for count, right in found.items()}
