"""A head that returns the features: what lets a model without one be rotated with no word to its users.

Without a head the last norm's output is the model's, and its gains, shift and basis cannot change unnoticed. An
identity behind it, in the place of a classifier, is a reader like any other: the gains, the shift and the basis fold
into it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tweo_timm.families import describe_stream


@torch.no_grad()
def add_feature_head(model: nn.Module) -> int:
    """Give a model without a head one that returns its features, in place.

    Returns:
        How many classes the model has now: `timm.create_model(arch, num_classes=...)` builds it.

    Raises:
        ValueError: if the model has a head, or its output does not depend on the stream's basis.
    """
    stage = describe_stream(model).stages[-1]
    if stage.features is None:
        raise ValueError("the model has a head already, or a pool that hides the basis: it is rotated as it is")
    if not hasattr(model, "reset_classifier"):
        raise ValueError(
            f"{type(model).__name__} is no model of timm, and takes no head: rotate it with "
            "allow_rotated_features=True, and take its features back by RotatedFeatures"
        )
    bare: Any = model
    bare.reset_classifier(stage.width)
    for head in bare.get_classifier() if isinstance(bare.get_classifier(), tuple) else (bare.get_classifier(),):
        head.weight.copy_(torch.eye(stage.width))
        head.bias.zero_()
    return stage.width
