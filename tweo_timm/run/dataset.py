"""A split of a dataset, by timm's readers, for training and validation alike: found, opened, sized and labelled."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import IterableImageDataset, MultiLabelTarget, create_dataset, resolve_input_data_config
from torch import nn

from tweo_timm.run.class_map import read_class_map
from tweo_timm.run.folders import check_files, check_split, split_folder
from tweo_timm.run.pictures import Reading, StrictImages, StrictStream
from tweo_timm.run.readers import reader_of, reads_folders
from tweo_timm.run.shards import check_shards
from tweo_timm.suggestion import suggest, suggest_path

_logger = logging.getLogger(__name__)

# Datasets of torchvision that timm opens as training or test images, nothing else.
_TRAIN_AND_TEST = ("cifar10", "cifar100", "mnist", "qmnist", "kmnist", "fashion_mnist")
_LENGTHS = "train.py: --train-num-samples and --val-num-samples; validate.py: --num-samples"
CROPS = ("center", "squash", "border")  # anything else is center to timm
RESAMPLINGS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


def open_dataset(
    options: Any,
    split: str,
    data_config: dict[str, Any],
    num_classes: int | None = None,
    exif: bool = False,
    **details: Any,
) -> StrictImages | StrictStream:
    """Open one split with timm's readers: a folder, a tar, torch/, hfds/, wds/ or tfds/.

    Args:
        options: where the data is, and how it is read.
        split: its name.
        data_config: timm's resolved preprocessing.
        num_classes: how many classes labels may speak of; None where they are not looked at.
        exif: whether images are turned upright as their cameras say.
        details: further arguments of timm's `create_dataset`.

    Raises:
        ValueError: if the data cannot be found; the message says where it was looked for. Or if images cannot be made
            as the options and `data_config` say.
    """
    require_known("--interpolation", data_config["interpolation"], RESAMPLINGS)
    require_known("--crop-mode", data_config["crop_mode"], CROPS)
    root = options.data or options.data_dir
    folder = _folder(options, root, split)
    class_map = read_class_map(options.class_map, root, split) if options.class_map else None
    if folder is not None and folder.is_dir():
        check_files(folder, options.input_key, class_map)
    mode = _image_mode(options.input_img_mode, data_config["input_size"][0])
    try:
        dataset = create_dataset(
            options.dataset,
            root=root,
            split=split,
            class_map=class_map or "",
            download=options.dataset_download,
            trust_remote_code=options.dataset_trust_remote_code,
            input_img_mode=mode,
            input_key=options.input_key,
            target_key=options.target_key,
            **details,
        )
    except ImportError as error:
        raise ValueError(
            f"--dataset {options.dataset} needs a package that is not here: {error}; pip install it"
        ) from error
    except (RuntimeError, TypeError, ValueError, AssertionError, OSError, LookupError) as error:
        hint = f" ({_LENGTHS})" if "num_samples" in str(error) else ""
        reason = f"its description (_info.json of wds/) lacks {error}" if isinstance(error, LookupError) else error
        raise ValueError(f"cannot open split {split!r} of {options.dataset or root}: {reason}{hint}") from error
    reading = Reading(mode, num_classes, exif)
    if isinstance(dataset, IterableImageDataset):
        if reader_of(options.dataset) == "wds":
            check_shards(dataset.reader, counted=not details.get("is_training", False))
        return StrictStream(dataset, reading, f"split {split!r} of {options.dataset}")
    images = StrictImages(dataset, reading)
    if class_map and folder is not None:
        _note_empty_classes(split, class_map, dataset.reader)
    return images


def _folder(options: Any, root: str | None, split: str) -> Path | None:
    """The folder or archive of a split, looked for as timm does; None for data that is no folder of images."""
    if not options.dataset and root is None:
        raise ValueError("no data: pass --data-dir FOLDER (with train/ and val/ inside), or --dataset TYPE/NAME")
    _check_torch_split(options.dataset, split)
    if not reads_folders(options.dataset):
        return None
    if root is None or not Path(root).exists():
        near = suggest_path(root) if root is not None else ""
        raise ValueError(f"--data-dir {root} does not exist: pass the folder that holds train/ and val/{near}")
    check_split(Path(root), split)
    found = split_folder(Path(root), split)
    if found is None:
        _logger.warning("--data-dir %s has no folder of split %r: the split is all that lies under it", root, split)
    return found or Path(root)


def _check_torch_split(dataset: str, split: str) -> None:
    """Refuse a split that timm would take for the test images of one of torchvision's datasets."""
    kind, _, name = dataset.lower().partition("/")
    known = ("train", "training", "val", "valid", "validation", "eval", "evaluation", "test")
    if kind == "torch" and name in _TRAIN_AND_TEST and split not in known:
        raise ValueError(f"--dataset {dataset} has no split {split!r}: use train or test{suggest(split, known)}")


def _note_empty_classes(split: str, class_map: dict[Any, int], reader: Any) -> None:
    targets = getattr(reader, "targets", None)  # of archives
    present = {int(target) for target in (targets if targets is not None else (one[1] for one in reader.samples))}
    empty = [str(name) for name, index in class_map.items() if index not in present]
    if empty:
        more = f" and {len(empty) - 3} more" * (len(empty) > 3)
        _logger.warning("split %s has no image of the classes %s of --class-map%s", split, ", ".join(empty[:3]), more)


def _image_mode(mode: str | None, channels: int) -> str:
    """PIL's mode for images of so many channels: the one that was asked for, if it has as many."""
    mode = mode or ("RGB" if channels == 3 else "L")
    bands = Image.getmodebands(mode)
    if bands != channels:
        raise ValueError(
            f"images of mode {mode} have {bands} channels and the model takes {channels}: give --in-chans {bands} with "
            "--mean and --std as long, or another --input-img-mode"
        )
    return mode


def require_known(flag: str, name: str, known: Sequence[str]) -> None:
    """Refuse what timm would find to be unknown when it is too late for a message, in an assertion or a worker."""
    if name not in known:
        raise ValueError(f"{flag} {name!r} is nothing that timm knows: use {', '.join(known)}{suggest(name, known)}")


def preprocessing(options: Any, model: nn.Module, **details: Any) -> dict[str, Any]:
    """Return timm's resolved preprocessing, for images of the channels and the size that the model takes.

    Args:
        options: as timm's `resolve_input_data_config` reads them; the model fills in what they leave open.
        model: a timm model.
        details: further arguments of `resolve_input_data_config`.

    Raises:
        ValueError: if the options ask for images that the model does not take.
    """
    try:
        return resolve_input_data_config(model, vars(options), **details)  # type: ignore[no-any-return]
    except ValueError as error:
        raise ValueError(f"{error} Leave out --img-size and --input-size, or choose another model") from error


def image_dtype(options: Any) -> torch.dtype:
    """Return the dtype in which timm's prefetching loader normalizes images: the model's, by `model_dtype`."""
    dtype: torch.dtype = getattr(torch, options.model_dtype or "float32")
    return dtype


def place(images: torch.Tensor, options: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Bring a batch of images to the device, the memory layout, and a dtype: None is that of the model."""
    images = images.to(device)
    if options.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images.to(dtype or image_dtype(options))


def target_details(options: Any, num_classes: int) -> dict[str, Any]:
    """Return the arguments of `open_dataset` that make the targets of --task multilabel; empty for one label an image.

    Args:
        options: `task`, `target_format`, `dataset`.
        num_classes: of the model.
    """
    if options.task != "multilabel":
        return {}
    # A folder's single label is a list of one; the readers of streams know the format themselves.
    transform = {"target_transform": _MultiLabel(num_classes, options.target_format)}
    return transform | ({"target_format": options.target_format} if options.target_format else {})


class _MultiLabel:
    """timm's multi-label target; a single class index counts as a list of one."""

    def __init__(self, num_classes: int, target_format: str | None) -> None:
        self._encode = MultiLabelTarget(num_classes, dense=target_format == "multihot")

    def __call__(self, target: Any) -> torch.Tensor:
        encoded: torch.Tensor = self._encode([target] if isinstance(target, int) else target)
        return encoded
