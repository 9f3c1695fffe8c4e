"""Which class an index of the model is, by name: kept in checkpoints, and compared with what the data says now.

timm numbers the classes that it finds in a split, so a folder that is renamed, or another class map, gives every class
after it another index: a model that was right is wrong then, and nothing else tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KEY = "class_names"
"""Where a checkpoint holds them: a list by index, with None where an index has no name."""

Names = Sequence[str | None]


def names_by_index(indices: Mapping[Any, int] | None) -> list[str | None] | None:
    """Turn name -> index into a list by index; the names that share an index are one, joined."""
    if not indices:
        return None
    found: dict[int, list[str]] = {}
    for name, index in indices.items():
        found.setdefault(int(index), []).append(str(name))
    return [", ".join(sorted(found[index])) if index in found else None for index in range(max(found) + 1)]


def recorded_names(content: Mapping[str, Any]) -> list[str | None] | None:
    """Return the names that a checkpoint holds; None if it holds none, or, of other code, something else."""
    names = content.get(KEY)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str | None) for name in names):
        return None
    return list(names)


def check_same_names(trained: Names | None, now: Names | None, where: str, remedy: str) -> None:
    """Refuse data in which an index is another class than for the model. What has no name is not compared.

    Args:
        trained: names by index, of the checkpoint.
        now: names by index, of the data.
        where: which checkpoint, for the message.
        remedy: what to do about it.

    Raises:
        ValueError: naming the first classes that differ.
    """
    pairs = enumerate(zip(trained or (), now or (), strict=False))
    differing = [(index, a, b) for index, (a, b) in pairs if a is not None and b is not None and a != b]
    if not differing:
        return
    shown = "; ".join(f"class {index} is {a!r} there and {b!r} in the data" for index, a, b in differing[:3])
    more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise ValueError(f"the classes are not those of {where}: {shown}{more}: {remedy}")
