"""The settings of one validation: every flag of timm's validate.py under timm's names, and this package's own.

One difference: ``--checkpoint`` takes several, which are validated under identical conditions and compared. Settings
that cannot be honoured are refused with a reason, never ignored.

Source: timm's validation script, 1.0.29 to 1.0.31. Imports neither torch nor timm, so that ``-h`` is quick.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tweo_timm.run import options as shared
from tweo_timm.run.flags import CommandLine, as_namespace, freeze, option_table
from tweo_timm.run.readers import dataset_rules
from tweo_timm.run.recipe import naming, resolve
from tweo_timm.run.rules import (
    image_mode,
    image_shape,
    option_name,
    out_of_bounds,
    pooling,
    regular_expressions,
    scripting,
    target_format,
)
from tweo_timm.settings import ABOVE_0, ANY, AT_LEAST_0, AT_LEAST_1, Bounds, Decides, flag

__all__ = ["ValidateOptions", "as_namespace", "parse_validate_options"]

_OF_A_CHECKPOINT = (
    *("model", "pretrained", "checkpoint", "use_ema", "test_pool", "reparam", "gp", "in_chans", "model_kwargs"),
    *("pretrained_cfg_overlay", "clipped_softmax", "bn_eps", "use_train_size", "tf_preprocessing", "tweo_blocks"),
    *("quantize", "export", "stethoscope", "colinearity", "fp8_readiness", "amp", "model_dtype", "channels_last"),
    *("fast_norm", "torchcompile"),
)
"""What builds, changes or looks into a model, which an ONNX file does not allow."""

_DESCRIPTION = (
    "Validate timm models: accuracy, activation outliers, quantization. "
    "Every flag of timm's validate.py means the same here."
)


@dataclass(frozen=True)
class DatasetOptions(shared.DatasetOptions):
    """Dataset."""

    DECIDES = Decides.DATA

    split: str = flag("validation", "Split to validate on.")
    num_samples: int | None = flag(
        None, "Number of samples, for iterable datasets that do not know.", bounds=AT_LEAST_1
    )
    real_labels: str = flag("", "JSON file of ImageNet ReaL labels.", metavar="FILE", decides=Decides.LABELS)
    valid_labels: str = flag(
        "", "Text file: line i is the model's class of the data's class i.", metavar="FILE", decides=Decides.LABELS
    )


@dataclass(frozen=True)
class ModelOptions(shared.ModelOptions):
    """Model."""

    DECIDES = Decides.MODEL

    model: str = flag(
        "dpn92", "Architecture, as timm names it; a checkpoint's own if it says.", "--model", "-m", metavar="NAME"
    )
    pretrained: bool = flag(False, "timm's pretrained weights; implied without --checkpoint.", decides=Decides.TRAINING)
    checkpoint: list[str] = flag(
        [], "Checkpoints to validate and compare; a folder stands for all in it.", metavar="FILE"
    )
    side_backbone: str = flag(
        "", "Weights of the frozen backbone, for checkpoints of side networks.", metavar="FILE|pretrained"
    )
    onnx: list[str] = flag(
        [], "ONNX files to score and compare, by what they say of themselves; they run on the CPU.", metavar="FILE"
    )
    use_ema: bool = flag(False, "The moving average of the weights, where the checkpoint holds one.")
    test_pool: bool = flag(False, "Test-time pooling, for models that support it.")
    reparam: bool = flag(False, "Merge the training branches of models that have them.")


@dataclass(frozen=True)
class InputOptions(shared.ImageOptions):
    """Images."""

    DECIDES = Decides.INPUT

    use_train_size: bool = flag(False, "The training size even where the architecture has another for testing.")
    crop_mode: str | None = flag(None, "Crop: center, squash or border; unset: the architecture's.")
    crop_border_pixels: int | None = flag(None, "Pixels cut from each border.", bounds=AT_LEAST_0)
    tf_preprocessing: bool = flag(False, "Preprocess with TensorFlow, which must be installed.")


@dataclass(frozen=True)
class DeviceOptions(shared.PrecisionOptions):
    """Device and precision."""

    DECIDES = Decides.TRAINING

    num_gpu: int = flag(1, "Refused above 1: threads of DataParallel would mix up the statistics.", bounds=ANY)
    aot_autograd: bool = flag(False, "Refused: use --torchcompile aot_eager.")
    batch_size: int = flag(256, "Batch size.", "-b", "--batch-size", bounds=AT_LEAST_1, decides=Decides.DATA)
    workers: int = flag(4, "Loader processes.", "-j", "--workers", bounds=Bounds(0, 1024))
    retry: bool = flag(False, "After running out of memory try again with a smaller batch.")
    seed: int = flag(42, "Random seed, of calibration and random inputs too.", bounds=Bounds(0, 2**32 - 1))
    naflex_loader: bool = flag(False, "Refused: statistics would count the padding tokens of its batches.")
    naflex_max_seq_len: int = flag(576, "Sequence length of --naflex-loader.", bounds=AT_LEAST_1)


@dataclass(frozen=True)
class OutputOptions:
    """Results."""

    DECIDES = Decides.RECORDS

    log_freq: int = flag(10, "Batches between log lines.", bounds=AT_LEAST_1)
    results_file: str = flag("", "File for the results of all models.", metavar="FILE")
    results_format: str = flag("csv", "Its format.", choices=("csv", "json"))
    metrics_avg: str | None = flag(
        None, "Also precision, recall and F1, averaged this way.", choices=("micro", "macro", "weighted")
    )
    report: str | None = flag(None, "Folder for report.json, report.md, report.csv and plots.", metavar="DIR")
    compare_reports: list[str] = flag([], "Compare these report.json files; nothing is validated.", metavar="FILE")
    group: list[str] = flag(
        [], "Runs that differ by their seed alone, as one: mean, range, intervals between runs.", metavar="NAME=RUN,..."
    )
    export: str | None = flag(None, "Export the model, quantized if --quantize is given.", choices=("onnx",))
    export_input: str = flag(
        "float32",
        "What exported files take: normalized images, or pixels (batch, H, W, C), normalized in the graph.",
        choices=("float32", "uint8"),
    )
    export_dtype: str = flag(
        "float32", "Precision of what stays float in exported files, scales included.", choices=("float32", "float16")
    )


@dataclass(frozen=True)
class MeasurementOptions:
    """Outliers, quantization, diagnosis."""

    DECIDES = Decides.RECORDS

    sites: str = flag(
        "blocks", "Where outliers are measured: block outputs, or every layer.", choices=("blocks", "all")
    )
    tweo_blocks: str | None = flag(
        None, "Names the transformer blocks where they are not found.", metavar="REGEX", decides=Decides.MODEL
    )
    quantize: list[str] = flag(
        [], "Top-1 after static quantization, e.g. w8a8-tt, w7a8-tt, w6a6-tt, w8a8-tt+res.", metavar="SCHEME"
    )
    calibration_images: int = flag(512, "Images that fix the quantization's scales.", bounds=AT_LEAST_1)
    calibration_split: str = flag("train", "Split that they come from.")
    calibration: str = flag(
        "absmax",
        "What fixes them: absmax, or for comparison percentile:99.99, above which inputs of layers are cut off.",
    )
    stethoscope: bool = flag(False, "Are outliers in the data or in the weights? Random inputs and random weights.")
    colinearity: bool = flag(False, "Which singular direction of an MLP makes its largest activation.")
    colinearity_block: str | None = flag(None, "Block to examine; unset: the one with the peak.", metavar="NAME")
    colinearity_channel: int | None = flag(None, "Channel to examine; unset: that of the peak.", bounds=AT_LEAST_0)
    survey: bool = flag(False, "What the model survives: float16, FP8, INT8; where it breaks, and the smallest fix.")
    max_drop: float = flag(1.0, "Points of Top-1 that a format may lose in --survey.", bounds=Bounds(0, 100))
    survey_sizes: list[int] = flag(
        [], "Image sizes at which --survey reads float16 too.", bounds=Bounds(1, 8192), metavar="PIXELS"
    )
    fp8_readiness: bool = flag(False, "What per-tensor FP8 would do to each tensor.")
    zero_outliers: list[float] = flag(
        [],
        "Top-1 without the K largest elements of each block's output; below 1 a share of them, 0.001 say.",
        bounds=ABOVE_0,
        metavar="K",
    )


@dataclass(frozen=True)
class ValidateOptions(
    shared.ConfigOptions,
    MeasurementOptions,
    OutputOptions,
    DatasetOptions,
    shared.TargetOptions,
    ModelOptions,
    shared.NormOptions,
    InputOptions,
    DeviceOptions,
):
    """The settings of one validation, one field per flag.

    Attributes:
        given: names of the settings that command line or recipe gave, defaults too: no checkpoint changes them.

    Raises:
        ValueError: a setting is out of range, contradicts another, or cannot be honoured.
    """

    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def __post_init__(self) -> None:
        # `data` is the old positional form of data_dir: one field below this line.
        if self.data:
            object.__setattr__(self, "data_dir", self.data_dir or self.data)
        object.__setattr__(self, "data", None)
        if self.onnx and "device" not in self.given:
            object.__setattr__(self, "device", "cpu")
        for name in ("model_kwargs", "pretrained_cfg_overlay"):
            object.__setattr__(self, name, freeze(getattr(self, name)))
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
    given = CommandLine(ValidateOptions, prog, _DESCRIPTION).parse(argv)
    values, recipe = resolve(ValidateOptions, given)
    with naming(recipe, given):
        return ValidateOptions(**values, given=frozenset(values))


def _complaints(options: ValidateOptions) -> Iterator[str]:
    yield from out_of_bounds(options)
    yield from image_shape(options)
    yield from image_mode(options)
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
    yield from dataset_rules(options, ("split", "calibration_split"), ("num_samples",))
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
    for dest, default in (("max_drop", 1.0), ("survey_sizes", [])):
        if getattr(options, dest) != default and not options.survey:
            yield f"{option_name(dest)} does nothing without --survey; add it"
    if options.survey and options.task == "multilabel":
        yield "--survey counts one label an image; leave it out with --task multilabel"
    yield from _of_onnx_files(options)
    if options.calibration != "absmax" and not options.quantize:
        yield f"--calibration {options.calibration} does nothing without --quantize; add it"
    if options.calibration != "absmax" and options.survey:
        yield (
            f"--calibration {options.calibration}: a survey calibrates by absmax, since a percentile is of w8a8-tt "
            "alone among its formats; leave one of the two out"
        )
    for k in options.zero_outliers:
        if k >= 1 and k != int(k):
            yield f"--zero-outliers {k:g} is no number of elements; give a whole one, or a share of them below 1"
    for dest in ("colinearity_block", "colinearity_channel"):
        if getattr(options, dest) is not None and not options.colinearity:
            yield f"{option_name(dest)} does nothing without --colinearity; add it"


def _of_onnx_files(options: ValidateOptions) -> Iterator[str]:
    """What --onnx and --export do not allow of each other and of the rest."""
    default = {name: option.default for name, option in option_table(ValidateOptions).items()}
    for dest in ("export_input", "export_dtype"):
        if getattr(options, dest) != "float32" and not options.export:
            yield f"{option_name(dest)} {getattr(options, dest)} does nothing without --export onnx; add it"
    if options.export and options.tf_preprocessing:
        yield "--export: a file cannot say that TensorFlow prepares its images; leave out --tf-preprocessing"
    if not options.onnx:
        return
    for dest in _OF_A_CHECKPOINT:
        if getattr(options, dest) != default[dest]:
            yield f"--onnx scores files as they are; leave out {option_name(dest)}"
    if options.sites != "blocks":
        yield f"--onnx: a file shows its logits alone; leave out --sites {options.sites}"
    if options.device.split(":")[0] != "cpu":
        yield f"--device {options.device}: --onnx runs files in onnxruntime's CPU provider; leave out --device"
