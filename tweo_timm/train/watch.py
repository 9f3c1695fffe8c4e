"""What ends a run before its time: a value that is no number, a peak too high, a signal. Each is noticed and named."""

from __future__ import annotations

import signal
from types import FrameType

import torch
from torch import Tensor

from tweo_timm.train.world import World

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingStopped(RuntimeError):  # noqa: N818 - what happened, in the words of the log
    """The run cannot go on; the message says at which update, why, and what there is to go back to."""


class Interrupted(Exception):  # noqa: N818 - a request from outside, not an error
    """Somebody asked the run to end: SIGTERM or SIGINT. Its state has been saved.

    Args:
        number: the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class SignalWatch:
    """Remembers SIGTERM and SIGINT while a step completes; a second one acts at once, as it would without us."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous = {number: signal.getsignal(number) for number in _SIGNALS}

    def __enter__(self) -> SignalWatch:
        for number in _SIGNALS:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._put_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, world: World) -> int | None:
        """Return the signal that any process of the run has received. A collective: all processes have to call it."""
        if world.any(self.received is not None):
            return self.received or signal.SIGTERM
        return None


class HealthWatch:
    """Finds the first update whose loss or activations are no longer finite, without waiting for the device each time.

    Args:
        block_names: names of the blocks behind the peaks.
        device: where losses and peaks live.
        stop_on_peak: largest max |A| that is accepted; None accepts any finite one.
    """

    def __init__(self, block_names: list[str], device: torch.device, stop_on_peak: float | None = None) -> None:
        self.block_names = block_names
        self.stop_on_peak = stop_on_peak
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._loss = torch.zeros((), device=device)
        self._peaks = torch.zeros(max(len(block_names), 1), device=device)

    def note(self, update: int, loss: Tensor, peaks: Tensor | None) -> None:
        """Look at one training step.

        Args:
            update: number of the optimizer update it belongs to.
            loss: scalar.
            peaks: max |A| of each block, (L,); None if unknown.
        """
        bad = ~torch.isfinite(loss.detach())
        if peaks is not None:
            bad = bad | ~torch.isfinite(peaks).all()
            if self.stop_on_peak is not None:
                bad = bad | (peaks.amax() > self.stop_on_peak)
        first = bad & (self._first_bad < 0)
        self._first_bad = torch.where(first, update, self._first_bad)
        self._loss = torch.where(first, loss.detach().float(), self._loss)
        if peaks is not None:
            self._peaks = torch.where(first, peaks, self._peaks)

    def check(self, last_good: str) -> None:
        """Stop the run if a bad step was seen; waits for the device.

        Args:
            last_good: the newest checkpoint, for the message.

        Raises:
            TrainingStopped: naming update, loss, first bad block and `last_good`.
        """
        update = int(self._first_bad)
        if update < 0:
            return
        loss, peaks = float(self._loss), self._peaks.tolist()
        limit = self.stop_on_peak if self.stop_on_peak is not None else float("inf")
        culprits = [i for i, peak in enumerate(peaks) if not abs(peak) < float("inf") or peak > limit]
        if culprits and self.block_names:
            what = f"max |A| = {peaks[culprits[0]]:g} first at block {self.block_names[culprits[0]]}"
        else:
            what = "no block output is out of range: look at the head, the loss and the learning rate"
        raise TrainingStopped(f"stopped at update {update}: loss {loss:g}, {what}. Last good checkpoint: {last_good}")
