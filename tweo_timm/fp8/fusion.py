"""Which LayerNorm of a timm model feeds exactly one linear layer, so that the two may become one fused kernel.

Only layouts that were read and understood are listed; anything else stays two layers. Left out on purpose: gated
attention (the gate reads the norm's output too), Swin's first norm (windows may be padded after it), and every block
that normalises after the branch.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from timm.layers import GELUTanh, LayerNorm, Mlp
from timm.layers.attention import Attention
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import nn


class FusedPair(NamedTuple):
    """A norm and the one linear layer that reads its output, by name."""

    norm: str
    linear: str


def norm_linear_pairs(model: nn.Module) -> list[FusedPair]:
    """Return the norm and linear layers of ``model`` that may be fused."""
    pairs = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for norm, linear in _pairs_of(module):
            if is_plain_norm(model.get_submodule(prefix + norm)):
                pairs.append(FusedPair(prefix + norm, prefix + linear))
    return pairs


def mlp_names(model: nn.Module) -> list[FusedPair]:
    """Return the norm and the MLP that reads it where the GELU is the tanh one; no other can be fused exactly."""
    found = []
    for name, module in model.named_modules():
        if type(module) is not Block or not _is_plain_mlp(module.mlp) or not is_plain_norm(module.norm2):
            continue
        activation = module.mlp.act
        tanh = type(activation) is GELUTanh or (type(activation) is nn.GELU and activation.approximate == "tanh")
        if tanh and module.mlp.drop1.p == 0:
            found.append(FusedPair(f"{name}.norm2", f"{name}.mlp"))
    return found


def is_plain_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a LayerNorm over the last dimension with a weight and a bias.

    Subclasses are not, such as timm's LayerNorm2d, which normalises another dimension.
    """
    if type(module) not in (nn.LayerNorm, LayerNorm):
        return False
    norm = cast(nn.LayerNorm, module)
    return len(norm.normalized_shape) == 1 and norm.bias is not None


def _pairs_of(module: Any) -> list[tuple[str, str]]:
    if type(module) is PatchMerging:
        return [("norm", "reduction")]
    if type(module) not in (Block, SwinTransformerBlock):
        return []
    pairs = [("norm2", "mlp.fc1")] if _is_plain_mlp(module.mlp) else []
    if type(module) is Block and type(module.attn) is Attention and module.attn.gate is None:
        pairs.append(("norm1", "attn.qkv"))
    return pairs


def _is_plain_mlp(module: Any) -> bool:
    return type(module) is Mlp and isinstance(module.fc1, nn.Linear) and type(module.norm) is nn.Identity
