"""Everything that is measured about one checkpoint, as one record."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tweo_timm.artefact import FLOAT, Artefact
from tweo_timm.evaluate.case import Case, Samples, num_classes_of
from tweo_timm.evaluate.images import Images, open_images
from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.evaluate.probe import Asked
from tweo_timm.evaluate.record import (
    Block,
    Calibration,
    Compensated,
    Data,
    Epoch,
    Exported,
    Fidelity,
    Quantized,
    Record,
    Saturation,
    Step,
)
from tweo_timm.evaluate.scoring import Score, score
from tweo_timm.evaluate.subject import Subject
from tweo_timm.outliers import OutlierRecorder
from tweo_timm.quant.calibration import percentile_of
from tweo_timm.quant.compensation import added_parameters
from tweo_timm.quant.deploy import export_record
from tweo_timm.quant.export import require_export_extra
from tweo_timm.quant.fidelity import fidelity
from tweo_timm.quant.float8 import saturation
from tweo_timm.quant.onnx_file import OnnxModel
from tweo_timm.quant.scheme import Scheme, refuse_not_exportable
from tweo_timm.quant.static import quantize_static
from tweo_timm.records import plain
from tweo_timm.run.class_names import check_same_names, names_by_index
from tweo_timm.run.classes import class_names
from tweo_timm.run.dataset import place
from tweo_timm.run.world import World
from tweo_timm.schema import build

_logger = logging.getLogger(__name__)


def measure(subject: Subject, world: World) -> Record:
    """Validate one checkpoint, and diagnose and quantize it as its options ask.

    Args:
        subject: the model and its options.
        world: device and rank.

    Returns:
        The record.

    Raises:
        ValueError: if data is missing or does not fit the model, or an option does not fit the model.
    """
    options = subject.options
    _check_wishes(options, world)
    images = open_images(options, subject.data_config, num_classes_of(subject), world)
    names = _class_names(subject, images)
    samples = Samples(subject, world)
    asked = Asked(Case(subject, images, samples, world, names))
    with asked.watching():
        whole, outliers = _score_with_outliers(subject, images, world)
    record = Record(
        **_prepared(subject),
        class_names=names,
        data=_data(images, whole, options),
        **whole.fields(),
        **outliers,
        training_peak_abs=subject.training_peak_abs,
        training=_training_peaks(subject),
        training_losses=_training_losses(subject.losses),
    )
    if options.export and not (options.survey and whole.unscored):  # a survey judges it, and writes what it mends
        artefact = Artefact(FLOAT, subject.preprocessing, names, arch=subject.arch)
        record = replace(record, **_exported(subject, None, images, whole, artefact))
    rival = record.exported is not None and options.export_dtype == FLOAT
    float_file = _onnx_path(subject, None, FLOAT) if rival else None
    for scheme in options.quantize:
        try:
            record.quantized.append(_quantized(subject, scheme, images, samples, world, names, float_file))
        except ValueError as error:  # what is measured already is not lost over it
            record.not_quantized[scheme] = str(error)
    record.answers = asked.measure()
    return record


def _prepared(subject: Subject) -> dict[str, Any]:
    """The fields of `Prepared` that the subject alone knows."""
    config = subject.data_config
    return {
        "name": subject.name,
        "arch": subject.arch,
        "checkpoint": str(subject.path) if subject.path else None,
        "task": subject.options.task,
        "param_count_m": round(subject.param_count / 1e6, 2),
        "img_size": config["input_size"][-1],
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
        "preprocessing": subject.preprocessing.to_json(),
        "precision": subject.precision,
    }


def _data(images: Images, whole: Score, options: ValidateOptions) -> Data:
    threshold = options.multilabel_threshold if options.task == "multilabel" else None
    return Data(fingerprint=images.fingerprint, split=options.split, images=whole.count, threshold=threshold)


def _check_wishes(options: ValidateOptions, world: World) -> None:
    """Refuse what cannot be done before anything is measured."""
    for scheme in options.quantize:
        Scheme.parse(scheme)
        try:
            refuse_not_exportable(scheme if options.export else None, options.export_dtype)
        except ValueError as error:
            raise ValueError(f"--quantize {scheme} --export {options.export}: {error}") from error
    percentile_of(options.calibration)
    if options.real_labels and world.distributed:
        raise ValueError("--real-labels counts in one process: validate without torchrun")
    if options.export and world.distributed:
        raise ValueError(
            "--export runs in one process: all of them would write the same file; validate without torchrun"
        )
    if options.export:
        try:
            require_export_extra()
        except RuntimeError as error:
            raise ValueError(f"--export onnx: {error}") from error


def _class_names(subject: Subject, images: Images) -> list[str | None] | None:
    """Names of the model's classes by index: the checkpoint's, with which the data's must agree, or else the data's."""
    if images.valid_labels is not None:
        return subject.class_names
    found = names_by_index(class_names(images.dataset))
    check_same_names(
        subject.class_names,
        found,
        f"checkpoint {subject.path}",
        "give the --class-map of its training, name the folders as they were, or say by --valid-labels FILE which of "
        "the model's classes those of the data are",
    )
    return subject.class_names or found


def _score_with_outliers(subject: Subject, images: Images, world: World) -> tuple[Score, dict[str, Any]]:
    """Metrics, and the fields of `Record` about every block, in one pass over the data."""
    options = subject.options
    recorder = _recorder(subject)
    model = subject.model
    with contextlib.ExitStack() as stack:
        if recorder is not None:
            stack.enter_context(recorder.recording())
            stack.callback(recorder.remove)
        run: Any = model
        if options.torchcompile:
            run = torch.compile(model, backend=options.torchcompile, mode=options.torchcompile_mode)
        whole = score(run, images, options, world, subject.name)
    if recorder is None:
        return whole, {"peak_abs": None, "blocks": []}
    recorder.gather()
    found = plain(recorder.summary())
    for block in found["blocks"]:
        stats = recorder.stats[block["name"]]
        assert stats is not None
        block["histogram"] = _thinned(*stats.histogram())
    return whole, {**found, "blocks": build(list[Block], found["blocks"])}


def _recorder(subject: Subject) -> OutlierRecorder | None:
    if isinstance(subject.model, OnnxModel):  # shows its logits alone
        return None
    try:
        return OutlierRecorder(subject.model, subject.options.tweo_blocks)
    except ValueError as error:
        if subject.options.tweo_blocks:
            raise
        _logger.warning("%s: no outlier statistics: %s", subject.name, str(error).split(":")[0])
        return None


def _thinned(edges: list[float], counts: list[int]) -> dict[str, list[Any]]:
    """Merge the 128 bins to a factor of two to 8, enough for a picture; zeros and empty bins are left out."""
    merged: dict[float, int] = {}
    for edge, count in zip(edges, counts, strict=True):
        if edge > 0:
            mantissa, exponent = math.frexp(edge)  # mantissa in [1/2, 1): 8 bins are sixteenths of it
            key = math.ldexp(math.floor(mantissa * 16) / 16, exponent)
            merged[key] = merged.get(key, 0) + count
    return {"edges": list(merged), "counts": list(merged.values())}


def _training_peaks(subject: Subject) -> list[Epoch]:
    """The largest activation of each epoch of the training, over all blocks."""
    peaks: dict[int, float] = {}
    for row in subject.training:
        if row.get("train_peak_abs") is not None:
            peaks[row["epoch"]] = max(peaks.get(row["epoch"], 0.0), row["train_peak_abs"])
    return [Epoch(epoch=epoch, peak_abs=peak) for epoch, peak in sorted(peaks.items())]


def _training_losses(rows: Sequence[Mapping[str, Any]]) -> list[Step]:
    """The loss between one log line and the next, from means that begin with each epoch."""
    steps: list[Step] = []
    epoch, before, total = -1, 0, 0.0
    for row in rows:
        if row["epoch"] != epoch:
            epoch, before, total = row["epoch"], 0, 0.0
        count, now = row["samples"] - before, math.nan if row["task_loss"] is None else row["task_loss"]
        if count > 0:
            steps.append(Step(update=row["update"], task_loss=(now * row["samples"] - total) / count))
            before, total = row["samples"], now * row["samples"]
    return steps


def _quantized(
    subject: Subject,
    scheme: str,
    images: Images,
    samples: Samples,
    world: World,
    names: list[str | None] | None,
    float_file: Path | None,
) -> Quantized:
    """Metrics of a statically quantized copy, and how faithful it is; exported files race `float_file`."""
    options, batches = subject.options, samples.calibration
    try:
        model = quantize_static(subject.model, batches, scheme, options.tweo_blocks, calibration=options.calibration)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"--quantize {scheme} is not possible for {subject.name}: {error}") from error
    result = score(model, images, options, world, f"{subject.name} {scheme}")
    saturated = saturation(model)
    count = sum(len(batch) for batch in batches)
    where: dict[str, Any] = {"split": options.calibration_split, "images": count, "seed": options.seed}
    calibration = where | {"method": options.calibration}
    artefact = Artefact(scheme, subject.preprocessing, names, calibration, subject.arch)
    exported = _exported(subject, model, images, result, artefact, float_file) if options.export else {}
    return Quantized(
        scheme=scheme,
        **result.fields(),
        **exported,
        calibration=build(Calibration, calibration),
        saturated=build(Saturation | None, saturated),
        fidelity=_fidelity(subject, model, samples, images),
        compensation=_compensated(model),
    )


def _compensated(model: nn.Module) -> Compensated | None:
    """What compensations add to a quantized model; None for one without."""
    parameters, left = added_parameters(model)
    return Compensated(parameters=parameters, left_after_folding=left) if parameters else None


def _fidelity(subject: Subject, model: nn.Module, samples: Samples, images: Images) -> Fidelity:
    found = plain(fidelity(subject.model, model, samples.diagnosis))
    return build(Fidelity, found if images.classes else found | {"top1_agreement": None})  # type: ignore[no-any-return]


def _exported(
    subject: Subject,
    quantized: nn.Module | None,
    images: Images,
    scored: Score,
    artefact: Artefact,
    float_file: Path | None = None,
) -> dict[str, Any]:
    """Write ONNX files of the model and run them over the split; those of the float model come first.

    Returns:
        The field `exported` of `Scored`, or `not_exported`: what is measured already is not lost over it.
    """
    what, path = f"--export onnx, {subject.name} {artefact.scheme}", _onnx_path(subject, quantized, artefact.scheme)
    if scored.not_finite or scored.unscored:
        return {"not_exported": f"{what}: {scored.unscored or 'its logits are not finite'}"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = export_record(
            subject.model,
            quantized,
            _placed(subject, images),
            path,
            float_file=float_file,
            input_dtype=subject.options.export_input,
            dtype=subject.options.export_dtype,
            artefact=artefact,
        )
    except (RuntimeError, ValueError, OSError) as error:
        return {"not_exported": f"{what}: {error}"}
    return {"exported": build(Exported, plain(found))}


def _placed(subject: Subject, images: Images) -> Iterator[tuple[Tensor, Tensor]]:
    """The split's batches in the model's dtype, which timm's loader gives them only if it prefetches."""
    device = next(subject.model.parameters()).device
    return ((place(batch, subject.options, device), targets.to(device)) for batch, targets in images.loader)


def _onnx_path(subject: Subject, quantized: nn.Module | None, scheme: str) -> Path:
    """Beside the report, or else beside the checkpoint, named by scheme and, of floats, precision."""
    if subject.options.export_dtype == "float16":
        scheme = "fp16" if quantized is None else f"{scheme}.fp16"
    beside = subject.path.parent if subject.path is not None else Path()
    folder = Path(subject.options.report) if subject.options.report else beside
    return folder / f"{subject.name.replace('/', '-')}.{scheme}.onnx"
