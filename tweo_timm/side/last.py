"""LAST: a side network of low-rank attention that corrects the frozen stream group by group.

    u_0 = z_0,   u_i = block_i(u_{i-1} + z_i),   logits = head(u_m - (z_0 + ... + z_{m-1}))

Each block stacks low-rank attention modules, residual each, so that the head reads z_m plus what the side network has
added; gradients never enter the backbone. Source: arXiv:2402.04009. Not public there, and ours: the defaults, what
begins where (attention.py), the head.
"""

from __future__ import annotations

from torch import Tensor, nn

from tweo_timm.side.basis import OwnBasis
from tweo_timm.side.config import SideConfig
from tweo_timm.side.head import Head
from tweo_timm.side.network import SideNetwork


class Last(SideNetwork):
    """LAST (arXiv:2402.04009) beside a frozen backbone; the defaults are ours, the paper's are not public.

    Args:
        backbone: any model whose transformer blocks return streams of one shape. It is frozen in place.
        num_classes: classes.
        rank: r, of queries, keys and values.
        gap: g, blocks of the backbone in a group.
        modules_per_block: T, low-rank attention modules in a side block.
        num_heads: attention heads, which share the rank.
        drop: dropout before the classifier.
        drop_path: stochastic depth of the attention modules.
        blocks: regular expression naming the backbone's blocks by hand; None finds them by structure.
        basis: that which a rotated backbone had before; None for one that is as it was made.

    Attributes:
        blocks: the side blocks, one for each group.

    Raises:
        ValueError: the settings are out of range, or do not fit the backbone.
    """

    name = "last"

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
        super().__init__(backbone, num_classes, config, blocks, summed=False, basis=basis)
        self.blocks = nn.ModuleList(
            nn.Sequential(*self._modules_of(modules_per_block)) for _ in range(self.reading.count - 1)
        )
        self.head = Head(backbone, self.reading.dim, num_classes, drop, basis)

    def tokens(self, features: Tensor) -> Tensor:
        """Return u_m - (z_0 + ... + z_{m-1}), (B, N, C), of z_0 ... z_m, (B, m + 1, N, C)."""
        u = features[:, 0]
        for index, block in enumerate(self.blocks, start=1):
            u = block(u + features[:, index])
        return u - features[:, :-1].sum(1)
