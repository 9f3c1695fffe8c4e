"""validate.py and tweo-validate."""

from __future__ import annotations

from collections.abc import Sequence

from tweo_timm.evaluate.options import parse_validate_options
from tweo_timm.run.command import Command, run

VALIDATE = Command("validate.py", "tweo-validate", parse_validate_options, "tweo_timm.evaluate.command:validate")


def main(argv: Sequence[str] | None = None) -> int:
    """Validate as the command line says.

    Args:
        argv: the words after the program's name; None takes the process's own.

    Returns:
        The exit status: 0, 1 for an error, 2 for a recipe that cannot be read, 130 after Ctrl-C; what was finished by
        then is reported all the same.
    """
    return run(VALIDATE, argv)
