"""The settings of one repair. Imports neither torch nor timm, so that ``-h`` is quick."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tweo_timm.rewrite.methods import METHOD_NAMES, METHODS
from tweo_timm.run import options as shared
from tweo_timm.run.flags import freeze
from tweo_timm.run.recipe import read_settings
from tweo_timm.run.rules import out_of_bounds
from tweo_timm.settings import AT_LEAST_0, AT_LEAST_1, flag

_DESCRIPTION = (
    "Take the outliers out of a trained checkpoint by an exact rotation of its residual stream: no training, the same "
    "architecture, the same outputs. Works without data; --method learned needs some images."
)


@dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoint and model."""

    model: str = flag("", "Architecture, as timm names it; a checkpoint's own if it says.", metavar="NAME")
    checkpoint: str = flag("", "The trained weights: any checkpoint that timm loads, ours or not.", metavar="FILE")
    output: str = flag("", "Where the repaired weights go, as .safetensors.", metavar="FILE")
    model_kwargs: dict[str, Any] = flag({}, "Further arguments of the architecture.")
    num_classes: int | None = flag(
        None, "Number of classes; unset: as many as the weights have.", bounds=AT_LEAST_0, metavar="N"
    )
    img_size: int | None = flag(None, "Image size; unset: the training's or the architecture's.", bounds=AT_LEAST_1)
    in_chans: int | None = flag(None, "Number of image channels.", bounds=AT_LEAST_1)
    gp: str | None = flag(None, "Global pooling; unset: the training's or the architecture's.")
    dtype: str | None = flag(
        None, "Dtype of the output; unset: that of the weights.", choices=("float32", "bfloat16", "float16", "float64")
    )


@dataclass(frozen=True)
class RotationOptions:
    """Rotation."""

    method: str = flag(
        "random", "How the rotation is found; learned needs --data-dir or --dataset.", choices=METHOD_NAMES
    )
    seed: int = flag(0, "Seed of the random matrix, and of the choice of images.", bounds=AT_LEAST_0)
    as_head: bool = flag(False, "Give a model without a head one that returns its features, which then stay.")
    allow_rotated_features: bool = flag(
        False, "Rotate the features of a model without a head, and write what takes them back."
    )


@dataclass(frozen=True)
class ImageOptions:
    """Images, to learn from and to compare outputs on; without them a few are generated."""

    data_dir: str | None = flag(None, "Dataset root folder.", metavar="DIR")
    dataset: str = flag("", "Dataset as TYPE/NAME; empty: image folder or tar.")
    split: str = flag("train", "Split that images are taken from.")
    images: int = flag(64, "How many.", bounds=AT_LEAST_1)
    batch_size: int = flag(16, "Images in a batch.", "-b", "--batch-size", bounds=AT_LEAST_1)
    device: str = flag("cpu", "Device that the model runs on: cpu, cuda, mps.")


@dataclass(frozen=True)
class RepairOptions(shared.FileOptions, CheckpointOptions, RotationOptions, ImageOptions):
    """The settings of one repair, one field per flag.

    Raises:
        ValueError: a setting is missing, out of range, or contradicts another.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_kwargs", freeze(self.model_kwargs))
        for complaint in _complaints(self):
            raise ValueError(complaint)


def parse_repair_options(argv: Sequence[str] | None = None, prog: str = "tweo-repair") -> RepairOptions:
    """Read the command line, and the YAML file it names, into settings.

    Raises:
        SystemExit: for ``-h`` (status 0), or a word argparse does not accept (status 2), with a message.
        ValueError: the YAML file or the combination of settings is wrong; the message names flag, value and remedy.
    """
    return read_settings(RepairOptions, prog, _DESCRIPTION, argv)


def _complaints(options: RepairOptions) -> Iterator[str]:
    yield from out_of_bounds(options)
    if not options.checkpoint:
        yield "--checkpoint is missing: pass the file of the trained weights"
    if not options.output.endswith(".safetensors"):
        yield f"--output {options.output or 'is missing'}: pass a file name that ends in .safetensors"
    if METHODS[options.method].learns and not (options.data_dir or options.dataset):
        yield f"--method {options.method} has nothing to learn from: pass --data-dir FOLDER, or --method random"
    if options.as_head and options.allow_rotated_features:
        yield "--as-head keeps the features and --allow-rotated-features gives them up: choose one"
