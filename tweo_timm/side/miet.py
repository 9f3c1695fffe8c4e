"""MIET: a large frozen model sends the sum of its streams, and a small network at the edge learns from that alone.

    s = z_0 + ... + z_m,   logits = head(module_T(... module_1(s)))

`features` is what the large model computes, `logits` what the edge does; `message_bytes` is what travels in between.
Source: arXiv:2406.17559 (its third version calls it MIST, CVPR 2025). Not public there, and ours: the small network,
which is the low-rank attention of LAST, the head, and the defaults.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tweo_timm.side.basis import OwnBasis
from tweo_timm.side.config import SideConfig
from tweo_timm.side.head import Head
from tweo_timm.side.network import SideNetwork

MESSAGE_BITS = (16, 8)
"""In which a message may be sent: float16, or integers within +-127 with one float32 scale an image."""


class Miet(SideNetwork):
    """MIET (arXiv:2406.17559) on a frozen backbone; the defaults are ours, the paper's are not public.

    Args:
        backbone: any model whose transformer blocks return streams of one shape. It is frozen in place.
        num_classes: classes.
        rank: of queries, keys and values.
        gap: blocks of the backbone between two streams that are added up.
        modules_per_block: low-rank attention modules in all.
        num_heads: attention heads, which share the rank.
        drop: dropout before the classifier.
        drop_path: stochastic depth of the attention modules.
        blocks: regular expression naming the backbone's blocks by hand; None finds them by structure.
        basis: that which a rotated backbone had before; None for one that is as it was made.

    Attributes:
        edge: the attention modules.

    Raises:
        ValueError: the settings are out of range, or do not fit the backbone.
    """

    name = "miet"

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        rank: int = SideConfig.rank,
        gap: int = SideConfig.gap,
        modules_per_block: int = SideConfig.modules_per_block,
        num_heads: int = SideConfig.num_heads,
        drop: float = SideConfig.drop,
        drop_path: float = SideConfig.drop_path,
        blocks: str | None = None,
        basis: OwnBasis | None = None,
    ) -> None:
        config = SideConfig(rank, gap, modules_per_block, num_heads, drop, drop_path)
        super().__init__(backbone, num_classes, config, blocks, summed=True, basis=basis)
        self.edge = nn.Sequential(*self._modules_of(modules_per_block))
        self.head = Head(backbone, self.reading.dim, num_classes, drop, basis)

    def tokens(self, features: Tensor) -> Tensor:
        """Return the edge's tokens (B, N, C) of the sum (B, 1, N, C)."""
        tokens: Tensor = self.edge(features[:, 0])
        return tokens


def message_bytes(tokens: int, dim: int, bits: int) -> int:
    """Return the bytes of one image's message of N tokens and width C.

    Raises:
        ValueError: another number of bits than 16 or 8.
    """
    _check_bits(bits)
    return tokens * dim * bits // 8 + (4 if bits == 8 else 0)


def _check_bits(bits: int) -> None:
    if bits not in MESSAGE_BITS:
        raise ValueError(f"bits is {bits}; messages are sent in 16 or 8")


def in_transit(message: Tensor, bits: int) -> Tensor:
    """Return messages as they arrive when they were sent in few bits.

    Args:
        message: (B, 1, N, C).
        bits: 16 or 8; see `MESSAGE_BITS`.

    Raises:
        ValueError: another number of bits.
    """
    _check_bits(bits)
    if bits == 16:
        return message.half().to(message.dtype)
    step = message.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-30) / 127
    return torch.round(message / step) * step
