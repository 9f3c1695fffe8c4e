"""The classes of a dataset: their names, the file that numbers them, and whether labels fit the model.

timm numbers the classes that it finds in a split, from 0: a class that one split lacks would make labels wrong without
a word. Labels are checked as they are read, in pictures.py.
"""

from __future__ import annotations

import numbers
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from tweo_timm.suggestion import suggest_path


def class_names(dataset: Any) -> dict[str, int] | None:
    """Return the name -> index mapping of a dataset whose classes have names, None for others."""
    inner = getattr(dataset, "inner", dataset)
    reader = getattr(inner, "reader", inner)  # torchvision's datasets have no reader
    mapping = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return {str(name): index for name, index in mapping.items()} if mapping else None


def read_class_map(path: str, folders: Iterable[Path | None]) -> dict[Any, int]:
    """Read the file of --class-map: a .txt with one name per line, numbered from 0, or a .pkl of {name: index}.

    Args:
        path: as given; looked for as it is, then in `folders`, as timm does.
        folders: where the data lies; None is left out.

    Raises:
        ValueError: if there is no such file, or it numbers no classes.
    """
    places = [Path(path), *(folder / path for folder in folders if folder is not None)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(f"--class-map {path} is no file{suggest_path(path)}")
    if found.suffix.lower() not in (".txt", ".pkl"):
        raise ValueError(f"--class-map {path} must be a .txt file (a name per line) or a .pkl file ({{name: index}})")
    try:
        mapping = _numbered(found) if found.suffix.lower() == ".txt" else _unpickled(found)
        if not isinstance(mapping, dict):
            raise ValueError(f"it holds a {type(mapping).__name__}")
        _check_indices(mapping)
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"--class-map {path}: {error}; give a name per line, or a dict of name to index") from error
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
    names = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
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


def check_num_classes(dataset: Any, num_classes: int, mapped: bool = False, chosen: bool = False) -> None:
    """Refuse a dataset whose classes the model cannot tell apart.

    Args:
        dataset: what `open_dataset` returned.
        num_classes: of the model.
        mapped: whether --class-map chose the indices, which may then leave some out.
        chosen: whether `num_classes` are those that --valid-labels chose of the model's.

    Raises:
        ValueError: if the numbers differ, or a mapped index is out of range.
    """
    names = class_names(dataset)
    if not names:
        return
    count = max(names.values()) + 1  # torchvision's ImageNet has several names per class
    if mapped and count <= num_classes:
        return
    if mapped or count != num_classes:
        if chosen:
            raise ValueError(f"the data has {count} classes and --valid-labels lists {num_classes}: list each once")
        what = f"up to index {count - 1}" if mapped else f"{count}"
        raise ValueError(
            f"the data has {what} classes ({', '.join(list(names)[:3])}, ...) and the model {num_classes}: "
            f"pass --num-classes {count}, or --class-map FILE for a subset (validate.py: or "
            "--valid-labels FILE, which says which of the model's classes those of the data are)"
        )


def check_same_classes(splits: Mapping[str, Any]) -> None:
    """Refuse a class that one split has no image of: timm numbers those that it finds in a split, from 0.

    Args:
        splits: the datasets of a run by the names of their splits; None for one that is not used.

    Raises:
        ValueError: naming the classes and the split.
    """
    names = {split: class_names(dataset) for split, dataset in splits.items()}
    known = {split: found for split, found in names.items() if found}
    every = set().union(*known.values())
    lacking = {split: sorted(every - set(found)) for split, found in known.items() if set(found) != every}
    if lacking:
        which = (
            f"{split} has no image of {', '.join(some[:3])}{', ...' * (len(some) > 3)}"
            for split, some in lacking.items()
        )
        raise ValueError(
            f"the classes of the splits differ: {'; '.join(which)}. They would be numbered differently: add images, or "
            "pass a --class-map FILE that numbers all"
        )
    if len({tuple(sorted(found.items())) for found in known.values()}) > 1:
        raise ValueError(f"{' and '.join(known)} number the same classes differently: pass a --class-map FILE")
