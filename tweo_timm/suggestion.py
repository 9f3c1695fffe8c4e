"""What was probably meant, as the end of an error message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def suggest(name: str, known: Iterable[str]) -> str:
    """Name the known name that is nearest, or nothing when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def suggest_path(path: str | Path) -> str:
    """Name what lies nearest to a path that does not exist, in the last of its folders that does."""
    missing = Path(path).absolute()
    while not missing.parent.exists():
        missing = missing.parent
    return suggest(missing.name, (entry.name for entry in missing.parent.glob("*")))
