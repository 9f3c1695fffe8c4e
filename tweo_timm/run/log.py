"""Logging as timm's scripts have it: INFO lines plain, others with their level, on stderr; set up without timm.

timm takes seconds to import, for which `-h` and a misspelt flag should not wait. A program that has set logging up
keeps its own ways.
"""

from __future__ import annotations

import logging

from tweo_timm.media import terminal


class _Formatter(logging.Formatter):
    """Names in a message may be a stranger's: nothing in a line acts upon the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        shown = text if record.levelno == logging.INFO else f"{record.levelname}: {text}"
        return "\n".join(map(terminal, shown.expandtabs().split("\n")))


def set_up_logging() -> None:
    """Log INFO and above to stderr, unless the program that calls us has configured logging."""
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter())
        root.addHandler(handler)
        root.setLevel(logging.INFO)
