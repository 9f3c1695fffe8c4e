"""One forward pass, measured: L_TWEO and the peak of every block's output. attach_tweo and Tweo stand on it.

The penalty of a block is computed in its own hook, not at the end of the pass: autograd runs the youngest node first,
so the gradient of block l's penalty is made just before block l needs it, and only one of them is alive at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.layers import use_reentrant_ckpt
from torch import Tensor, nn

from tweo_timm.blocks import find_blocks
from tweo_timm.config import TweoConfig
from tweo_timm.loss import mean_over_blocks, mean_power
from tweo_timm.tap import BlockTap


class Pass(NamedTuple):
    """What one forward pass gave.

    Attributes:
        tweo: L_TWEO, a scalar, with gradients if it acts.
        peaks: max |A| of each block, float32 (L,), without gradients; 0 for blocks in eval mode.
    """

    tweo: Tensor
    peaks: Tensor


class _Seen(NamedTuple):
    name: str
    numel: int
    peak: Tensor
    term: Tensor


class Measurement:
    """Measures the passes of a model between `open` and `close`.

    A block counts while it trains and gradients are enabled. Activation checkpointing repeats the forward during the
    backward pass and expects the same operations, so outputs are measured then as well, for nothing: only an open pass
    keeps what was found.

    Args:
        model: before torch.compile.
        config: the penalty.
        blocks: regular expression naming the blocks by hand; None finds them by structure.

    Attributes:
        names: of the blocks, in forward order.

    Raises:
        ValueError: if the model has no transformer blocks.
        RuntimeError: if the model checkpoints activations with reentrant checkpoints, in which a penalty gets no
            gradient.
    """

    def __init__(self, model: nn.Module, config: TweoConfig, blocks: str | None = None) -> None:
        self._model = model
        self._config = config
        self._blocks = find_blocks(model, blocks)
        self.names = list(self._blocks)
        self._refuse_reentrant_checkpoints()
        self._is_open = False
        self._acting = config.weight > 0
        self._mask: Tensor | None = None
        self._seen: list[_Seen] = []
        self._tap = BlockTap(self._blocks, self._observe)

    def open(self, acting: bool, mask: Tensor | None = None) -> bool:
        """Begin a pass; whether it counts, which it does where gradients are enabled and a block trains.

        Args:
            acting: whether L_TWEO gets gradients.
            mask: bool, the shape of the blocks' outputs without their last axis: which tokens count; None: all.
        """
        self._seen.clear()
        self._is_open = torch.is_grad_enabled() and any([block.training for block in self._blocks.values()])
        self._acting, self._mask = acting, mask
        return self._is_open

    def close(self) -> Pass | None:
        """End the pass and return what it gave; None for a pass that does not count.

        Raises:
            RuntimeError: if a block that trains gave no output.
        """
        if not self._is_open:
            return None
        seen, self._seen, self._is_open, self._mask = self._seen, [], False, None
        names = [one.name for one in seen]
        if names != self.names:
            self._check_every_block_reported(names)
        tweo = mean_over_blocks([one.term for one in seen], [one.numel for one in seen], self._config)
        return Pass(tweo, self._peak_of_each_block(seen))

    def remove(self) -> None:
        """Take every hook off the blocks; a second call does nothing."""
        self._tap.remove()
        self._seen.clear()

    def _observe(self, name: str, block: nn.Module, output: Tensor) -> None:
        if not (block.training and torch.is_grad_enabled()):
            return
        term = mean_power(output if self._acting else output.detach(), self._config, self._mask)
        seen = _Seen(name, output.numel(), _largest_magnitude(output.detach(), self._mask), term)
        if self._is_open:
            self._seen.append(seen)

    def _peak_of_each_block(self, seen: list[_Seen]) -> Tensor:
        """Peaks in the order of the blocks. A block may have been called twice, or, in eval mode, not at all."""
        known: dict[str, Tensor] = {}
        for one in seen:
            known[one.name] = torch.maximum(known[one.name], one.peak) if one.name in known else one.peak
        unseen = torch.zeros_like(seen[0].peak)
        return torch.stack([known.get(name, unseen) for name in self.names])

    def _check_every_block_reported(self, names: list[str]) -> None:
        self._refuse_reentrant_checkpoints()  # switched on after attaching, they are why
        expected = [name for name, block in self._blocks.items() if block.training]
        seen = set(names)
        missing = [name for name in expected if name not in seen]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(expected)} blocks gave TWEO no output in this step, the first is "
                f"{missing[0]!r}: attach before torch.compile and before the first step, and checkpoint activations "
                "with use_reentrant=False; if the model skips blocks, name the others with blocks=REGEX"
            )

    def _refuse_reentrant_checkpoints(self) -> None:
        if use_reentrant_ckpt() and any(getattr(m, "grad_checkpointing", False) for m in self._model.modules()):
            raise RuntimeError(
                "TWEO needs non-reentrant activation checkpoints: a reentrant one runs the blocks without gradients, "
                "and the penalty would silently have none. Unset TIMM_REENTRANT_CKPT, or call "
                "timm.layers.set_reentrant_ckpt(False)"
            )


class Scheduled:
    """The weight of a penalty, which moves as its configuration says.

    Attributes:
        config: the TweoConfig in force.
    """

    def __init__(self, config: TweoConfig) -> None:
        self.config = config
        self._progress: float | None = 0.0 if config.schedule == "constant" else None
        self._weight = config.weight

    @property
    def weight(self) -> float:
        """The weight of the penalty in the coming step."""
        return self._weight

    def set_progress(self, progress: float) -> None:
        """Move the schedule to a point of the training.

        Args:
            progress: fraction of the optimizer updates done, 0 to 1.

        Raises:
            ValueError: if `progress` is outside [0, 1].
        """
        self._weight = self.config.weight_at(progress)
        self._progress = progress

    def _require_progress(self) -> None:
        if self._progress is None:
            raise RuntimeError(
                f"the {self.config.schedule} schedule needs to know where the training is: "
                "call set_progress(updates_done / updates_in_all) before every step"
            )


def _largest_magnitude(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return max |x| as a float32 scalar, NaN if an element is; reads x once, and makes no tensor of its size."""
    low, high = torch.aminmax(x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0))
    return torch.maximum(low.abs(), high.abs()).float()
