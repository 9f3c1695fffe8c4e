"""Signals: a run that is told to end completes its step and saves, and its loader's processes wait for that."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from tweo_timm.run.world import World

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_GRACE_S = 60


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
