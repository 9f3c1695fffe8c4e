"""Centring: a stream without its mean component, which every LayerNorm takes away and nobody reads.

What writes the stream may be centred over its channels, and then the stream is, exactly. By itself this gains next to
nothing in INT8; it is a part for those who build further rewritings.
"""

from __future__ import annotations

from torch import Tensor, nn

from tweo_timm.families import describe_stream
from tweo_timm.rewrite.edit import Edit
from tweo_timm.rewrite.fold import fold
from tweo_timm.structure import Stage


def center(model: nn.Module) -> list[str]:
    """Centre everything that writes the described streams, in place and exactly; norms and scales are folded first.

    Returns:
        Names of the stages that were centred. Left are those whose mean somebody reads: Swin's patch merging, which
        normalizes four tokens together, an RmsNorm, a head without a norm, or features.

    Raises:
        ValueError: for a model that cannot be folded; it is unchanged then.
    """
    edit, centred = Edit(model), []
    for stage in describe_stream(model).stages:
        if mean_is_unread(model, stage):
            fold(edit, stage)
            for port in stage.writers:
                edit.then(port.name, _Centre(port.axis))
            centred.append(stage.name)
    edit.apply()
    return centred


def mean_is_unread(model: nn.Module, stage: Stage) -> bool:
    """Whether every reader of a stage stands behind a LayerNorm over one token."""
    behind = all(port.norm and port.copies == 1 for port in stage.readers)
    return behind and stage.features != "" and all(_subtracts(model, norm) for norm in stage.norms)


def _subtracts(model: nn.Module, norm: str) -> bool:
    return isinstance(model.get_submodule(norm), nn.LayerNorm)


class _Centre:
    def __init__(self, axis: int) -> None:
        self._axis = axis

    def __call__(self, value: Tensor) -> Tensor:
        return value - value.mean(self._axis, keepdim=True)
