"""Tables of what a name stands for: one line per thing, and no other list of the same names anywhere.

A setting, a flag, a check, a message and ``-h`` read the names from the table itself, each time they are asked, so that
a thing is added by its file and its line. Where the thing needs torch, its table holds an `Entry`, which is imported on
use: ``-h`` needs the names only. `register` adds a line for the length of a test.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class Entry:
    """Something that is imported when it is used.

    Attributes:
        path: "package.module:name".
    """

    path: str

    def load(self) -> Any:
        """Import the module, and return what it calls by the name."""
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(module), name)


class Names(Collection[str]):
    """The names of a table, as choices of a setting or a flag; they follow the table.

    Args:
        table: the table, in the order in which its names are shown.
        before: words that are accepted beside them, such as "auto"; they are shown first.
    """

    def __init__(self, table: Mapping[str, object], *before: str) -> None:
        self._table, self._before = table, before

    def __iter__(self) -> Iterator[str]:
        return iter((*self._before, *self._table))

    def __len__(self) -> int:
        return len(self._before) + len(self._table)

    def __contains__(self, name: object) -> bool:
        return name in self._before or name in self._table


@contextlib.contextmanager
def register(table: MutableMapping[str, Value], name: str, entry: Value) -> Iterator[None]:
    """Add a line to a table inside the context.

    Raises:
        ValueError: the table has the name already.
    """
    if name in table:
        raise ValueError(f"{name!r} is registered already; the names are {', '.join(table)}")
    table[name] = entry
    try:
        yield
    finally:
        del table[name]
