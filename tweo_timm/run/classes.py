"""The classes of a dataset: their names, and whether labels fit the model.

timm numbers the classes that it finds in a split, from 0: a class that one split lacks would make labels wrong without
a word. Labels are checked as they are read, in pictures.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def class_names(dataset: Any) -> dict[str, int] | None:
    """Return the name -> index mapping of a dataset whose classes have names, None for others."""
    inner = getattr(dataset, "inner", dataset)
    reader = getattr(inner, "reader", inner)  # torchvision's datasets have no reader
    mapping = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return {str(name): index for name, index in mapping.items()} if mapping else None


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
    if set(names) == {""}:
        raise ValueError("the data has images but no class folders: put those of each class into a folder of its name")
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
