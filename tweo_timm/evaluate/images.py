"""The images of a validation run: the split that is scored, and fixed samples for calibration and diagnosis."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.data import RealLabelsImagenet, create_loader
from torch import Tensor

from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.run.classes import check_num_classes, class_names
from tweo_timm.run.dataset import image_dtype, open_dataset, target_details
from tweo_timm.run.folders import split_folder
from tweo_timm.run.readers import reads_folders
from tweo_timm.run.samples import fixed_sample
from tweo_timm.run.world import World


@dataclass
class Images:
    """A loader of a split and what identifies the split.

    Attributes:
        loader: yields (images (B, C, H, W), targets) on the device, in the dataset's order.
        dataset: behind it.
        fingerprint: of file names (or of the dataset's name and size); equal for equal data.
        valid_labels: which of the model's classes those of the data are, in the data's order; None if they are alike.
        real_labels: makes timm's scorer of ReaL labels for one pass; None for ordinary labels.
        classes: how many the model tells apart here; 0 for a model without a head, of which nothing is scored.
    """

    loader: Any
    dataset: Any
    fingerprint: str
    valid_labels: list[int] | None
    real_labels: Callable[[], RealLabelsImagenet] | None
    classes: int


def open_images(options: ValidateOptions, data_config: dict[str, Any], num_classes: int, world: World) -> Images:
    """Open the split that is scored.

    Raises:
        ValueError: if it cannot be found, or its classes do not fit the model.
    """
    if options.quantize or options.survey:
        _require_split(options, options.calibration_split)
    if num_classes == 0 and (options.task == "multilabel" or options.valid_labels):
        raise ValueError("--task multilabel and --valid-labels need a model with classes, which this one has not")
    targets = target_details(options, num_classes)
    valid_labels = _valid_labels(options.valid_labels, num_classes) if options.valid_labels else None
    classes = num_classes if valid_labels is None else len(valid_labels)
    single = None if options.task == "multilabel" or not classes else classes
    dataset = open_dataset(
        options, options.split, data_config, single, options.exif, num_samples=options.num_samples, **targets
    )
    if classes:
        check_num_classes(dataset, classes, mapped=bool(options.class_map), chosen=valid_labels is not None)
    if world.distributed and isinstance(dataset, torch.utils.data.IterableDataset):
        raise ValueError(
            f"--dataset {options.dataset} is a stream, which processes cut unevenly and repeat in part: validate it in "
            "one process, without torchrun"
        )
    loader = _loader(options, data_config, dataset, world, prefetch=not options.no_prefetcher)
    real_labels = _real_labels(options, _names(dataset), classes) if options.real_labels else None
    fingerprint = hashlib.sha256(_identity(options, dataset).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return Images(loader, dataset, fingerprint, valid_labels, real_labels, classes)


def _require_split(options: ValidateOptions, split: str) -> None:
    """Refuse a split to calibrate on that is not there: timm would read the images that are scored."""
    root = options.data or options.data_dir
    if root is None:
        raise ValueError("no data: pass --data-dir FOLDER (with train/ and val/ inside), or --dataset TYPE/NAME")
    if reads_folders(options.dataset) and split != options.split and split_folder(Path(root), split) is None:
        raise ValueError(
            f"{root} holds no split {split!r} to calibrate on: pass the folder that holds the training split too, or "
            f"choose another with --calibration-split"
        )


def _identity(options: ValidateOptions, dataset: Any) -> str:
    """What makes this split the one it is, as text: equal for equal images and labels."""
    stream = isinstance(dataset, torch.utils.data.IterableDataset)
    names = None if stream else _names(dataset)
    names = None if names is not None and "None" in names else names  # hfds/ keeps images that have none
    shards = getattr(getattr(getattr(dataset, "reader", None), "split_info", None), "filenames", None)
    whole = f"{options.dataset} {options.data_dir} {options.split}" + "".join(f"\n{name}" for name in shards or ())
    identity = "\n".join(names) if names is not None else whole
    identity += f"\n{options.num_samples}"
    identity += "".join(f"\n{key}" for key in (options.input_key, options.target_key) if key)
    identity += "\nexif" if options.exif else ""
    for labels in (options.real_labels, options.valid_labels):  # other labels, other data
        identity += f"\n{Path(labels).read_text()}" if labels else ""
    return identity + (f"\n{sorted((class_names(dataset) or {}).items())}" if options.class_map else "")


def _valid_labels(path: str, num_classes: int) -> list[int]:
    """Read the file of --valid-labels: line i says which class of the model is class i of the data, as in timm."""
    try:
        labels = [int(line) for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--valid-labels {path} takes a file with one class index a line: {error}") from error
    odd = [label for label in labels if not 0 <= label < num_classes]
    if odd or len(set(labels)) < len(labels) or not labels:
        what = f"index {odd[0]}" if odd else "an index twice" if labels else "no index"
        raise ValueError(f"--valid-labels {path} holds {what}; it takes each at most once, from 0 to {num_classes - 1}")
    return labels


def _real_labels(
    options: ValidateOptions, names: list[str] | None, num_classes: int
) -> Callable[[], RealLabelsImagenet]:
    if num_classes < 5:
        raise ValueError(
            f"--real-labels counts the five best of a model's classes, and here are {num_classes}: leave it out"
        )
    if names is None:
        raise ValueError("--real-labels needs file names: use it with an image folder or tar of ImageNet")
    make = functools.partial(
        RealLabelsImagenet, [name.rsplit("/", 1)[-1] for name in names], real_json=options.real_labels
    )
    try:
        make()
    except AssertionError as error:
        raise ValueError(
            f"--real-labels {options.real_labels} is for another number of images than the {len(names)} of split "
            f"{options.split!r}: it goes with the whole validation split of ImageNet"
        ) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"--real-labels {options.real_labels} is no JSON list of labels: {error}") from error
    return make


def sample_images(
    options: ValidateOptions, data_config: dict[str, Any], num_classes: int, split: str, count: int, batch_size: int
) -> list[Tensor]:
    """Read a fixed random sample of a split, preprocessed as for validation, without augmentation.

    Args:
        options: where the data is; `seed` chooses the images.
        data_config: timm's resolved preprocessing.
        num_classes: of the model.
        split: for example 'train'.
        count: how many images, fewer if the split is smaller.
        batch_size: images in a batch.

    Returns:
        Batches (B, C, H, W), float32, on the CPU.

    Raises:
        ValueError: if the split cannot be found.
    """
    dataset = open_dataset(
        options, split, data_config, exif=options.exif, num_samples=None, **target_details(options, num_classes)
    )
    _loader(replace(options, workers=0), data_config, dataset, World(torch.device("cpu")), prefetch=False)
    return fixed_sample(dataset, count, batch_size, options.seed, options.workers)


def _loader(options: ValidateOptions, data_config: dict[str, Any], dataset: Any, world: World, prefetch: bool) -> Any:
    if options.tf_preprocessing and importlib.util.find_spec("tensorflow") is None:
        raise ValueError("--tf-preprocessing needs the package tensorflow: pip install tensorflow")
    return create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=options.batch_size,
        is_training=False,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        num_workers=options.workers,
        distributed=world.distributed,
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        crop_border_pixels=options.crop_border_pixels,
        pin_memory=options.pin_mem,
        device=world.device,
        use_prefetcher=prefetch,
        persistent_workers=False,
        img_dtype=image_dtype(options),
        tf_preprocessing=options.tf_preprocessing,
    )


def _names(dataset: Any) -> list[str] | None:
    """Names of all images relative to the root, or None where the reader does not know them."""
    inner = getattr(dataset, "inner", dataset)
    try:
        return [str(name) for name in inner.filenames()]
    except (AttributeError, NotImplementedError, AssertionError):
        return None
