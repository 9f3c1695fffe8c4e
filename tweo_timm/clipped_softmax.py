"""Clipped softmax: attention whose small probabilities are exactly zero, so that a head can do nothing.

    p = clip((1 - gamma) softmax(x) + gamma, 0, 1),   gamma = -alpha / N for N keys

A plain softmax reaches zero only through large logits, which is where outliers come from by the account of Quantizable
Transformers (Bondarenko et al., 2023, arXiv:2306.12929); zeta, their upper stretch, is 1 here. What is below
alpha / (N + alpha) becomes zero and has no gradient: above N / (N - 1) alpha makes even uniform attention, a model's
first, zero throughout.

timm's attention hands its probabilities to `attn_drop`: the layer that stands there clips, before it drops. Weights and
their names do not change, and plain timm, which does not know of it, computes another function from them. Refused are
models with attention of other classes than those whose forward was read (timm 1.0.31).
"""

from __future__ import annotations

from typing import Any

from timm.layers.attention import Attention, AttentionRope
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

_KNOWN = (Attention, AttentionRope, WindowAttention)


class ClippedDropout(nn.Dropout):
    """Clips attention probabilities (..., N), and drops some of them as the dropout that it replaces did.

    Attributes:
        alpha: how many times a key's even share 1/N is taken away, before what is left of a row is stretched.
    """

    def __init__(self, alpha: float, p: float) -> None:
        super().__init__(p)
        self.alpha = alpha

    def forward(self, probabilities: Tensor) -> Tensor:
        """Return probabilities in [0, 1] of the same shape; a row's sum is at most 1."""
        gamma = -self.alpha / probabilities.shape[-1]
        return super().forward((probabilities * (1 - gamma) + gamma).clamp(0, 1))

    def extra_repr(self) -> str:
        """Name alpha beside the rate."""
        return f"alpha={self.alpha:g}, {super().extra_repr()}"


def clip_softmax(model: nn.Module, alpha: float) -> None:
    """Clip the softmax of every attention of a model, in place; its attention is not fused any more.

    Args:
        model: a ViT or Swin of timm.
        alpha: above 0; 0 changes nothing.

    Raises:
        ValueError: for a model without attention, or with attention of a class that is not known here.
    """
    if alpha == 0:
        return
    attention: list[Any] = [m for m in model.modules() if hasattr(m, "attn_drop") or hasattr(m, "fused_attn")]
    others = {type(module).__name__ for module in attention if type(module) not in _KNOWN}
    if others or not attention:
        reason = f"the attention of class {', '.join(sorted(others))} is not known" if others else "it has no attention"
        raise ValueError(f"{reason}: clipped softmax is for ViT and Swin with timm's {_names()}")
    for module in attention:
        module.fused_attn = False
        module.attn_drop = ClippedDropout(alpha, module.attn_drop.p)


def alpha_of(model: nn.Module) -> float:
    """Return the alpha with which a model's softmax is clipped; 0 where it is not."""
    return next((module.alpha for module in model.modules() if isinstance(module, ClippedDropout)), 0.0)


def _names() -> str:
    return ", ".join(kind.__name__ for kind in _KNOWN)
