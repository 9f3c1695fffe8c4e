"""The file of --class-map, which says which index a class has: where it lies, and what it holds.

timm numbers empty lines and names that stand there twice, and runs the code that a pickle asks for: refused here.
"""

from __future__ import annotations

import numbers
import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from tweo_timm.run.folders import split_folder
from tweo_timm.suggestion import suggest_path


def find_class_map(class_map: str, root: str | None = None, split: str = "") -> Path | None:
    """Return the file of --class-map: as it is named, or, as in timm, where the data lies; None if there is none.

    Args:
        class_map: as given.
        root: the folder of the data.
        split: whose folder in `root` is looked into too.
    """
    data = [] if root is None else [Path(root), split_folder(Path(root), split) or Path(root)]
    return next((folder / class_map for folder in (Path(), *data) if (folder / class_map).is_file()), None)


def read_class_map(class_map: str, root: str | None = None, split: str = "") -> dict[Any, int]:
    """Read the file of --class-map: a .txt with one name per line, numbered from 0, or a .pkl of {name: index}.

    Takes the arguments of `find_class_map`.

    Raises:
        ValueError: if there is no such file, or it numbers no classes.
    """
    found = find_class_map(class_map, root, split)
    if found is None:
        raise ValueError(f"--class-map {class_map} is no file{suggest_path(class_map)}")
    if found.suffix.lower() not in (".txt", ".pkl"):
        raise ValueError(
            f"--class-map {class_map} must be a .txt file (a name per line) or a .pkl file ({{name: index}})"
        )
    try:
        mapping = _numbered(found) if found.suffix.lower() == ".txt" else _unpickled(found)
        if not isinstance(mapping, dict):
            raise ValueError(f"it holds a {type(mapping).__name__}")
        _check_indices(mapping)
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(
            f"--class-map {class_map}: {error}; give a name per line, or a dict of name to index"
        ) from error
    return dict(mapping)


class _Plain(pickle.Unpickler):
    """Reads dictionaries of names and numbers, which need no code; timm's own reader runs what a file asks for."""

    def find_class(self, module: str, name: str) -> NoReturn:
        """Refuse."""
        raise ValueError(f"it holds {module}.{name}, which is not loaded because it can run code")


def _unpickled(path: Path) -> Any:
    with open(path, "rb") as file:
        return _Plain(file).load()


def _numbered(path: Path) -> dict[str, int]:
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    if "" in names:
        raise ValueError(f"line {names.index('') + 1} is empty, which timm counts as a class")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} stands there twice")
    return {name: index for index, name in enumerate(names)}


def _check_indices(mapping: Mapping[Any, Any]) -> None:
    if not mapping:
        raise ValueError("it names no class")
    for name, index in mapping.items():
        whole = isinstance(index, numbers.Integral) and not isinstance(index, bool)
        if not whole or index < 0:
            raise ValueError(f"class {name!r} has the index {index!r}, which must be a whole number from 0 on")
