"""tweo-repair, or python -m tweo_timm.rewrite: from a checkpoint to the same model without outliers in its stream."""

from __future__ import annotations

from collections.abc import Sequence

from tweo_timm.repair.options import parse_repair_options
from tweo_timm.run.command import Command, run

REPAIR = Command("tweo-repair", "tweo-repair", parse_repair_options, "tweo_timm.repair.command:repair")


def main(argv: Sequence[str] | None = None) -> int:
    """Repair as the command line says.

    Args:
        argv: the words after the program's name; None takes the process's own.

    Returns:
        The exit status: 0 if the output was written; 1 for an error, 130 after Ctrl-C, and no output then.
    """
    return run(REPAIR, argv)
