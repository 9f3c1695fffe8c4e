"""What lies in the shards of a WebDataset: looked at before the first image is read.

A shard that is missing or cut off would end a run in its middle, and one that was cut off between two images would
not even be noticed.
"""

from __future__ import annotations

import re
import tarfile
from pathlib import Path
from typing import Any


def check_shards(reader: Any, counted: bool) -> None:
    """Refuse shards that are not there and, if they are counted, that hold other numbers of images than described.

    Args:
        reader: timm's reader of the shards; those that no file system holds are not looked at.
        counted: whether to read the archives' headers, which takes a second per 10,000 images or so.

    Raises:
        ValueError: naming the shard.
    """
    info = reader.split_info
    lengths = dict(zip(info.filenames, info.shard_lengths, strict=False))
    for name in info.filenames:
        path = Path(reader.root or "") / name
        if re.search(r"^\w+:|::", str(name)) or re.match(r"\w+:", str(reader.root or "")):
            continue  # a URL or a command
        if not path.is_file():
            raise ValueError(f"the shard {path} is missing: restore it, or leave it out of _info.json or of the split")
        if path.suffix == ".tar" and not _is_ended(path):
            raise ValueError(f"the shard {path} is cut off: nothing ends the archive; restore it")
        if counted and name in lengths and (held := _samples(path)) != lengths[name]:
            raise ValueError(f"the shard {path} holds {held} samples and _info.json says {lengths[name]}: restore it")


def _is_ended(path: Path) -> bool:
    """Whether an archive ends as it must, in blocks of zeros: one that is cut off between two files reads well."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 512))
        return size % 512 == 0 and not any(file.read())


def _samples(path: Path) -> int:
    """How many samples an archive holds: files of one name up to the first dot are one."""
    try:
        with tarfile.open(path) as archive:
            names = [member.name for member in archive if member.isfile()]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"the shard {path} cannot be read: {error}; restore it") from error
    split = [re.match(r"((?:.*/|)[^.]+)[.][^/]*$", name) for name in names if not re.match(r"__[^/]*__($|/)", name)]
    return len({match.group(1) for match in split if match})
