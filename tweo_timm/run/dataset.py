"""A split of a dataset, by timm's readers, for training and validation alike: found, opened, sized and labelled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import MultiLabelTarget, create_dataset, resolve_input_data_config
from torch import nn
from torch.utils.data import Dataset

from tweo_timm.run.failure import Failure
from tweo_timm.suggestion import suggest, suggest_path

# Folders that timm takes for one another when a split is asked for.
_SPLIT_FOLDERS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))
_LENGTHS = "train.py: --train-num-samples and --val-num-samples; validate.py: --num-samples"
CROPS = ("center", "squash", "border")  # anything else is center to timm
RESAMPLINGS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


class UnreadableImage(Failure):
    """An image file of the dataset cannot be decoded; the message names it."""

    def __init__(self, message: str) -> None:
        # A loader's process sends its whole traceback, which ends in the message.
        super().__init__(message.strip().splitlines()[-1].split("UnreadableImage: ")[-1])


class StrictImages(Dataset[Any]):
    """A map-style image dataset in which an unreadable image is an error, not a neighbour's image.

    timm's ImageDataset replaces a file that it cannot decode by the next one, with a log line in a worker process.
    """

    def __init__(self, dataset: Any) -> None:
        dataset._max_retries = 1
        self.inner = dataset

    @property
    def transform(self) -> Any:
        """The transform of the dataset inside, which timm's create_loader sets."""
        return self.inner.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.inner.transform = transform

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.inner[index]
        except RuntimeError as error:
            if "Failed to load" not in str(error):  # timm's words; anything else is not the file's fault
                raise
            raise UnreadableImage(
                f"cannot read image {self.inner.filename(index, absolute=True)}: the file is damaged or no image. "
                "Replace or remove it"
            ) from error


def open_dataset(options: Any, split: str, data_config: dict[str, Any], **details: Any) -> Any:
    """Open one split with timm's readers: a folder, a tar, torch/, hfds/, wds/ or tfds/.

    Raises:
        ValueError: if the data cannot be found; the message says where it was looked for. Or if images cannot be made
            as the options and `data_config` say.
    """
    require_known("--interpolation", data_config["interpolation"], RESAMPLINGS)
    require_known("--crop-mode", data_config["crop_mode"], CROPS)
    root = options.data or options.data_dir
    if not options.dataset and root is None:
        raise ValueError("no data: pass --data-dir FOLDER (with train/ and val/ inside), or --dataset TYPE/NAME")
    if not options.dataset and not Path(root).exists():
        near = suggest_path(root)
        raise ValueError(f"--data-dir {root} does not exist: pass the folder that holds train/ and val/{near}")
    if not options.dataset:
        _check_split(Path(root), split)
    mode = _image_mode(options.input_img_mode, data_config["input_size"][0])
    try:
        dataset = create_dataset(
            options.dataset,
            root=root,
            split=split,
            class_map=options.class_map,
            download=options.dataset_download,
            trust_remote_code=options.dataset_trust_remote_code,
            input_img_mode=mode,
            input_key=options.input_key,
            target_key=options.target_key,
            **details,
        )
    except (RuntimeError, TypeError, ValueError, AssertionError, FileNotFoundError) as error:
        hint = f" ({_LENGTHS})" if "num_samples" in str(error) else ""
        raise ValueError(f"cannot open split {split!r} of {options.dataset or root}: {error}{hint}") from error
    return StrictImages(dataset) if hasattr(dataset, "_max_retries") else dataset


def split_folder(root: Path, split: str) -> Path | None:
    """Return the folder of a split under `root`, as timm finds it; None where timm would read all of `root` instead."""
    name = split.split("[")[0]
    names = next((names for names in _SPLIT_FOLDERS if name in names), ())
    return next((root / one for one in (name, *names) if (root / one).exists()), None)


def _check_split(root: Path, split: str) -> None:
    """Refuse a split that is not there, for which timm would read every image of every split under `root`."""
    if split_folder(root, split) is not None:
        return
    splits = [name for names in _SPLIT_FOLDERS for name in names if (root / name).is_dir()]
    if splits:
        raise ValueError(f"{root} holds no split {split!r}, but {', '.join(splits)}{suggest(split, splits)}")


def _image_mode(mode: str | None, channels: int) -> str:
    """PIL's mode for images of so many channels: the one that was asked for, if it has as many."""
    mode = mode or ("RGB" if channels == 3 else "L")
    try:
        bands = Image.getmodebands(mode)
    except KeyError as error:
        raise ValueError(f"--input-img-mode {mode} is no mode of PIL: use RGB, L or RGBA, say") from error
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


def class_names(dataset: Any) -> dict[str, int] | None:
    """Return the name -> index mapping of a folder dataset, None for others."""
    reader = getattr(getattr(dataset, "inner", dataset), "reader", None)
    mapping = getattr(reader, "class_to_idx", None)
    return dict(mapping) if mapping else None


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
    if mapped and max(names.values()) < num_classes:
        return
    if mapped or len(names) != num_classes:
        if chosen:
            raise ValueError(
                f"the data has {len(names)} classes and --valid-labels lists {num_classes}: list each once"
            )
        what = f"up to index {max(names.values())}" if mapped else f"{len(names)}"
        raise ValueError(
            f"the data has {what} classes ({', '.join(list(names)[:3])}, ...) and the model {num_classes}: "
            f"pass --num-classes {max(names.values()) + 1}, or --class-map FILE for a subset (validate.py: or "
            "--valid-labels FILE, which says which of the model's classes those of the data are)"
        )


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
