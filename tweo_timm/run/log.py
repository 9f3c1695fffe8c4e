"""What is logged while the command line is read, kept until logging is set up.

Setting it up is timm's business, and timm takes seconds, for which `-h` and a misspelt flag should not wait.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
from collections.abc import Iterator


@contextlib.contextmanager
def held_messages() -> Iterator[None]:
    """Hold messages back until the end of the context; those of a program that has set logging up pass at once."""
    root = logging.getLogger()
    if root.handlers:
        yield
        return
    level, holder = root.level, logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
    root.addHandler(holder)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(holder)
        if not root.handlers:
            root.setLevel(level)
            logging.basicConfig(format="%(message)s")
        for record in holder.buffer:
            root.handle(record)


def set_up_logging() -> None:
    """Log as timm's scripts do, unless a program that calls us has its own ways."""
    if any(not isinstance(handler, logging.handlers.MemoryHandler) for handler in logging.getLogger().handlers):
        return
    from timm.utils import setup_default_logging

    setup_default_logging()
