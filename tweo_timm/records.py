"""Records: rows and values as plain JSON, appended, replaced in one step, and taken out again."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tweo_timm.outputs import Outputs


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
    Outputs(path.parent).append(path.name, "".join(f"{json.dumps(plain(row))}\n" for row in rows))


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
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(line)[key] < limit:
                kept.append(f"{line}\n")
    Outputs(path.parent).write(path.name, "".join(kept))
