"""Features on the disk: what a frozen backbone computes of a split, written once and read by memory mapping.

A cache is two files and a description, which is written last, in one step, when the others are on the disk: a cache
that a crash left half written has none, and is written anew. The description says of what the features are: backbone,
streams, preprocessing, data. Features of anything else are refused, and so are files that were changed: their checksums
are compared when a cache is opened. Files that were replaced since then, by features of something else say, are not
read.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tweo_timm.outputs import Outputs
from tweo_timm.records import Fields
from tweo_timm.settings import AT_LEAST_0
from tweo_timm.side.backbone import differences

_DTYPE = np.dtype("<f4")
_CHUNK = 1 << 24
KEY, SUMS = "of", "checksums"


@dataclass(frozen=True)
class FeatureCache:
    """The features of one split, in a folder.

    Attributes:
        folder: of all splits.
        name: of the split, for the files' names.
        key: what the features are of, ready for JSON.
        shape: (images, variants, K, N, C).
    """

    folder: Path
    name: str
    key: Mapping[str, Any]
    shape: tuple[int, int, int, int, int]

    @property
    def size(self) -> int:
        """Bytes of the features, float32."""
        return int(np.prod(self.shape, dtype=np.int64)) * _DTYPE.itemsize

    @property
    def _paths(self) -> dict[str, Path]:
        return {kind: self.folder / f"{self.name}.{kind}" for kind in ("features", "targets")}

    def is_complete(self) -> bool:
        """Whether the cache is there; its files are read, and compared with their checksums.

        Raises:
            ValueError: it is of something else, or its files were changed.
        """
        description = self.folder / f"{self.name}.json"
        if not description.exists():
            return False
        where = f"--side-cache {self.folder}, split {self.name}"
        remedy = "give another folder, or delete this one"
        try:
            found = Fields(json.loads(description.read_text(encoding="utf-8")), description.name)
            before = dict(found.fields(KEY).mapping)
            sums = {kind: found.fields(SUMS).integer(kind, AT_LEAST_0) for kind in self._paths}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: its description cannot be read ({error}): {remedy}") from error
        now = json.loads(json.dumps({**self.key, "shape": self.shape}))
        if before != now:
            raise ValueError(f"{where} is of something else: {differences(before, now)}: {remedy}")
        for kind, path in self._paths.items():
            if sums[kind] != _checksum(path):
                raise ValueError(f"{where}: {path.name} is not as it was written: {remedy}")
        return True

    def begin(self) -> None:
        """Make the file that `write` fills, and take its full size on the disk.

        Raises:
            OSError: the disk has no room for it.
        """
        path = self._paths["features"]
        path.unlink(missing_ok=True)  # of a run that was killed; a link goes, not what it points to
        with open(path, "xb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self.size)
            file.truncate(self.size)

    def write(self, index: Tensor, variant: int, features: Tensor) -> None:
        """Put features (B, K, N, C) of images (B,) of the split, in one of their variants, into their places.

        Raises:
            OSError: the system refused; through a mapping it would end the process without a word.
        """
        values = features.float().cpu().numpy().astype(_DTYPE, copy=False)
        each = values[0].nbytes
        with open(self._paths["features"], "r+b") as file:
            for number, value in zip(index.tolist(), values, strict=True):
                file.seek((number * self.shape[1] + variant) * each)
                file.write(value.tobytes())

    def finish(self, targets: Tensor) -> None:
        """Bring everything to the disk, and say that it is complete.

        Args:
            targets: of all images, in the order of the split.
        """
        with open(self._paths["features"], "r+b") as file:
            os.fsync(file.fileno())
        labels = io.BytesIO()
        np.save(labels, targets.numpy())
        outputs = Outputs(self.folder)
        outputs.write(self._paths["targets"].name, labels.getvalue())
        sums = {kind: _checksum(path) for kind, path in self._paths.items()}
        text = json.dumps({KEY: {**self.key, "shape": self.shape}, SUMS: sums}, indent=1)
        outputs.write(f"{self.name}.json", text)

    def targets(self) -> Tensor:
        """Return the targets of all images."""
        return torch.from_numpy(np.load(self._paths["targets"], allow_pickle=False))

    def state(self) -> tuple[int, ...]:
        """Return what tells the file of features from one that took its place, or was written into."""
        return _state(os.stat(self._paths["features"]))

    def mapped(self, state: tuple[int, ...]) -> np.memmap[Any, Any]:
        """Map the features, float32 of `shape`, for reading.

        Args:
            state: the `state` in which they were found complete.

        Raises:
            OSError: they are not there, or were replaced.
        """
        path = self._paths["features"]
        with open(path, "rb") as file:
            if _state(os.fstat(file.fileno())) != state:
                raise OSError(
                    f"--side-cache {self.folder}: {path.name} was written anew while this run read it: it is not "
                    "used. Go on with --resume auto, and give each run of other features a folder of its own"
                )
            return np.memmap(file, _DTYPE, "r", shape=self.shape)


def _state(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _checksum(path: Path) -> int:
    """CRC32 of a file; -1 if there is none."""
    total = 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                total = zlib.crc32(chunk, total)
    except FileNotFoundError:
        return -1
    return total


class CachedFeatures(Dataset[Any]):
    """A split of which there are features in place of images.

    Args:
        cache: complete.
        dataset: the split itself, for what else is asked of it.

    Attributes:
        dataset: the split itself.
        transform: timm's loaders set it; features are not transformed.
    """

    def __init__(self, cache: FeatureCache, dataset: Any) -> None:
        self.dataset = dataset
        self.transform: Any = None
        self._cache = cache
        self._state = cache.state()
        self._targets = cache.targets()
        self._epoch = 0
        # Mapped here, for the loader's processes too: what replaces the file later is another file.
        self._features: np.memmap[Any, Any] | None = cache.mapped(self._state)

    @property
    def alterations(self) -> Any:
        """What was read otherwise than it is seen when the features were computed."""
        return self.dataset.alterations

    def __len__(self) -> int:
        return self._cache.shape[0]

    def set_epoch(self, epoch: int) -> None:
        """Choose the variants of an epoch: image i is read in variant (epoch + i) modulo their number."""
        self._epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if self._features is None:  # in a process that was not forked
            self._features = self._cache.mapped(self._state)
        variant = (self._epoch + index) % self._cache.shape[1]
        target = self._targets[index]
        return torch.from_numpy(np.array(self._features[index, variant])), int(target) if target.ndim == 0 else target

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_features": None}
