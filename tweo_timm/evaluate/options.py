# ruff: noqa: RUF009 - flag() returns a dataclass field, with a factory where the default is mutable
"""The settings of one validation: every flag of timm's validate.py under timm's names, and this package's own.

One difference: ``--checkpoint`` takes several, which are validated under identical conditions and compared. Settings
that cannot be honoured are refused with a reason, never ignored.

Source: timm's validation script, 1.0.29 to 1.0.31. Imports neither torch nor timm, so that ``-h`` is quick.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tweo_timm.run.flags import CommandLine, as_namespace, freeze
from tweo_timm.run.options import ConfigOptions
from tweo_timm.run.recipe import resolve
from tweo_timm.run.rules import (
    image_shape,
    option_name,
    out_of_bounds,
    pooling,
    regular_expressions,
    scripting,
    target_format,
)
from tweo_timm.settings import ABOVE_0, ANY, AT_LEAST_0, AT_LEAST_1, Bounds, flag

__all__ = ["ValidateOptions", "as_namespace", "parse_validate_options"]

_DESCRIPTION = (
    "Validate timm models: accuracy, activation outliers, quantization. "
    "Every flag of timm's validate.py means the same here."
)


@dataclass(frozen=True)
class DatasetOptions:
    """Dataset."""

    data: str | None = flag(
        None, "Dataset folder; the old positional form of --data-dir.", "data", nargs="?", metavar="DIR"
    )
    data_dir: str | None = flag(None, "Dataset root folder.", metavar="DIR")
    dataset: str = flag(
        "", "Dataset as TYPE/NAME, e.g. wds/imagenet, hfds/NAME, torch/NAME; empty: image folder or tar."
    )
    split: str = flag("validation", "Split to validate on.")
    num_samples: int | None = flag(
        None, "Number of samples, for iterable datasets that do not know.", bounds=AT_LEAST_1
    )
    dataset_download: bool = flag(False, "Let torch/ and tfds/ datasets download themselves.")
    class_map: str = flag("", "Text file that maps class names to indices.", metavar="FILE")
    input_key: str | None = flag(None, "Dataset field that holds the image.")
    input_img_mode: str | None = flag(None, "PIL mode that images are converted to, e.g. RGB or L.")
    target_key: str | None = flag(None, "Dataset field that holds the label; for multi-label also a,b,c or a/b.")
    dataset_trust_remote_code: bool = flag(False, "Let a Hugging Face dataset run code of its own repository.")
    task: str = flag("classification", "What the labels are.", choices=("classification", "multilabel"))
    target_format: str | None = flag(
        None, "How a multi-label target is stored: class indices or a 0/1 vector.", choices=("indices", "multihot")
    )
    multilabel_threshold: float = flag(
        0.5, "Probability above which a label counts as predicted (F1).", bounds=Bounds(0, 1, open="both")
    )
    real_labels: str = flag("", "JSON file of ImageNet ReaL labels.", metavar="FILE")
    valid_labels: str = flag("", "Text file: line i is the model's class of the data's class i.", metavar="FILE")


@dataclass(frozen=True)
class ModelOptions:
    """Model and checkpoints."""

    model: str = flag(
        "dpn92", "Architecture, as timm names it; a checkpoint's own if it says.", "--model", "-m", metavar="NAME"
    )
    pretrained: bool = flag(False, "timm's pretrained weights; implied without --checkpoint.")
    checkpoint: list[str] = flag(
        [], "Checkpoints to validate and compare; a folder stands for all in it.", metavar="FILE"
    )
    use_ema: bool = flag(False, "The moving average of the weights, where the checkpoint holds one.")
    num_classes: int | None = flag(None, "Number of classes; unset: the architecture's.", bounds=AT_LEAST_1)
    gp: str | None = flag(None, "Global pooling: avg, max, avgmax, token, map; unset: the architecture's.")
    in_chans: int | None = flag(None, "Number of image channels.", bounds=AT_LEAST_1)
    model_kwargs: dict[str, Any] = flag({}, "Further arguments of the architecture.")
    test_pool: bool = flag(False, "Test-time pooling, for models that support it.")
    reparam: bool = flag(False, "Merge the training branches of models that have them.")


@dataclass(frozen=True)
class InputOptions:
    """Images."""

    img_size: int | None = flag(None, "Image size; unset: the architecture's.", bounds=AT_LEAST_1)
    input_size: list[int] | None = flag(None, "Channels, height and width.", nargs=3, bounds=AT_LEAST_1)
    use_train_size: bool = flag(False, "The training size even where the architecture has another for testing.")
    crop_pct: float | None = flag(
        None, "Center crop, as a fraction of the resized image.", bounds=Bounds(0, 1, open="low")
    )
    crop_mode: str | None = flag(None, "Crop: center, squash or border; unset: the architecture's.")
    crop_border_pixels: int | None = flag(None, "Pixels cut from each border.", bounds=AT_LEAST_0)
    mean: list[float] | None = flag(None, "Pixel mean per channel; unset: the architecture's.", bounds=ANY)
    std: list[float] | None = flag(
        None, "Pixel standard deviation per channel; unset: the architecture's.", bounds=ABOVE_0
    )
    interpolation: str = flag("", "Resize interpolation; empty: the architecture's.")
    tf_preprocessing: bool = flag(False, "Preprocess with TensorFlow, which must be installed.")


@dataclass(frozen=True)
class DeviceOptions:
    """Device, precision and loading."""

    device: str = flag("cuda", "Device: cuda, cpu, mps, cuda:1.")
    num_gpu: int = flag(1, "Refused above 1: threads of DataParallel would mix up the statistics.", bounds=ANY)
    amp: bool = flag(False, "Mixed precision through autocast.")
    amp_dtype: str = flag("float16", "Low precision of --amp.", choices=("float16", "bfloat16"))
    model_dtype: str | None = flag(
        None, "Dtype of the whole model, without autocast.", choices=("float32", "float16", "bfloat16")
    )
    channels_last: bool = flag(False, "Use the channels-last memory layout.")
    fast_norm: bool = flag(False, "Normalize in low precision under autocast.")
    torchcompile: str | None = flag(None, "Compile with this backend (bare: inductor).", nargs="?", const="inductor")
    torchcompile_mode: str | None = flag(None, "Mode of torch.compile, e.g. max-autotune.")
    torchscript: bool = flag(
        False, "Refused: a scripted model does not run the hooks that measure; use --torchcompile."
    )
    aot_autograd: bool = flag(False, "Refused: use --torchcompile aot_eager.")
    fuser: str = flag("", "TorchScript fuser; only empty is accepted, see --torchscript.")
    batch_size: int = flag(256, "Batch size.", "-b", "--batch-size", bounds=AT_LEAST_1)
    workers: int = flag(4, "Loader processes.", "-j", "--workers", bounds=Bounds(0, 1024))
    pin_mem: bool = flag(False, "Pin the loader's memory.")
    no_prefetcher: bool = flag(False, "No prefetching to the device.")
    retry: bool = flag(False, "After running out of memory try again with a smaller batch.")
    seed: int = flag(42, "Random seed, of calibration and random inputs too.", bounds=Bounds(0, 2**32 - 1))
    naflex_loader: bool = flag(False, "Refused: statistics would count the padding tokens of its batches.")
    naflex_max_seq_len: int = flag(576, "Sequence length of --naflex-loader.", bounds=AT_LEAST_1)


@dataclass(frozen=True)
class OutputOptions:
    """Results."""

    log_freq: int = flag(10, "Batches between log lines.", bounds=AT_LEAST_1)
    results_file: str = flag("", "File for the results of all models.", metavar="FILE")
    results_format: str = flag("csv", "Its format.", choices=("csv", "json"))
    metrics_avg: str | None = flag(
        None, "Also precision, recall and F1, averaged this way.", choices=("micro", "macro", "weighted")
    )
    report: str | None = flag(None, "Folder for report.json, report.md, report.csv and plots.", metavar="DIR")
    compare_reports: list[str] = flag([], "Compare these report.json files; nothing is validated.", metavar="FILE")
    export: str | None = flag(None, "Export the model, quantized if --quantize is given.", choices=("onnx",))


@dataclass(frozen=True)
class MeasurementOptions:
    """Outliers, quantization, diagnosis."""

    sites: str = flag(
        "blocks", "Where outliers are measured: block outputs, or every layer.", choices=("blocks", "all")
    )
    tweo_blocks: str | None = flag(None, "Names the transformer blocks where they are not found.", metavar="REGEX")
    quantize: list[str] = flag(
        [], "Top-1 after static quantization, e.g. w8a8-tt, w6a6-tt, w8a8-tt+res.", metavar="SCHEME"
    )
    calibration_images: int = flag(512, "Images that fix the quantization's scales.", bounds=AT_LEAST_1)
    calibration_split: str = flag("train", "Split that they come from.")
    stethoscope: bool = flag(False, "Are outliers in the data or in the weights? Random inputs and random weights.")
    colinearity: bool = flag(False, "Which singular direction of an MLP makes its largest activation.")
    colinearity_block: str | None = flag(None, "Block to examine; unset: the one with the peak.", metavar="NAME")
    colinearity_channel: int | None = flag(None, "Channel to examine; unset: that of the peak.", bounds=AT_LEAST_0)
    fp8_readiness: bool = flag(False, "What per-tensor FP8 would do to each tensor.")


@dataclass(frozen=True)
class ValidateOptions(
    ConfigOptions, MeasurementOptions, OutputOptions, DatasetOptions, ModelOptions, InputOptions, DeviceOptions
):
    """The settings of one validation, one field per flag.

    Raises:
        ValueError: a setting is out of range, contradicts another, or cannot be honoured.
    """

    def __post_init__(self) -> None:
        # `data` is the old positional form of data_dir: one field below this line.
        if self.data:
            object.__setattr__(self, "data_dir", self.data_dir or self.data)
        object.__setattr__(self, "data", None)
        object.__setattr__(self, "model_kwargs", freeze(self.model_kwargs))
        for complaint in _complaints(self):
            raise ValueError(complaint)


def parse_validate_options(argv: Sequence[str] | None = None, prog: str = "validate.py") -> ValidateOptions:
    """Read the command line, and the YAML file it names, into settings.

    Args:
        argv: The words after the program's name; None: those of this process.
        prog: The program's name in messages.

    Raises:
        SystemExit: for ``-h`` (status 0), or a word argparse does not accept (status 2), with a message.
        ValueError: the YAML file or the combination of settings is wrong; the message names key, value and remedy.
    """
    values, _ = resolve(ValidateOptions, CommandLine(ValidateOptions, prog, _DESCRIPTION).parse(argv))
    return ValidateOptions(**values)


def _complaints(options: ValidateOptions) -> Iterator[str]:
    yield from out_of_bounds(options)
    yield from image_shape(options)
    yield from scripting(options)
    yield from pooling(options)
    yield from regular_expressions("tweo_blocks", options.tweo_blocks)
    if options.num_gpu != 1:
        yield (
            f"--num-gpu {options.num_gpu} cannot be honoured: DataParallel runs copies of a block in threads, which "
            "would mix up its statistics; use --num-gpu 1"
        )
    if options.aot_autograd:
        yield "--aot-autograd cannot be honoured: torch.compile has replaced it; use --torchcompile aot_eager"
    if options.naflex_loader:
        yield (
            "--naflex-loader cannot be honoured: statistics would count the padding tokens of its batches; "
            "leave it out, NaFlex models take ordinary batches too (from a file: --no-naflex-loader)"
        )
    if options.amp and options.model_dtype not in (None, "float32"):
        yield f"--amp needs a float32 model, not --model-dtype {options.model_dtype}; give --no-amp or leave it out"
    yield from target_format(options)
    for dest in ("real_labels", "valid_labels", "metrics_avg", "export"):
        if options.task == "multilabel" and getattr(options, dest):
            yield f"{option_name(dest)} is about one label an image; leave it out with --task multilabel"
    if options.multilabel_threshold != 0.5 and options.task != "multilabel":
        yield "--multilabel-threshold does nothing without --task multilabel; give both or neither"
    if options.real_labels and options.valid_labels:
        yield "--real-labels are of all classes of ImageNet; leave out --valid-labels"
    for dest in ("real_labels", "valid_labels"):
        if options.export and getattr(options, dest):
            yield f"--export counts by the data's own labels; leave out {option_name(dest)}"
    for dest in ("colinearity_block", "colinearity_channel"):
        if getattr(options, dest) is not None and not options.colinearity:
            yield f"{option_name(dest)} does nothing without --colinearity; add it"
