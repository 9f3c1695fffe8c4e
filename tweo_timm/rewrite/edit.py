"""Edit: new values for some tensors of a model, all of them or none.

An exact rewriting multiplies several factors into one weight. Rounded after each, float32 would lose a little every
time and bfloat16 a lot; so factors are noted first, and each tensor is then computed in float64, once, alone, and
rounded once. Values are always computed from the model as it was, so that the order of the notes does not matter
between tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Step = Callable[[Tensor], Tensor]


class Edit:
    """Notes what is to become of each tensor, and does it when asked.

    Args:
        model: its parameters are written in place when `apply` is called, and not before; the old ones are kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._steps: dict[str, list[Step]] = {}
        self._kept: dict[str, Tensor] = {}

    def has(self, name: str) -> bool:
        """Whether the model has a parameter of this name."""
        return name in self._parameters

    def old(self, name: str) -> Tensor:
        """A tensor as it was before the edit: float64, on the CPU."""
        source = self._kept.get(name, self._parameters[name])
        return source.detach().cpu().to(torch.float64, copy=True)  # in this order: not every device has float64

    def shape(self, name: str) -> torch.Size:
        """The shape that a tensor has and keeps."""
        return self._parameters[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor has and keeps."""
        return self._parameters[name].dtype

    def then(self, name: str, step: Step) -> None:
        """Note one more step for a tensor; it gets and returns float64."""
        self._steps.setdefault(name, []).append(step)

    @torch.no_grad()
    def apply(self) -> None:
        """Compute and write one tensor after the other, each from the model as it was.

        Raises:
            ValueError: if a new value is not finite; everything has been put back then.
        """
        try:
            for name in self._steps:
                value = self._compute(name)
                self._kept[name] = self._parameters[name].detach().clone()
                self._parameters[name].copy_(value)
        except BaseException:
            self.undo()
            raise

    @torch.no_grad()
    def undo(self) -> None:
        """Put back what `apply` replaced, bit for bit; the notes stay."""
        for name, value in self._kept.items():
            self._parameters[name].copy_(value)
        self._kept = {}

    def _compute(self, name: str) -> Tensor:
        value = self.old(name)
        for step in self._steps[name]:
            value = step(value)
        value = value.to(self.dtype(name))
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} would not be finite in {self.dtype(name)}: the model stays as it was")
        return value
