"""What ends a run before its time: a value that is no number, a peak too high, a signal. Each is noticed and named."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tweo_timm.peaks import Peaks, as_numbers, as_tensor
from tweo_timm.run.world import World

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_GRACE_S = 60


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


class PatientWorker:
    """A loader's worker_init_fn: its processes outlive a signal to the whole job until the run has saved.

    SLURM signals every process of a job, a terminal's Ctrl-C its whole group, and a run whose workers are gone cannot
    finish its step. A worker that its own run tells to end does so at once, as torch has it; told by anybody else,
    after a minute. Where nobody knows who sent a signal (macOS), SIGTERM is left to torch.

    Args:
        init: the worker_init_fn there was before, or None.
    """

    def __init__(self, init: Callable[[int], object] | None) -> None:
        self.init = init

    def __call__(self, worker: int) -> None:
        """Prepare the worker process of this number."""
        if self.init is not None:
            self.init(worker)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "sigwaitinfo"):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            threading.Thread(target=_end_when_told, daemon=True).start()


def _end_when_told() -> None:
    """Wait until the parent process sends SIGTERM, or until a minute after anybody else did, and end this process."""
    told: signal.struct_siginfo | None = signal.sigwaitinfo([signal.SIGTERM])
    while told is not None and told.si_pid != os.getppid():
        told = signal.sigtimedwait([signal.SIGTERM], _GRACE_S)
    os._exit(0)


class HealthWatch:
    """Finds the first update whose loss, activations or gradients are not finite, without waiting for the device.

    Args:
        module: what is trained.
        block_names: names of the blocks behind the peaks.
        device: where losses and peaks live.
        stop_on_peak: largest max |A| that is accepted; None accepts any finite one.
        every_gradient: whether to look at all gradients on a CPU too: where they are clipped, or the optimizer takes
            signs, what is wrong with one of them would be hidden, or spread to all before the next loss shows it.
    """

    def __init__(
        self,
        module: nn.Module,
        block_names: list[str],
        device: torch.device,
        stop_on_peak: float | None = None,
        every_gradient: bool = False,
    ) -> None:
        self.block_names = block_names
        self.stop_on_peak = stop_on_peak
        self._on_cpu = device.type == "cpu"  # there, looking at a number does not wait
        self._parameters = {_plain(name): p for name, p in module.named_parameters()}
        trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self._sharded = any(isinstance(p, DTensor) for p in trained.values())
        # A module's bias comes after its weight, and replaces it here.
        vectors = {name.rpartition(".")[0]: p for name, p in trained.items() if p.ndim <= 1}
        self._telltale = list((trained if every_gradient else vectors or trained).values())
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._loss = torch.zeros((), device=device)
        self._peaks = torch.zeros(max(len(block_names), 1), device=device)
        self._graded: list[str] = []
        self._norms = torch.zeros(1, device=device)
        self._broken = ""
        self._found, self._one = torch.zeros((), device=device), torch.ones((), device=device)

    def note(self, update: int, loss: Tensor, peaks: Peaks | None) -> None:
        """Look at the loss and the activations of one micro-batch.

        Args:
            update: number of the optimizer update it belongs to.
            loss: scalar.
            peaks: max |A| of each block; None if unknown.
        """
        if self._on_cpu:
            if self._is_calm(loss, peaks):
                return
            self._find_broken_weight(update - 1)
        bad = ~torch.isfinite(loss.detach())
        found = None if peaks is None else as_tensor(peaks)
        if found is not None:
            bad = bad | ~torch.isfinite(found).all()
            if self.stop_on_peak is not None:
                bad = bad | (found.amax() > self.stop_on_peak)
        first = self._note_first(update, bad)
        self._loss = torch.where(first, loss.detach().float(), self._loss)
        if found is not None:
            self._peaks = torch.where(first, found, self._peaks)

    def note_gradients(self, update: int) -> None:
        """Look at the gradients of one update, before they are clipped.

        On a CPU, where reading all of them takes 1 % of a step, those of biases and norms alone (unless
        `every_gradient`): they are sums over what comes back through their layer, and not finite if that is not. What
        is wrong with a weight's gradient and nothing else breaks that weight, which the next loss shows, or
        `note_weights`.

        Args:
            update: number of the optimizer update.
        """
        if self._on_cpu:
            telltale = [g for p in self._telltale if (g := p.grad) is not None]
            if not telltale or self._are_calm([_local(g) for g in telltale] if self._sharded else telltale):
                return
        graded = {name: _local(g) for name, p in self._parameters.items() if (g := p.grad) is not None}
        if not graded:
            return
        # One fused pass, as in torch.nn.utils.clip_grad_norm_: a norm is not finite if one element is not.
        norms = torch.stack(torch._foreach_norm(list(graded.values()))).float()
        first = self._note_first(update, ~torch.isfinite(norms).all())
        if len(self._norms) != len(norms):
            self._norms = torch.zeros_like(norms)
            self._graded = list(graded)
        self._norms = torch.where(first, norms, self._norms)

    def note_weights(self, update: int) -> None:
        """Look at the weights, before they are validated or written. Waits for the device.

        Args:
            update: number of the latest optimizer update.
        """
        self._find_broken_weight(update)
        if self._broken:
            self._note_first(update, torch.ones_like(self._first_bad, dtype=torch.bool))

    def _find_broken_weight(self, update: int) -> None:
        """Name the first weight that is not finite after this update, unless something was wrong before."""
        if int(self._first_bad) >= 0:
            return
        for name, parameter in self._parameters.items():
            weight = _local(parameter.detach())
            # Their sum takes an eighth of the time, and is seldom not finite where they all are.
            if not (torch.isfinite(weight.sum()) or torch.isfinite(weight).all()):
                since = f"after update {update}" if update >= 0 else "from the start"
                self._broken = f"{name} is not finite {since}"
                return

    def _is_calm(self, loss: Tensor, peaks: Peaks | None) -> bool:
        found = [] if peaks is None else as_numbers(peaks)
        limit = math.inf if self.stop_on_peak is None else self.stop_on_peak
        return math.isfinite(sum(found, loss.item())) and max(found, default=0.0) <= limit

    def _are_calm(self, gradients: list[Tensor]) -> bool:
        """Whether all are finite, by GradScaler's pass: one operator for all tensors, which multiplies them by 1."""
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, self._found, self._one)
        calm = not self._found.item()
        if not calm:
            self._found.zero_()
        return calm

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


def _plain(name: str) -> str:
    """A parameter's name without what compilation and DDP put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is sharded over processes."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
