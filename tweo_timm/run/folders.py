"""What lies in a folder of images: the split that is asked for, and what timm would pass over or wait for.

timm reads every image under the root where a split is not there, and files of three extensions alone. Opening a pipe
(FIFO) would wait for its writer.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions

from tweo_timm.suggestion import suggest

_logger = logging.getLogger(__name__)

# Folders that timm takes for one another when a split is asked for.
_SPLIT_FOLDERS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))


def split_folder(root: Path, split: str) -> Path | None:
    """Return the folder of a split under `root`, as timm finds it; None where timm would read all of `root` instead."""
    name = split.split("[")[0]
    names = next((names for names in _SPLIT_FOLDERS if name in names), ())
    return next((root / one for one in (name, *names) if (root / one).exists()), None)


def check_split(root: Path, split: str) -> None:
    """Refuse a split that is not there, for which timm would read every image of every split under `root`.

    Raises:
        ValueError: naming the splits that are there.
    """
    if split_folder(root, split) is not None:
        return
    splits = [name for names in _SPLIT_FOLDERS for name in names if (root / name).is_dir()]
    if splits:
        raise ValueError(f"{root} holds no split {split!r}, but {', '.join(splits)}{suggest(split, splits)}")


def check_files(folder: Path, input_key: str | None, classes: Collection[str] | None) -> None:
    """Say which images of a folder are not read, and refuse what is no file.

    Args:
        folder: of one split.
        input_key: the extensions that are read, as --input-key gives them; None for timm's.
        classes: the names of --class-map; None without.

    Raises:
        ValueError: for a pipe, a socket or a device of an image's name.
    """
    read = {one.lower() for one in (input_key.split(";") if input_key else get_img_extensions())}
    known = Image.registered_extensions().keys() - {".pdf", ".eps", ".ps", ".mpg", ".mpeg"}
    passed_over: Counter[str] = Counter()
    unmapped: Counter[str] = Counter()
    for entry in _files(folder):
        extension = os.path.splitext(entry.name)[1].lower()
        if extension in read:
            if not entry.is_file():
                raise ValueError(f"{entry.path} is named like an image and is no file: remove it")
            label = os.path.basename(os.path.dirname(entry.path))
            if classes is not None and label not in classes:
                unmapped[label] += 1
        elif extension in known:
            passed_over[extension] += 1
    if passed_over:
        every = ";".join(sorted(read | passed_over.keys()))
        _logger.warning("%s: not read are %s; --input-key '%s' reads all", folder, _counted(passed_over), every)
    if unmapped:
        _logger.warning("%s: --class-map leaves out the images of %s", folder, _counted(unmapped))


def _counted(things: Counter[str]) -> str:
    shown = ", ".join(f"{name} ({count})" for name, count in things.most_common(3))
    return shown + f" and {len(things) - 3} more" * (len(things) > 3)


def _files(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files(entry.path)
            else:
                yield entry
