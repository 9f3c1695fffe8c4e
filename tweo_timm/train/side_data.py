"""The data of a run with --side-cache: features that are computed once, in place of images.

The images are those that a run without a cache would read with --no-aug; or, with --side-augmentations N, N augmented
variants of each training image, drawn by the seed, of which each epoch reads one. All processes share the work.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tweo_timm.run.class_names import names_by_index
from tweo_timm.run.classes import class_names
from tweo_timm.run.progress import ProgressLine
from tweo_timm.run.world import World
from tweo_timm.side.cache import CachedFeatures, FeatureCache
from tweo_timm.side.network import SideNetwork
from tweo_timm.train.data import set_transform
from tweo_timm.train.folder import locked
from tweo_timm.train.options import TrainOptions
from tweo_timm.train.replay import RandomState

_logger = logging.getLogger(__name__)
_LOOKED_AT = 64  # images of a split whose pixels are part of its fingerprint


def cached_datasets(
    options: TrainOptions, net: nn.Module, data_config: dict[str, Any], world: World
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Return what makes of the two splits of a run their features, which are computed if they are not there.

    Args:
        options: the run's options.
        net: the side network; it reads features once they are there.
        data_config: timm's resolved preprocessing.
        world: device and rank.
    """
    assert isinstance(net, SideNetwork)

    def cached(train_set: Any, val_set: Any) -> tuple[Any, Any]:
        found: list[CachedFeatures] = []
        for dataset, split, training in ((train_set, options.train_split, True), (val_set, options.val_split, False)):
            if dataset is None:
                continue
            if isinstance(dataset, IterableDataset):
                raise ValueError(
                    f"--side-cache needs images by number, and --dataset {options.dataset} is a stream: leave it out"
                )
            set_transform(options, data_config, dataset, training)
            cache = _cache_of(options, net, dataset, split, training)
            _compute_if_missing(options, net, dataset, cache, world)
            found.append(CachedFeatures(cache, dataset))
        net.from_cache = True
        return found[0], found[1] if val_set is not None else None

    return cached


def _cache_of(options: TrainOptions, net: SideNetwork, dataset: Any, split: str, training: bool) -> FeatureCache:
    description = net.describe()
    key = {
        "backbone": description["backbone"],
        "reads": description["reads"],
        "sum": net.summed,
        "images": str(dataset.transform),
        "mode": f"{dataset.reading.mode}{' upright' if options.exif else ''}",
        "data": _fingerprint(options, dataset),
        "seed": options.seed if training and not options.no_aug else None,
    }
    name = _file_name(split)
    if not training and name == _file_name(options.train_split):
        name += "-validation"
    variants = max(options.side_augmentations, 1) if training else 1
    return FeatureCache(Path(options.side_cache), name, key, (len(dataset), variants, *net.feature_shape))


def _file_name(split: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "-_" else "-" for sign in split)


def _fingerprint(options: TrainOptions, dataset: Any) -> str:
    """Of the names, sizes and classes of all images, and the pixels and targets of some, spread over the split."""
    digest = hashlib.sha256()
    names = names_by_index(class_names(dataset))
    digest.update(repr((len(dataset), options.task, options.target_format, options.target_key, names)).encode())
    inner = dataset.inner
    for index in range(len(dataset)) if getattr(inner, "reader", None) is not None else ():
        digest.update(f"{inner.filename(index)}\n".encode("utf-8", "surrogateescape"))
        path = str(inner.filename(index, absolute=True))
        if os.path.isfile(path):
            digest.update(f"{os.path.getsize(path)}\n".encode())
    plain = copy.copy(dataset)
    plain.transform = np.asarray
    for index in sorted({int(place) for place in np.linspace(0, len(dataset) - 1, _LOOKED_AT)}):
        pixels, target = plain[index]
        digest.update(np.ascontiguousarray(pixels).tobytes() + repr(np.asarray(target).tolist()).encode())
    return digest.hexdigest()[:16]


def _compute_if_missing(
    options: TrainOptions, net: SideNetwork, dataset: Any, cache: FeatureCache, world: World
) -> None:
    """Let the first process look, all compute, and the first one close the cache; what it refuses, all raise."""
    with contextlib.ExitStack() as held:
        complete, refusal = False, None
        if world.primary:
            try:
                complete = cache.is_complete() or _begin(cache, held)
            except (ValueError, OSError) as error:
                refusal = error
        complete, refusal = world.gather((complete, refusal))[0]
        if refusal is not None:
            raise refusal
        if complete:
            _logger.info("Features from %s, split %s: %d images", cache.folder, cache.name, cache.shape[0])
            return
        parts = world.gather(_compute(options, net, dataset, cache, world))
        if world.primary:
            merged = {index: target for part in parts for index, target in part.items()}
            cache.finish(torch.stack([merged[index] for index in range(len(dataset))]))
    world.gather(None)


def _begin(cache: FeatureCache, held: contextlib.ExitStack) -> bool:
    """Have the folder to oneself, say how large the cache will be, and refuse what does not fit.

    Returns:
        Whether another run has completed the cache in between: then there is nothing to do.
    """
    gigabytes = cache.size / 1e9
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(cache.folder, "--side-cache"))
        if cache.is_complete():
            return True
        free = shutil.disk_usage(cache.folder).free / 1e9
        _logger.info(
            "Computing features into %s, split %s: %d images x %d of %s, %.3f GB (%.1f GB are free)",
            *(cache.folder, cache.name, *cache.shape[:2], "x".join(map(str, cache.shape[2:])), gigabytes, free),
        )
        if gigabytes > free:
            raise ValueError(
                f"--side-cache {cache.folder}: {gigabytes:.3g} GB of features do not fit into {free:.3g} GB: give "
                "another folder, a larger --side-gap, or --side miet, which keeps one sum an image"
            )
        cache.begin()
    except OSError as error:
        raise ValueError(f"--side-cache {cache.folder} cannot be written: {error}") from error
    return False


def _compute(
    options: TrainOptions, net: SideNetwork, dataset: Any, cache: FeatureCache, world: World
) -> dict[int, Tensor]:
    """Write this process's part of the features; the targets of its images."""
    present = RandomState.capture()
    net.eval()
    targets: dict[int, Tensor] = {}
    mine = range(world.rank, len(dataset), world.size)
    for variant in range(cache.shape[1]):
        part = _Part(dataset, mine, options.seed + variant * len(dataset))
        size = options.validation_batch_size or options.batch_size
        loader: DataLoader[Any] = DataLoader(part, size, num_workers=options.workers)
        with ProgressLine(f"features of {cache.name}", len(loader), world.primary) as bar:
            for index, images, labels in loader:
                cache.write(index, variant, net.features(images.to(world.device)))
                targets |= dict(zip(index.tolist(), labels, strict=True))
                bar.advance()
    dataset.alterations.report()
    present.restore()
    return targets


class _Part(Dataset[Any]):
    """Some images of a split with their numbers, each augmented by a seed of its own, whoever reads it."""

    def __init__(self, dataset: Any, numbers: range, seed: int) -> None:
        self._dataset, self._numbers, self._seed = dataset, numbers, seed

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> tuple[int, Any, Any]:
        index = self._numbers[place]
        seed = (self._seed + index) % 2**32
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - what timm's augmentations draw from
        torch.manual_seed(seed)
        image, target = self._dataset[index]
        return index, image, target
