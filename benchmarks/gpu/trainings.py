"""Part (c): real trainings by train.py, baseline and TWEO, in bfloat16 and in FP8, with the same seed.

All trainings of a model do the same number of updates, as many as fill the planned time by the speed of its first
steps in bfloat16. What is said of a training is what it wrote itself: summary.csv, outliers.jsonl, fp8_health.jsonl.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import exactness, speed
from benchmarks.gpu.commands import run_command
from benchmarks.gpu.ledger import DONE, MeasurementError, Part
from benchmarks.gpu.photographs import count, crops
from benchmarks.gpu.plan import Plan, Workload
from benchmarks.gpu.worker import Worker
from tweo_timm.records import read_rows

LETTER, TITLE = "c", "Trainings on photograph crops, and native against emulated FP8"
RECIPE = Path(__file__).with_name("photographs.yaml")
TWEO_WEIGHT = 0.01


class Arm(NamedTuple):
    """One training."""

    workload: Workload
    fp8: str
    tweo: bool

    @property
    def name(self) -> str:
        """Its name in the ledger and, as a run folder, on the disk."""
        precision = "bfloat16" if self.fp8 == "off" else f"fp8-{self.fp8}"
        return f"{self.workload.arch}-{precision}-{'tweo' if self.tweo else 'baseline'}"


def measure_part(part: Part, plan: Plan) -> None:
    """Compare the two ways to compute FP8, then train every arm."""
    with Worker() as worker:
        exactness.measure(part, plan, worker)
        for workload in plan.workloads[: plan.trained]:
            part.attempt(length_name(workload), lambda w=workload: _length(w, plan, part, worker))
    for arm in arms(plan):
        about = {"model": arm.workload.arch, "fp8": arm.fp8, "tweo": arm.tweo}
        part.attempt(arm.name, lambda a=arm: _train(a, plan, part), **about)


def arms(plan: Plan) -> Iterator[Arm]:
    """Yield the trainings."""
    for workload in plan.workloads[: plan.trained]:
        for fp8 in ("off", plan.fp8):
            yield from (Arm(workload, fp8, tweo) for tweo in (False, True))


def length_name(workload: Workload) -> str:
    """Return the name of the row that says how long the trainings of a model are."""
    return f"length of {workload.arch}"


def _length(workload: Workload, plan: Plan, part: Part, worker: Worker) -> dict[str, Any]:
    """How many epochs and updates fill the planned time: from part (b), or from a few steps timed here."""
    cell = speed.Cell(workload, speed.BASE, tweo=False, compiled=False)
    known = part.ledger.find(speed.LETTER, cell.name)
    if known is None or known["status"] != DONE:
        known = worker.run(speed.measure_step, cell, plan, limit_s=speed.CELL_LIMIT_S)
    images = count(crops(plan), "train")
    updates = images // workload.batch_size
    if updates == 0:
        raise MeasurementError(f"{images} training images are less than one batch of {workload.batch_size}")
    epochs = max(2, round(plan.train_s * known["images_per_s"] / images))
    return {"epochs": epochs, "updates": epochs * updates, "images": images, "images_per_s": known["images_per_s"]}


def _train(arm: Arm, plan: Plan, part: Part) -> dict[str, Any]:
    """Train one arm, and read what it wrote."""
    length = part.ledger.find(LETTER, length_name(arm.workload))
    if length is None or length["status"] != DONE:
        raise MeasurementError(f"how long it should train is not known: see {length_name(arm.workload)}")
    began = time.monotonic()
    words = train_words(arm, plan, length["epochs"], length["updates"], crops(plan))
    run_command(words, plan.output / "logs" / f"{arm.name}.log", 4 * plan.train_s + 180)
    seconds = time.monotonic() - began
    return {"updates": length["updates"], "seconds": seconds, **read_run(plan.output / "runs" / arm.name)}


def train_words(arm: Arm, plan: Plan, epochs: int, updates: int, data: Path) -> list[str]:
    """Return the command of one training."""
    workload = arm.workload
    fp8 = ["--fp8", arm.fp8, "--fp8-health-interval", str(max(1, updates // 8))] if arm.fp8 != "off" else []
    kwargs = [f"{key}={value}".replace(" ", "") for key, value in workload.kwargs.items() if key != "img_size"]
    return [
        *("train.py", "-c", str(RECIPE), "--data-dir", str(data.absolute()), "--model", workload.arch),
        *(["--model-kwargs", *kwargs] if kwargs else []),
        *("--img-size", str(workload.img_size), "-b", str(workload.batch_size), "-j", str(plan.workers)),
        *("--epochs", str(epochs), "--seed", "0", "--device", plan.device, *fp8),
        *("--tweo-weight", str(TWEO_WEIGHT if arm.tweo else 0)),
        *("--output", str((plan.output / "runs").absolute()), "--experiment", arm.name),
    ]


def read_run(folder: Path) -> dict[str, Any]:
    """Return what a finished run says of itself.

    Returns:
        train_loss, eval_loss and top1 of the last epoch; train_peak_abs, the largest activation of the whole training,
        with its block; eval_peak_abs; sqnr_db, sqnr_without_peak_db (median over layers and operands of the last
        report, None without FP8), and worst_sqnr_db of them with its place, if there is one.
    """
    with open(folder / "summary.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    blocks = [row for row in read_rows(folder / "outliers.jsonl") if row.get("train_peak_abs") is not None]
    highest = max(blocks, key=lambda row: row["train_peak_abs"], default={})
    numbers = {key: float(last[key]) for key in ("train_loss", "eval_loss", "eval_peak_abs") if last.get(key)}
    return {
        **numbers,
        "top1": float(last["eval_top1"]),
        "train_peak_abs": highest.get("train_peak_abs"),
        "train_peak_block": highest.get("block"),
        **_health(read_rows(folder / "fp8_health.jsonl")),
    }


def _health(rows: list[dict[str, Any]]) -> dict[str, Any]:
    latest = [row for row in rows if row["update"] == rows[-1]["update"]]
    medians: dict[str, Any] = {}
    for key in ("sqnr_db", "sqnr_without_peak_db"):
        known = [row[key] for row in latest if row[key] is not None]
        medians[key] = statistics.median(known) if known else None
    return medians | _worst(latest)


def _worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the lowest SQNR and where it was; nothing without rows."""
    row = min((row for row in rows if row["sqnr_db"] is not None), key=lambda row: row["sqnr_db"], default=None)
    if row is None:
        return {}
    return {"worst_sqnr_db": row["sqnr_db"], "worst_sqnr_db_at": f"{row['layer']}.{row['tensor']}"}
