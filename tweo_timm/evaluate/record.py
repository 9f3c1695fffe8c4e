"""The record of a validation: what is measured, written to report.json, shown, read back and documented.

One line per field, and no other list of them: docs/report.md is held against these by a test. What a probe finds is
declared beside the probe, in answers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tweo_timm.records import Fields
from tweo_timm.schema import LONG, PERCENT, SIZE, Declared, entry, written
from tweo_timm.settings import AT_LEAST_0, AT_LEAST_1, FRACTION, Bounds

METRICS = {"classification": ("top1", "top5"), "multilabel": ("map", "micro_f1", "macro_f1", "sample_f1")}
"""What a pass measures by task, beside the loss; the first is what a model is judged by."""
TITLES = {"top1": "Top-1", "map": "mAP"}
"""How tables call what a model is judged by."""

_AVERAGED = "with `--metrics-avg macro` (or micro, weighted): percent"
_STATISTIC = "of \\|A\\|, from a histogram: within 1/128"


@dataclass(kw_only=True)
class Statistics(Declared):
    """The activations at one place of the model."""

    name: str = entry("the module")
    peak_abs: float | None = entry("max \\|A\\|; null if it was not finite", SIZE)
    mean_abs: float | None = entry("mean \\|A\\|", SIZE)
    kurtosis: float | None = entry("fourth standardized moment, 3 for a Gaussian", default=None)
    median_abs: float | None = entry(_STATISTIC, default=None)
    p999_abs: float | None = entry(_STATISTIC, default=None)
    p9999_abs: float | None = entry(_STATISTIC, default=None)
    max_to_median: float | None = entry("`peak_abs` over `median_abs`", default=None)
    peak_token: int | None = entry("where in the image's flattened tokens the peak was", default=None)
    peak_channel: int | None = entry("in which channel", default=None)
    mean_image_peak: float | None = entry("mean over images of max \\|A\\|", default=None)
    share_of_images_above_448: float | None = entry("448 is the largest value of E4M3", default=None)
    count: int | None = entry("elements", default=None)


@dataclass(kw_only=True)
class Histogram(Declared):
    """How many elements were how large: eight bins to a factor of two."""

    edges: list[float] = entry("lower ends of the bins that are not empty", Bounds(1e-45, 1e39))
    counts: list[float] = entry("elements in each", Bounds(0, 2**62))

    def check(self, source: Fields) -> None:
        """Refuse lists of two lengths."""
        if len(self.edges) != len(self.counts):
            source.refuse("counts", self.counts, f"as long as edges, {len(self.edges)}")


@dataclass(kw_only=True)
class Block(Statistics):
    """The output of a transformer block."""

    histogram: Histogram | None = entry(
        "`edges` and `counts`, eight bins to a factor of two", default=None, optional=True
    )


@dataclass(kw_only=True)
class Epoch(Declared):
    """An epoch of the training."""

    epoch: int = entry("its number", AT_LEAST_0)
    peak_abs: float | None = entry("the largest activation of its training steps, over all blocks", SIZE)


@dataclass(kw_only=True)
class Step(Declared):
    """A log line of the training."""

    update: int = entry("optimizer updates done", AT_LEAST_0)
    task_loss: float | None = entry("mean since the log line before, without the penalty; null if not finite")


@dataclass(kw_only=True)
class Data(Declared):
    """The images; records of different ones are not compared."""

    fingerprint: str = entry("of the file names")
    split: str = entry("its name: val or validation, say, which are one")
    images: int = entry("how many were scored", Bounds(1, 2**40))
    threshold: float | None = entry("of F1, with several labels", default=None, optional=True)

    def same_as(self, other: Data) -> bool:
        """Whether both are the same images and labels; a split has several names."""
        one, two = ({**written(data), "split": ""} for data in (self, other))
        return bool(one == two)


@dataclass(kw_only=True)
class Nodes(Declared):
    """What runs in a file, from the graph that onnxruntime makes of it."""

    int8: dict[str, int] = entry("operator -> count: products and adds of integers", AT_LEAST_0)
    float_islands: int = entry("connected parts that compute in float between integers")


@dataclass(kw_only=True)
class OnnxFile(Declared):
    """One exported file, run over the split in onnxruntime."""

    path: str = entry("where it is")
    target: str = entry("`qdq` for any engine, `onnxruntime` for that one")
    size_mb: float = entry("megabytes", SIZE)
    top1: float = entry("its own Top-1, percent", SIZE)
    top1_agreement: float = entry("share of images with the model's first class", SIZE)
    error_ratio: float | None = entry(
        "how far its logits are from the quantized model's, over how far quantization moved those (null: float)",
        SIZE,
    )
    damage_ratio: float | None = entry(
        "how far its logits are from the float model's, over the same (null: float)", SIZE, default=None, optional=True
    )
    fault: str | None = entry("what is wrong with it; null if it is right", LONG, default="", optional=True)
    nodes: Nodes = entry("which nodes run in int8")


@dataclass(kw_only=True)
class LatencyRow(Declared):
    """The time of one file; the first is the float32 model's."""

    file: str = entry("float32 ONNX, dynamic int8 ONNX, or a target")
    median_ms: float = entry("of a run, over rounds", SIZE)
    min_ms: float = entry("of a run, over rounds", SIZE)
    p99_ms: float | None = entry("of a run, over rounds: 99 % of runs are faster", SIZE, default=None, optional=True)
    size_mb: float | None = entry("megabytes of the file", SIZE, default=None, optional=True)
    images_per_s: float = entry("at the median", SIZE)
    ratio: float = entry("speed where float32 is 1, the median over rounds", SIZE)
    ratio_low: float | None = entry("the least of a round", SIZE, default=None, optional=True)
    ratio_high: float | None = entry("the largest of a round", SIZE, default=None, optional=True)


@dataclass(kw_only=True)
class Latency(Declared):
    """Times at one batch size."""

    batch: int = entry("images in a run", AT_LEAST_0)
    threads: int = entry("of one operator", AT_LEAST_0)
    rounds: int = entry("in each of which the files took turns", AT_LEAST_0)
    cpu: str = entry("the processor")
    onnxruntime: str = entry("its version")
    rows: list[LatencyRow] = entry("a row per file", some=True)


@dataclass(kw_only=True)
class Exported(Declared):
    """The files of one model ([export.md](export.md))."""

    scheme: str | None = entry("null for a float model", default=None)
    top1: float = entry("of the PyTorch model that was exported, percent", PERCENT)
    self_error_ratio: float | None = entry("`error_ratio` of that model from itself, after rounding", default=None)
    files: list[OnnxFile] = entry("a file per target", some=True)
    latency: list[Latency] = entry("of a quantized model, at batch 1 and a larger one", default=[])

    def wrong_targets(self) -> set[str]:
        """The targets whose file does not compute what the model does."""
        return {file.target for file in self.files if file.fault}

    def sound_targets(self) -> set[str]:
        """The targets whose file does."""
        return {file.target for file in self.files} - self.wrong_targets()


@dataclass(kw_only=True)
class Scored(Declared):
    """What one pass over the split found, and the files that were exported of the model that made it."""

    loss: float | None = entry("cross-entropy; binary cross-entropy with several labels", default=None)
    top1: float | None = entry("percent", PERCENT, default=None)
    top5: float | None = entry("percent", PERCENT, default=None)
    map: float | None = entry("with `--task multilabel`: mean average precision, percent", PERCENT, default=None)
    micro_f1: float | None = entry("with `--task multilabel`: percent", PERCENT, default=None)
    macro_f1: float | None = entry("with `--task multilabel`: percent", PERCENT, default=None)
    sample_f1: float | None = entry("with `--task multilabel`: percent", PERCENT, default=None)
    macro_precision: float | None = entry(_AVERAGED, PERCENT, default=None, optional=True)
    macro_recall: float | None = entry(_AVERAGED, PERCENT, default=None, optional=True)
    macro_f1_score: float | None = entry(_AVERAGED, PERCENT, default=None, optional=True)
    micro_precision: float | None = entry(_AVERAGED, PERCENT, default=None, optional=True)
    micro_recall: float | None = entry(_AVERAGED, PERCENT, default=None, optional=True)
    micro_f1_score: float | None = entry(_AVERAGED, PERCENT, default=None, optional=True)
    weighted_precision: float | None = entry(_AVERAGED, PERCENT, default=None, optional=True)
    weighted_recall: float | None = entry(_AVERAGED, PERCENT, default=None, optional=True)
    weighted_f1_score: float | None = entry(_AVERAGED, PERCENT, default=None, optional=True)
    correct: str | None = entry(
        "one bit per image in hexadecimal: was the first guess right; with several labels, were all of them right",
        LONG,
        default=None,
    )
    not_finite: int | None = entry(
        "only where logits of so many images are not finite: the metrics and `correct` are null then, the exit "
        "status 1 (timm's validate.py scores NaN as a guess)",
        AT_LEAST_1,
        default=None,
        optional=True,
    )
    unscored: str | None = entry(
        "in place of the metrics and `correct`, which are null then: why there is nothing to score (no head)",
        LONG,
        default=None,
        optional=True,
    )
    exported: Exported | None = entry("with `--export onnx`: the files", default=None, optional=True)
    not_exported: str | None = entry(
        "in place of `exported`: why there is no such file", LONG, default=None, optional=True
    )

    def value(self, metric: str) -> float | None:
        """Return a metric by its name."""
        found: float | None = getattr(self, metric)
        return found

    @property
    def is_scored(self) -> bool:
        """Whether it has metrics."""
        return self.not_finite is None and self.unscored is None

    def check_metrics(self, source: Fields, names: tuple[str, ...]) -> None:
        """Refuse what lacks a metric, or has one where nothing was scored."""
        reason = "not_finite" if self.not_finite is not None else "unscored"
        for name in names:
            if self.is_scored:
                source.number(name, PERCENT)
        for name in (*names, "correct"):
            if not self.is_scored and getattr(self, name) is not None:
                source.refuse(name, getattr(self, name), f"null, since {reason} is there")


@dataclass(kw_only=True)
class Calibration(Declared):
    """The images that fixed the scales."""

    split: str = entry("where they are from")
    images: int = entry("how many")
    seed: int = entry("which")
    method: str = entry("absmax, or a percentile above which inputs of layers are cut off", default="absmax")


@dataclass(kw_only=True)
class Fidelity(Declared):
    """How far a quantized model is from the float one, on 64 images."""

    relative_error: float | None = entry("of the logits: norm of the difference over norm", SIZE)
    top1_agreement: float | None = entry("share of images with the same first guess; null without a head", FRACTION)
    num_images: int = entry("how many were compared", AT_LEAST_1)
    layers: list[Any] = entry("signal to noise of each layer and block, with and without the peak element", default=[])


@dataclass(kw_only=True)
class Saturation(Declared):
    """Activations beyond the range of E4M3, which became its largest value."""

    values: int = entry("how many", SIZE)
    share: float = entry("of all that were rounded", FRACTION)
    sites: dict[str, int] = entry("layer or stream -> how many, where there were any", SIZE)


@dataclass(kw_only=True)
class Compensated(Declared):
    """What QwT or QwT-v2 adds."""

    parameters: int = entry("numbers that were fitted", AT_LEAST_0)
    left_after_folding: int = entry("of them those that an exported file computes with", AT_LEAST_0)


@dataclass(kw_only=True)
class Quantized(Scored):
    """The model after static quantization."""

    scheme: str = entry("as `--quantize` names it")
    calibration: Calibration | None = entry("the images that fixed the scales", default=None)
    saturated: Saturation | None = entry("of fp8: what its largest value stands for", default=None, optional=True)
    fidelity: Fidelity = entry("how far it is from the float model")
    compensation: Compensated | None = entry("with `+qwt` and its like: what it adds", default=None, optional=True)


@dataclass(kw_only=True)
class Prepared(Declared):
    """What was validated, and how its images were prepared."""

    name: str = entry("of the checkpoint: its file or folder")
    arch: str = entry("the architecture")
    checkpoint: str | None = entry("the file", default=None)
    task: str = entry("`classification` or `multilabel`; records of both are not compared", default="classification")
    param_count_m: float = entry("parameters, millions", SIZE)
    img_size: float = entry("pixels", SIZE)
    crop_pct: float = entry("share of the image that is cropped", SIZE)
    interpolation: str = entry("how images were resized")
    preprocessing: dict[str, Any] | None = entry(
        "how an image becomes the model's input, as exported files say it ([export.md](export.md))", default=None
    )
    precision: str = entry("what the model computed in", default="float32")
    data: Data = entry("the images")
    class_names: list[str | None] | None = entry(
        "by index, the checkpoint's or else the data's; null if neither says", LONG, default=None
    )


@dataclass(kw_only=True)
class Record(Scored, Prepared):
    """One checkpoint.

    Attributes:
        answers: what the probes found by name, each of the type that the probe declares, or a `Refused`.
    """

    peak_abs: float | None = entry("max \\|A\\| over all outputs of transformer blocks", SIZE)
    peak_block: str | None = entry("where that was", default=None)
    blocks: list[Block] = entry("the output of each block")
    training_peak_abs: float | None = entry(
        "the largest activation of the training, from the outliers.jsonl beside the checkpoint; null without one",
        default=None,
    )
    training: list[Epoch] = entry("the same for each epoch", default=[])
    training_losses: list[Step] = entry("the task's loss at each log line, from losses.jsonl", default=[])
    quantized: list[Quantized] = entry("a pass for each scheme of `--quantize`", default=[])
    not_quantized: dict[str, str] = entry("scheme -> why it was not possible", LONG, default={})
    answers: dict[str, Any] = field(default_factory=dict)

    @property
    def headline(self) -> str:
        """The metric that the model is judged by."""
        return METRICS[self.task][0]

    @property
    def title(self) -> str:
        """How tables call it."""
        return TITLES[self.headline]

    @property
    def headline_value(self) -> float | None:
        """Its value in percent; None where logits are not finite."""
        return self.value(self.headline)

    def by_scheme(self) -> dict[str, float | None]:
        """Return scheme -> that metric in percent."""
        return {entry.scheme: entry.value(self.headline) for entry in self.quantized}

    def exports(self) -> list[Exported]:
        """The exported files, the float model's first."""
        return [scored.exported for scored in (self, *self.quantized) if scored.exported is not None]

    def as_json(self) -> dict[str, Any]:
        """Return what report.json holds, with the metrics of its task alone."""
        others = {name for task, names in METRICS.items() if task != self.task for name in names}
        found: dict[str, Any] = written(self, others)
        answers: dict[str, Any] = written(self.answers)
        return found | answers

    def check(self, source: Fields) -> None:
        """Refuse an unknown task, metrics that are missing, and a peak without its place."""
        if self.task not in METRICS:
            source.refuse("task", self.task, f"one of {', '.join(METRICS)}")
        self.check_metrics(source, METRICS[self.task])
        for place, quantized in zip(source.each("quantized") if self.quantized else [], self.quantized, strict=True):
            quantized.check_metrics(place, METRICS[self.task][:1])
        if self.peak_abs is not None:
            source.text("peak_block")
        if self.task == "classification" and self.is_scored:
            digits, correct = 2 * -(-self.data.images // 8), source.text("correct")
            if len(correct) != digits or not set(correct) <= set("0123456789abcdefABCDEF"):
                source.refuse(
                    "correct", correct, f"{digits} hexadecimal digits, a bit for each of {self.data.images} images"
                )


@dataclass(kw_only=True)
class Refused(Declared):
    """In place of what a probe found: why the model did not allow the question."""

    refused: str = entry("the reason", LONG)


def is_refused(value: Any) -> bool:
    """Whether an answer in a file is a refusal."""
    return isinstance(value, Mapping) and "refused" in value
