"""Taking part in a sweep of timm's sweep.py (1.0.31), which starts each training with two flags of its own.

The tool may die while a training goes on, or give an attempt up before its processes are there. So each process holds
the lock files of --sweep-locks, shared, while it trains; and it trains only if the file of --sweep-attempt still says
that its attempt is the live one. The locks are flock's, as the tool's are.

Source: tests/test_sweep.py of timm 1.0.31's source archive.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from tweo_timm.train.options import TrainOptions

_LONGEST_ID = 4096  # bytes; the tool writes some twenty


@contextlib.contextmanager
def sweep_attempt(options: TrainOptions) -> Iterator[None]:
    """Be a process of the sweep's attempt that the options name; without them nothing happens.

    Waits while the tool itself holds one of the locks alone.

    Raises:
        ValueError: a file cannot be opened, or another attempt is the live one now.
    """
    with contextlib.ExitStack() as held:
        for path in options.sweep_locks:
            descriptor = _opened(path, os.O_RDWR, "--sweep-locks")
            held.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        if options.sweep_attempt:
            _require_live(*options.sweep_attempt)
        yield


def _require_live(path: str, attempt: str) -> None:
    descriptor = _opened(path, os.O_RDONLY, "--sweep-attempt")
    with open(descriptor, encoding="utf-8", errors="replace") as file:
        live = file.read(_LONGEST_ID).strip()
    if live != attempt:
        now = f"{live} is" if live else "none is, it was retired"
        raise ValueError(
            f"--sweep-attempt {path} {attempt}: this attempt is not the live one ({now}); nothing was trained, the "
            "sweep starts it again where it is to run"
        )


def _opened(path: str, mode: int, flag: str) -> int:
    try:
        return os.open(path, mode)
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror}; timm's sweep.py gives this flag, with its files") from error
