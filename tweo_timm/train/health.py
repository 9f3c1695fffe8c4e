"""What ends a run before its time: a loss, activation, gradient or weight that is not finite, or a peak too high."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tweo_timm.run.failure import Failure
from tweo_timm.run.world import World


class TrainingStopped(Failure):
    """The run cannot go on; the message says at which update, why, and what there is to go back to."""


class HealthWatch:
    """Finds the first update whose loss, activations or gradients are not finite, without waiting for the device.

    Args:
        module: what is trained.
        block_names: names of the blocks behind the peaks.
        device: where losses and peaks live.
        stop_on_peak: largest max |A| that is accepted; None accepts any finite one.
    """

    def __init__(
        self, module: nn.Module, block_names: list[str], device: torch.device, stop_on_peak: float | None = None
    ) -> None:
        self.block_names = block_names
        self.stop_on_peak = stop_on_peak
        self._parameters = {_plain(name): p for name, p in module.named_parameters()}
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._loss = torch.zeros((), device=device)
        self._peaks = torch.zeros(max(len(block_names), 1), device=device)
        self._graded: list[str] = []
        self._norms = torch.zeros(1, device=device)
        self._completed = -1  # the latest update whose gradients were complete
        self._broken = ""

    def note(self, update: int, loss: Tensor, peaks: Tensor | None) -> None:
        """Look at the loss and the activations of one micro-batch.

        Args:
            update: number of the optimizer update it belongs to.
            loss: scalar.
            peaks: max |A| of each block, float32 (L,); None if unknown.
        """
        bad = ~torch.isfinite(loss.detach())
        if peaks is not None:
            bad = bad | ~torch.isfinite(peaks).all()
            if self.stop_on_peak is not None:
                bad = bad | (peaks.amax() > self.stop_on_peak)
        first = self._note_first(update, bad)
        self._loss = torch.where(first, loss.detach().float(), self._loss)
        if peaks is not None:
            self._peaks = torch.where(first, peaks, self._peaks)

    def note_gradients(self, update: int) -> None:
        """Look at every gradient of one update, before anything clips them, or takes their signs.

        Args:
            update: number of the optimizer update.
        """
        self._completed = update
        graded = {name: _local(g) for name, p in self._parameters.items() if (g := p.grad) is not None}
        if not graded:
            return
        norms = _sums_of_magnitudes(list(graded.values()))
        first = self._note_first(update, ~torch.isfinite(norms).all())
        if list(graded) != self._graded:
            self._graded, self._norms = list(graded), torch.zeros_like(norms)
        self._norms = torch.where(first, norms, self._norms)

    def note_weights(self, update: int) -> None:
        """Look at the weights, before they are validated or written. Waits for the device.

        Args:
            update: number of the latest optimizer update.
        """
        if int(self._first_bad) >= 0:
            return
        self._find_broken_weight(update)
        if self._broken:
            self._note_first(update, torch.ones_like(self._first_bad, dtype=torch.bool))

    def _find_broken_weight(self, update: int) -> None:
        """Name the first weight that is not finite after this update."""
        for name, parameter in self._parameters.items():
            if not torch.isfinite(_local(parameter.detach())).all():
                since = f"after update {update}" if update >= 0 else "from the start"
                self._broken = f"{name} is not finite {since}"
                return

    def _note_first(self, update: int, bad: Tensor) -> Tensor:
        first = bad & (self._first_bad < 0)
        self._first_bad = torch.where(first, update, self._first_bad)
        return first

    def check(self, world: World, last_good: str) -> None:
        """Stop the run if any process saw a bad step; waits for the device. A collective.

        Args:
            world: the processes that stop together.
            last_good: the newest checkpoint, for the message.

        Raises:
            TrainingStopped: naming update, loss, first bad block or parameter, and `last_good`.
        """
        update = int(self._first_bad)
        if not world.any(update >= 0):
            return
        if update < 0:
            raise TrainingStopped(f"stopped because another process was. Last good checkpoint: {last_good}")
        if update > self._completed and not self._broken:
            # The forward pass was bad and no update came after it: a weight that is broken now is the reason.
            self._find_broken_weight(update - 1)
        raise TrainingStopped(
            f"stopped at update {update}: {self._culprit()}. Last good checkpoint: {last_good}. "
            "Nothing later was saved: lower the learning rate or clip gradients, then --resume that one or begin again"
        )

    def _culprit(self) -> str:
        loss, peaks = float(self._loss), self._peaks.tolist()
        limit = self.stop_on_peak if self.stop_on_peak is not None else math.inf
        high = [i for i, peak in enumerate(peaks) if not math.isfinite(peak) or peak > limit]
        because = f", because {self._broken}" if self._broken else ""
        if high and self.block_names:
            return f"loss {loss:g}, max |A| = {peaks[high[0]]:g} first at block {self.block_names[high[0]]}{because}"
        # The backward pass goes from the last parameter to the first: the last bad one was bad first.
        norms = self._norms.tolist()
        broken = [name for name, norm in zip(self._graded, norms, strict=False) if not math.isfinite(norm)]
        if math.isfinite(loss) and broken:
            return f"gradients are not finite, first that of {broken[-1]}"
        if self._broken:
            return self._broken if math.isfinite(loss) else f"loss {loss:g}{because}"
        return f"loss {loss:g}, while every block's output is finite: look at the head, the targets and the loss"


def _sums_of_magnitudes(tensors: list[Tensor]) -> Tensor:
    """Sum |x| of each, (L,): not finite if one element is not, and no sum of less than 3e38 overflows.

    A sum of squares, which torch.nn.utils.clip_grad_norm_ takes, overflows beyond 1e19, and any sum in float16 soon.
    """
    wide = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return torch.stack(torch._foreach_norm(tensors, 1, dtype=wide))


def _plain(name: str) -> str:
    """A parameter's name without what compilation and DDP put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is sharded over processes."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
