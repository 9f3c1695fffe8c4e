"""Runs measurements one after another in a process of its own, and starts another one after a failure.

One process for all, because starting one costs ten seconds; not this one, because an error on a GPU (an illegal address
say) breaks everything that the same process does afterwards, and a kernel that hangs cannot be interrupted.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from benchmarks.gpu.ledger import MeasurementError, NotRunError, first_line

PATIENCE_S = 10


class Worker:
    """A process that measures; a context manager that ends it."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Any = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._process is not None:  # idle: it ends when nobody is connected, and clears up
            self._connection.close()
            self._process.join(PATIENCE_S)
        self.close()

    def run(self, function: Callable[..., Any], *arguments: Any, limit_s: float) -> Any:
        """Return what a function of a module returns, called there.

        Raises:
            NotRunError: the function raised it.
            MeasurementError: the function raised something else, its process ended, or it took longer than `limit_s`.
        """
        connection = self._connected()
        connection.send((function, arguments))
        if not connection.poll(limit_s):
            self.close()
            raise MeasurementError(f"no result within {limit_s:.0f} s")
        try:
            outcome, value = connection.recv()
        except (EOFError, OSError):
            self._process.join()
            status = self._process.exitcode
            self.close()
            raise MeasurementError(f"its process ended with status {status}") from None
        if outcome == "not run":
            raise NotRunError(value)
        if outcome == "failed":
            self.close()
            raise MeasurementError(value)
        return value

    def close(self) -> None:
        """End the process, if there is one, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = self._connection = None

    def _connected(self) -> Any:
        if self._process is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,))
            self._process.start()
            theirs.close()
        return self._connection


def _serve(connection: Connection) -> None:
    """Answer calls until the other side hangs up."""
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = ("result", function(*arguments))
        except NotRunError as error:
            answer = ("not run", first_line(error))
        except Exception as error:
            answer = ("failed", f"{type(error).__name__}: {first_line(error)}")
        connection.send(answer)
