"""A stage of a residual stream that is being described: every layer is checked as it is added.

What stands in a description must be a plain layer, because a rewriting writes its weights and knows no other forward.
"""

from __future__ import annotations

from typing import Any

from timm.layers.norm import LayerNorm, LayerNormFp32, RmsNorm, RmsNormFp32
from torch import nn

from tweo_timm.structure import Port, Share, Stage, Unsupported

_NORMS = (nn.LayerNorm, LayerNorm, LayerNormFp32, RmsNorm, RmsNormFp32)
NORM_WRITES = (
    "the output of a norm stays in every later residual, and a rotation would have to commute with the squares of its "
    "gains"
)


class Draft:
    """A stage that is being described: every layer is checked as it is added."""

    def __init__(self, model: nn.Module, name: str, width: int) -> None:
        self.model, self.stage = model, Stage(name, width)

    def parameter(self, name: str) -> None:
        """Add a parameter of the model itself, such as a class token, where there is one."""
        if getattr(self.model, name, None) is not None:
            self.stage.writers.append(Port("", name, -1, "writes"))

    def writes(self, name: str, scale: str = "") -> None:
        """Add a Linear layer or convolution whose output, times a scale, is added to the stream."""
        layer = self._layer(name)
        assert layer.weight.shape[0] == self.stage.width, f"{name} is not as wide as the stream"
        self.stage.writers.append(Port(name, "weight", 0, "writes", scale=scale))
        if layer.bias is not None:
            self.stage.writers.append(Port(name, "bias", 0, "writes", scale=scale))

    def norm_writes(self, name: str) -> None:
        """Add a norm whose output begins the stream."""
        for parameter in ("weight", "bias"):
            if getattr(self.model.get_submodule(name), parameter, None) is not None:
                self.stage.writers.append(Port(name, parameter, 0, "writes"))

    def reads(self, name: str, norm: str, shares: tuple[Share, ...] | None = None, copies: int = 1) -> None:
        """Add a Linear layer that reads the stream; unless told otherwise its bias takes constants."""
        layer = self._layer(name)
        if norm:
            self.check_norm(norm, copies)
        assert layer.weight.shape[1] == copies * self.stage.width, f"{name} does not read the whole stream"
        if shares is None:
            shares = (Share(f"{name}.bias", (0, len(layer.weight))),) if layer.bias is not None else ()
        self.stage.readers.append(Port(name, "weight", 1, "reads", norm=norm, copies=copies, shares=shares))

    def _layer(self, name: str) -> Any:
        layer = self.model.get_submodule(name)
        if type(layer) not in (nn.Linear, nn.Conv2d):
            raise Unsupported(
                f"{name} is a {type(layer).__name__}, not a plain Linear layer or convolution: rewrite the model "
                "before it is converted or adapted"
            )
        if nn.utils.parametrize.is_parametrized(layer):
            raise Unsupported(f"{name} has a parametrization: remove it before the model is rewritten")
        return layer

    def check_norm(self, name: str, copies: int) -> None:
        """Refuse a norm that is not over all channels, of one token or of all that lie side by side."""
        norm: Any = self.model.get_submodule(name)
        over = tuple(getattr(norm, "normalized_shape", ()))
        if type(norm) not in _NORMS or over not in ((self.stage.width,), (copies * self.stage.width,)):
            raise Unsupported(
                f"{name} is a {type(norm).__name__}: only LayerNorm and RmsNorm over all channels commute with "
                "a rotation"
            )
