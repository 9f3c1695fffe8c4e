"""Which of timm's readers a command reads with, and what that reader can honour: said before anything is opened.

timm takes every `--dataset` that names none of its readers for an image folder, and looks at some settings with some
readers only. What it would pass over without a word is refused here.

Source: timm.data.create_dataset and create_reader, 1.0.31.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tweo_timm.run.rules import option_name
from tweo_timm.suggestion import suggest

READERS = ("torch", "hfds", "hfids", "tfds", "wds")
_STREAMS = ("hfids", "tfds", "wds")
_REPEATING = ("hfids", "tfds")  # wds/ takes the number of repetitions and does not look at it
_CUTTING = ("hfds", "tfds")  # read 'train[:75%]' as a part of a split
_FOLDERS = ("torch/image_folder", "torch/folder")


def reader_of(dataset: str) -> str:
    """Return the reader of a --dataset, such as 'wds'; empty for a folder of images or a tar archive."""
    return dataset.partition("/")[0].lower()


def reads_folders(dataset: str) -> bool:
    """Whether classes are folders: timm's own reader or torchvision's."""
    return not dataset or dataset.lower() in _FOLDERS


def dataset_rules(options: Any, splits: tuple[str, ...], lengths: tuple[str, ...]) -> Iterator[str]:
    """Yield a complaint for each setting of the data that timm would pass over.

    Args:
        options: with `dataset`, `class_map`, and those that the others name.
        splits: the settings that name a split.
        lengths: the settings that say how long a stream is.
    """
    reader = reader_of(options.dataset)
    if options.dataset and (reader not in READERS or "/" not in options.dataset):
        near = suggest(reader, READERS)
        yield (
            f"--dataset {options.dataset} names no reader of timm, which would take --data-dir for an image folder; "
            f"use {', '.join(f'{name}/NAME' for name in READERS)}, or leave it out for a folder or tar{near}"
        )
    what = f"{reader}/" if reader else "a folder or tar of images"
    for dest in splits:
        if "[" in (getattr(options, dest) or "") and reader not in _CUTTING:
            name, _, part = getattr(options, dest).partition("[")
            yield (
                f"{option_name(dest)} {getattr(options, dest)}: {what} is read whole, so that [{part} would be passed "
                f"over; give {name}, and keep the part in a folder or shards of its own (hfds/ and tfds/ read parts)"
            )
    for dest in lengths:
        if getattr(options, dest) is not None and reader not in _STREAMS:
            yield f"{option_name(dest)} is the length of a stream (wds/, tfds/, hfids/); {what} knows its own"
    if options.class_map and reader == "torch":
        yield f"--class-map {options.class_map} is not read by torch/; leave it out, or --dataset for an image folder"


def repetition_rules(options: Any) -> Iterator[str]:
    """Yield a complaint for --epoch-repeats where the reader does not repeat."""
    if options.epoch_repeats and reader_of(options.dataset) not in _REPEATING:
        yield (
            f"--epoch-repeats {options.epoch_repeats:g} repeats the streams of tfds/ and hfids/ and no others: leave "
            "it out, or give more --epochs"
        )
