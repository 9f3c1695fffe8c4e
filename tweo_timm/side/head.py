"""What a side network classifies by: the last norm, pooling and a linear layer, all trained.

Source: ours; the papers do not say. It reads tokens as the backbone's own head would, without keeping anything of the
backbone for the backward pass: its norm is a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import global_pool_nlc, trunc_normal_
from torch import Tensor, nn

from tweo_timm.side.basis import OwnBasis

POOLS = ("token", "avg", "avgmax", "max")


class Head(nn.Module):
    """Norm, pooling, dropout and a linear layer.

    Args:
        backbone: its last norm is where the norm begins, if it has one of this width; its `global_pool` is the pooling.
        dim: width of the tokens.
        num_classes: classes.
        drop: dropout before the linear layer.
        basis: of a rotated backbone, with the norm that it had before.

    Attributes:
        pool: how tokens become one vector: "token" (the first), "avg", "avgmax" or "max" (of the patches).
        num_prefix_tokens: how many tokens are no patches.
        fc: the linear layer.
    """

    def __init__(
        self, backbone: nn.Module, dim: int, num_classes: int, drop: float = 0.0, basis: OwnBasis | None = None
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = int(getattr(backbone, "num_prefix_tokens", 0))
        self.pool = _pool(backbone, self.num_prefix_tokens)
        self.norm = _norm(getattr(backbone, "norm", None) if basis is None else basis.norm, dim)
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(dim, num_classes)
        trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) of tokens (B, N, C)."""
        pooled = global_pool_nlc(self.norm(x), pool_type=self.pool, num_prefix_tokens=self.num_prefix_tokens)
        logits: Tensor = self.fc(self.drop(pooled))
        return logits


def _pool(backbone: Any, num_prefix_tokens: int) -> str:
    asked = getattr(backbone, "global_pool", None)
    if asked in POOLS and (asked != "token" or num_prefix_tokens):
        return str(asked)
    return "token" if getattr(backbone, "cls_token", None) is not None and num_prefix_tokens else "avg"


def _norm(theirs: nn.Module | None, dim: int) -> nn.LayerNorm:
    if not isinstance(theirs, nn.LayerNorm) or theirs.normalized_shape != (dim,):
        return nn.LayerNorm(dim, eps=1e-6)
    norm = nn.LayerNorm(dim, eps=theirs.eps)
    with torch.no_grad():
        for mine, other in ((norm.weight, theirs.weight), (norm.bias, theirs.bias)):
            if other is not None:
                mine.copy_(other)
    return norm
