"""Records: rows and values as plain JSON, appended, replaced in one step, and taken out again."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """Turn tensors, arrays and tuples into plain numbers and lists, and numbers that are not finite into None.

    JSON has no NaN or infinity: readers other than Python's refuse a file that holds them.
    """
    if hasattr(value, "tolist"):  # a tensor, an array, or a scalar of NumPy
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append mappings to a JSON-lines file; numbers that are not finite become null, which JSON has."""
    with open(path, "a") as file:
        file.writelines(json.dumps(plain(row)) + "\n" for row in rows)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step, so that a crash leaves the old one or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def keep_rows_before(path: Path, key: str, limit: int) -> None:
    """Take out the rows of a JSON-lines file that will be written again, and what a crash left of one.

    Args:
        path: the file; it need not exist.
        key: what a row's place in the run is called, "epoch" say.
        limit: the first place that will be written again.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(line)[key] < limit:
                kept.append(f"{line}\n")
    write_atomically(path, "".join(kept))
