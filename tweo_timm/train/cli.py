"""train.py and tweo-train."""

from __future__ import annotations

from collections.abc import Sequence

from tweo_timm.run.command import Command, run
from tweo_timm.train.options import parse_train_options
from tweo_timm.train.rate import describe_rate

TRAIN = Command("train.py", "tweo-train", parse_train_options, "tweo_timm.train.command:train", describe_rate)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says.

    Args:
        argv: the words after the program's name; None takes the process's own.

    Returns:
        The exit status: 0 when the run is complete, 1 for an error, 2 for a recipe that cannot be read, 128 + N after
        signal N.
    """
    return run(TRAIN, argv)
