"""What timm's layers do that their structure does not show, each fact once.

These are facts about layers of any family, found by their attributes and names: attention that goes past its own
module, layers that scale a branch, MLPs by their parts, networks that see coordinates instead of images, and where the
channels of a tensor stand. What is declared about whole families, so that they may be rewritten, is another kind of
knowledge and stands elsewhere. Source: timm 1.0.31.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn

_POSITION_NETWORKS = re.compile(r"(^|\.)(cpb_mlp|meta_mlp|rel_pos\w*|shared_rel_pos|pos_embed)(\.|$)")
_LAYER_SCALES = ("ls2", "gamma_2", "gamma2", "ls", "gamma")
# Two lists, because two questions are asked: of a block's first layer, and of the layers of a module that adds.
# One list for both would change the answer for MaxViT, CoAtNet, EfficientFormerV2 and others.
_READS_CHANNELS_FIRST = (nn.Conv2d, nn.Conv3d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm)
_ADDS_CHANNELS_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, LayerNorm2d)


def call_projections(model: nn.Module, chosen: Callable[[Any], bool] = lambda attention: True) -> list[nn.Module]:
    """Have attention call its ``qkv`` as a module, so that hooks and replaced layers take part.

    BEiT, EVA and SwinV2 otherwise run F.linear(x, self.qkv.weight, ...) past the module, to add their biases in the
    same call. Their own switch, ``qkv_bias_separate``, adds them afterwards: the same numbers.

    Args:
        model: any model.
        chosen: which of the modules that go past their projection to switch; all by default.

    Returns:
        The modules that were switched, for `restore_projections`.
    """
    bypassing: list[Any] = [m for m in model.modules() if getattr(m, "qkv_bias_separate", True) is False and chosen(m)]
    for module in bypassing:
        module.qkv_bias_separate = True
    return bypassing


def restore_projections(switched: Iterable[Any]) -> None:
    """Take back what `call_projections` did."""
    for module in switched:
        module.qkv_bias_separate = False


@contextlib.contextmanager
def projections_called(model: nn.Module) -> Iterator[None]:
    """Have every projection called as a module inside the context; see `call_projections`."""
    switched = call_projections(model)
    try:
        yield
    finally:
        restore_projections(switched)


def sees_images(name: str) -> bool:
    """Say whether a module of this name processes images, rather than coordinates for a position bias."""
    return _POSITION_NETWORKS.search(name) is None


def layer_scale_of(owner: nn.Module) -> Tensor | None:
    """Return the factors (C,) by which a block multiplies the output of its MLP; None if it has none.

    Args:
        owner: the module that holds the MLP.
    """
    for name in _LAYER_SCALES:
        gamma: Any = getattr(owner, name, None)
        gamma = getattr(gamma, "gamma", gamma)
        if isinstance(gamma, Tensor):
            return gamma
    return None


def find_mlps(block: nn.Module) -> dict[str, nn.Module]:
    """Return the MLPs inside a block by name: modules of fc1 (fc1_g and fc1_x in SwiGLU), act and fc2."""
    return {
        name: module
        for name, module in block.named_modules()
        if hasattr(module, "fc2") and (hasattr(module, "fc1") or hasattr(module, "fc1_g")) and hasattr(module, "act")
    }


def begins_channels_first(block: nn.Module) -> bool:
    """Whether the first layer of a block with parameters reads channels from axis 1."""
    for module in itertools.islice(block.modules(), 1, None):
        if next(module.parameters(recurse=False), None) is not None:
            # timm's norms over axis 1 (LayerNorm2d, RmsNorm2d) share their bases with those over the last axis.
            return isinstance(module, _READS_CHANNELS_FIRST) or "2d" in type(module).__name__
    return False


def adds_channels_first(owner: nn.Module) -> bool:
    """Whether a module whose own code adds tensors of four axes adds them with channels on axis 1: by its children."""
    return any(isinstance(child, _ADDS_CHANNELS_FIRST) for child in owner.children())
