"""Part (d): what was trained, in int8 and in float16, by validate.py."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu import trainings
from benchmarks.gpu.commands import run_command
from benchmarks.gpu.ledger import MeasurementError, NotRunError, Part, Row
from benchmarks.gpu.photographs import crops
from benchmarks.gpu.plan import Plan

LETTER, TITLE = "d", "The trained models in int8 and in float16"
SCHEMES = ("w8a8-tt", "w8a8-tt+res")
VARIANTS = {"int8": ["--quantize", *SCHEMES], "float16": ["--model-dtype", "float16"]}
LIMIT_S = 240


def measure_part(part: Part, plan: Plan) -> None:
    """Validate all trained models in one command per variant: starting one takes longer than the images do."""
    folders = {arm.name: plan.output / "runs" / arm.name for arm in trainings.arms(plan)}
    for variant in VARIANTS:
        names = {f"{name}, {variant}": folder for name, folder in folders.items()}
        trained = {key: folder for key, folder in names.items() if part.ledger.is_done(trainings.LETTER, folder.name)}
        about = {key: {"arm": folder.name, "variant": variant} for key, folder in names.items()}
        for key in [key for key in names if key not in trained]:
            part.attempt(key, _nothing_trained, **about[key])
        if trained:
            part.attempt_all(list(trained), lambda keys, v=variant, t=trained: _validate(v, keys, t, plan), about)


def _nothing_trained() -> Row:
    raise NotRunError("its training, in part c, has not been finished")


def _validate(variant: str, keys: list[str], folders: Mapping[str, Path], plan: Plan) -> dict[str, dict[str, Any]]:
    """Validate some trained models; one that cannot be validated does not cost the others.

    Returns:
        by key what the report says; keys of models that are not in the report are missing.

    Raises:
        MeasurementError: there is no report at all.
    """
    report = plan.output / "validation" / variant
    checkpoints = {key: (folders[key] / "last.pth.tar").absolute() for key in keys}
    words = ["validate.py", "--checkpoint", *map(str, checkpoints.values()), "--data-dir", str(crops(plan).absolute())]
    words += [*VARIANTS[variant], "--device", plan.device, "-b", "128", "-j", str(plan.workers)]
    words += ["--report", str(report.absolute())]
    (report / "report.json").unlink(missing_ok=True)
    problem = None
    try:
        run_command(words, plan.output / "logs" / f"validate-{variant}.log", LIMIT_S)
    except MeasurementError as error:
        problem = error
    if not (report / "report.json").exists():
        raise problem or MeasurementError("validate.py wrote no report")
    records = {
        record["checkpoint"]: record for record in json.loads((report / "report.json").read_text())["checkpoints"]
    }
    return {key: _read(records[str(path)]) for key, path in checkpoints.items() if str(path) in records}


def _read(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return Top-1, peak, and of each scheme Top-1 and the median SQNR of a layer without its peak element."""
    found = {key: record[key] for key in ("top1", "loss", "peak_abs", "precision")}
    for quantized in record["quantized"]:
        ratios = [layer["sqnr_without_peak_db"] for layer in quantized["fidelity"]["layers"]]
        known = [ratio for ratio in ratios if ratio is not None]
        found[f"top1 {quantized['scheme']}"] = quantized["top1"]
        found[f"sqnr_without_peak_db {quantized['scheme']}"] = statistics.median(known) if known else None
    return found | ({"not_quantized": record["not_quantized"]} if record["not_quantized"] else {})
