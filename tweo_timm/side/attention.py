"""Low-rank self-attention, the one layer that side networks are made of.

    x + up(attention(q, k, v)),   q, k, v = qkv(norm(x)) of rank r, far below the width of x;   no MLP

Source: arXiv:2402.04009. Not public there, and ours: one head, biases, an up-projection that begins at zero (a side
network begins as a linear probe of its backbone), stochastic depth.
"""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional


class LowRankAttention(nn.Module):
    """Self-attention between tokens in `rank` dimensions, added to its input.

    Args:
        dim: width C of the tokens.
        rank: of queries, keys and values together, over all heads.
        num_heads: heads; they share the rank.
        drop_path: probability with which an image passes a layer by, in training.

    Raises:
        ValueError: `num_heads` does not divide `rank`.
    """

    def __init__(self, dim: int, rank: int, num_heads: int = 1, drop_path: float = 0.0) -> None:
        super().__init__()
        if rank % num_heads:
            raise ValueError(f"num_heads is {num_heads}; it must divide the rank, {rank}")
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * rank)
        self.up = nn.Linear(rank, dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, N, C) of tokens (B, N, C)."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.up(attended.transpose(1, 2).reshape(batch, tokens, -1))
        return torch.add(x, self.drop_path(y))
