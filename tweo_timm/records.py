"""Records: rows and values as plain JSON, appended, replaced in one step, taken out again, and read field by field.

What was read from a file is the word of a stranger. `Fields` takes it out by name and type, so that a file with a field
of another type is refused in one line that names the field.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tweo_timm.outputs import Outputs
from tweo_timm.settings import ANY, Bounds

_logger = logging.getLogger(__name__)


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
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            if json.loads(line)[key] < limit:
                kept.append(f"{line}\n")
    Outputs(path.parent).write(path.name, "".join(kept))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file; what is no row, as a crash may leave the last one, is passed over with a warning."""
    rows, lost = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            lost += bool(line.strip())
    if lost:
        _logger.warning("%s: %d lines are no rows: passed over", path, lost)
    return rows


def shown(value: Any) -> str:
    """A stranger's value for a message: short, on one line, and without what would be long or deep."""
    if value is None or isinstance(value, (bool, int, float, str)):
        try:
            text = repr(value)
        except ValueError:  # Python refuses to write integers of thousands of digits
            return "an integer of thousands of digits"
        return text if len(text) <= 60 else f"{text[:57]}..."
    if isinstance(value, (list, tuple, dict)) and not value:
        return f"an empty {type(value).__name__}"
    return f"of type {type(value).__name__}"


class Fields:
    """The entries of a mapping that was read from a file, taken out by name and type.

    Args:
        mapping: what was read.
        where: what it is, which begins every message: "checkpoint last.pth.tar does not fit this run", say.
        path: the names that lead to it in the file; empty for the whole.

    Raises:
        ValueError: by every method, naming the field, its value and what is accepted; here if it is no mapping.
    """

    def __init__(self, mapping: Any, where: str, path: str = "") -> None:
        self.where = where
        self.path = path
        if not isinstance(mapping, Mapping):
            raise ValueError(f"{where}: {path or 'its content'} is {shown(mapping)}; it must be a dictionary")
        self.mapping = mapping

    def has(self, name: str) -> bool:
        """Whether there is such an entry, and it is not None."""
        return self.mapping.get(name) is not None

    def text(self, name: str) -> str:
        """Return a string."""
        value = self._entry(name)
        return value if isinstance(value, str) else self.refuse(name, value, "a string")

    def integer(self, name: str, bounds: Bounds = ANY) -> int:
        """Return an integer within bounds; a bool is none."""
        value = self._entry(name)
        if isinstance(value, bool) or not isinstance(value, int) or value not in bounds or abs(value) > 2**62:
            return self.refuse(name, value, "an integer" if bounds == ANY else f"an integer, {bounds}")
        return value

    def number(self, name: str, bounds: Bounds = ANY) -> float:
        """Return a finite number within bounds."""
        value = self._entry(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
            return self.refuse(name, value, "a finite number")
        return value if value in bounds else self.refuse(name, value, str(bounds))

    def flag(self, name: str) -> bool:
        """Return a bool."""
        value = self._entry(name)
        return value if isinstance(value, bool) else self.refuse(name, value, "true or false")

    def fields(self, name: str) -> Fields:
        """Return a mapping."""
        return Fields(self._entry(name), self.where, self._full(name))

    def items(self, name: str) -> Sequence[Any]:
        """Return a list or tuple."""
        value = self._entry(name)
        return value if isinstance(value, (list, tuple)) else self.refuse(name, value, "a list")

    def inside(self, name: str) -> Fields:
        """Return a list as a mapping of ``name[0]`` and so on to its elements."""
        return Fields({f"{name}[{index}]": item for index, item in enumerate(self.items(name))}, self.where, self.path)

    def each(self, name: str) -> list[Fields]:
        """Return a list of mappings."""
        places = enumerate(self.items(name))
        return [Fields(item, self.where, f"{self._full(name)}[{index}]") for index, item in places]

    def refuse(self, name: str, value: Any, accepted: str) -> NoReturn:
        """Raise for an entry that is not what it must be."""
        raise ValueError(f"{self.where}: {self._full(name)} is {shown(value)}; it must be {accepted}")

    def _full(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def _entry(self, name: str) -> Any:
        if name not in self.mapping:
            raise ValueError(f"{self.where}: it lacks {self._full(name)}")
        return self.mapping[name]


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond what a float holds
        return False
