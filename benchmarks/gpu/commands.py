"""Runs train.py and validate.py as people run them, with their output in a log."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.ledger import MeasurementError
from benchmarks.gpu.plan import REPOSITORY

# The line on which Python, or one of our commands, says what went wrong.
_ERROR = re.compile(r"^(\w+\.)*\w*(Error|Exception|Interrupt)\b.*|^(train|validate)\.py: .*")


def run_command(words: Sequence[str], log: Path, limit_s: float) -> None:
    """Run a script of the repository by this Python, on this source tree.

    Args:
        words: the script and its arguments.
        log: file for the command and what it prints; replaced.
        limit_s: seconds after which it is stopped.

    Raises:
        MeasurementError: it failed, or took too long; what it wrote by then stays.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        file.write(shlex.join(["python", *words]) + "\n\n")
        file.flush()
        try:
            status = subprocess.run(
                [sys.executable, *words],
                cwd=REPOSITORY,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=limit_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise MeasurementError(f"{words[0]} was stopped after {limit_s:.0f} s; see {log}") from error
    if status:
        raise MeasurementError(f"{complaint(log.read_text())}; see {log}")


def complaint(text: str) -> str:
    """Return the line of a log that says what went wrong, or else its last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or ["it said nothing"])[-1]
