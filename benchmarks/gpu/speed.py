"""Part (b): how fast a training step is in each precision, without and with TWEO, eager and compiled.

One step is forward under bfloat16 autocast, backward and AdamW, on random images that lie on the device. CUDA events
around each step; the median counts. Peak memory is what torch has allocated during the timed steps, parameters,
gradients and optimizer state included. A ratio is to bfloat16 without TWEO, of the same model, eager or compiled alike.
A profile says where the time of the slowest ratio goes.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import timm
import torch
from timm.task import ClassificationTask
from torch import nn
from torch.autograd import DeviceType

from benchmarks.gpu.ledger import DONE, NotRunError, Part, Row
from benchmarks.gpu.plan import Plan, Workload
from benchmarks.gpu.worker import Worker
from tweo_timm import Fp8Recipe, TweoConfig, attach_tweo, patch_fp8
from tweo_timm.fp8.backend import backend_named

LETTER, TITLE = "b", "Speed and memory of a training step"
PROFILE = "profile of the slowest ratio"
BASE = "bfloat16"
PRECISIONS = {
    BASE: None,
    "native delayed": Fp8Recipe(backend="native"),
    "native current": Fp8Recipe(backend="native", scaling="current"),
    "native unit": Fp8Recipe(backend="native", scaling="unit"),
    "te delayed": Fp8Recipe(backend="te"),
    "te current": Fp8Recipe(backend="te", scaling="current"),
    "emulated delayed": Fp8Recipe(backend="emulated"),
}
ON_A_GPU = [name for name in PRECISIONS if name != "emulated delayed"]
CELL_LIMIT_S = 180
PROFILE_S = 50
PROFILED_STEPS = 3


class Cell(NamedTuple):
    """One line of the table."""

    workload: Workload
    precision: str
    tweo: bool
    compiled: bool

    @property
    def name(self) -> str:
        """Its name in the ledger."""
        tweo, how = "TWEO" if self.tweo else "plain", "compiled" if self.compiled else "eager"
        return f"{self.workload.arch}, {self.precision}, {tweo}, {how}"


def measure_part(part: Part, plan: Plan) -> None:
    """Measure every cell, the important ones first, and profile the step with the slowest ratio."""
    with Worker() as worker:
        for cell in cells(plan):
            run = _caller(worker, part, measure_step, cell, plan)
            row = part.attempt(cell.name, run, **_about(cell))
            if cell.precision.startswith("te ") and row["status"] == DONE:
                worker.close()  # Transformer Engine keeps every model that it has seen in its global state
        slowest = slowest_of(part.ledger.rows())
        if slowest is not None:
            by_name = {cell.name: cell for cell in cells(plan)}
            late = dataclasses.replace(part, limit_s=part.limit_s + PROFILE_S)
            run = _caller(worker, late, profile_step, by_name[slowest["name"]], plan)
            late.attempt(f"{PROFILE}: {slowest['name']}", run)


def cells(plan: Plan) -> Iterator[Cell]:
    """Yield every cell: all eager ones, then the compiled ones that most people would use, the rest, larger models."""
    precisions = list(PRECISIONS) if plan.tiny else ON_A_GPU
    usual = precisions[:2]
    passes = [
        (plan.workloads, precisions, False),
        (plan.workloads, usual, True),
        (plan.workloads, precisions[2:], True),
        (plan.more_workloads, usual, False),
        (plan.more_workloads, usual, True),
    ]
    for workloads, names, compiled in passes:
        for workload in workloads:
            for name in names:
                yield from (Cell(workload, name, tweo, compiled) for tweo in (False, True))


def _about(cell: Cell) -> dict[str, Any]:
    fields = {"precision": cell.precision, "tweo": cell.tweo, "compiled": cell.compiled}
    return {"model": cell.workload.arch, "img_size": cell.workload.img_size, **fields}


def _caller(worker: Worker, part: Part, function: Callable[..., Any], cell: Cell, plan: Plan) -> Callable[[], Any]:
    return lambda: worker.run(function, cell, plan, limit_s=min(CELL_LIMIT_S, part.left_s() + CELL_LIMIT_S / 3))


def measure_step(cell: Cell, plan: Plan) -> dict[str, Any]:
    """Time one cell.

    Returns:
        batch_size, steps, median_ms, min_ms, max_ms, images_per_s, and peak_mib (None on a CPU, where torch does not
        count it).

    Raises:
        NotRunError: its precision cannot be had here.
    """
    on_gpu = plan.device == "cuda"
    step = build_step(cell, plan)
    for _ in range(plan.warm_up):
        step()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = step_times_s(step, plan.steps, plan.device)
    median = statistics.median(times)
    return {
        "batch_size": cell.workload.batch_size,
        "steps": plan.steps,
        "median_ms": 1e3 * median,
        "min_ms": 1e3 * min(times),
        "max_ms": 1e3 * max(times),
        "images_per_s": cell.workload.batch_size / median,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
    }


def build_step(cell: Cell, plan: Plan) -> Callable[[], None]:
    """Return a function that does one training step.

    Raises:
        NotRunError: the precision of the cell cannot be had here.
    """
    device, workload = torch.device(plan.device), cell.workload
    recipe = PRECISIONS[cell.precision]
    if recipe is not None:
        require(recipe, device)
    _clear(plan.device)
    torch.backends.cuda.matmul.allow_tf32 = True  # as train.py does
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    model = timm.create_model(workload.arch, **workload.kwargs).to(device).train()
    if recipe is not None:
        patch_fp8(model, recipe)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), device=device, verbose=False)
    if cell.tweo:
        attach_tweo(task, TweoConfig(weight=0.01))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if cell.compiled:
        task.compile(backend=plan.compiler)
    images = torch.randn(workload.batch_size, 3, workload.img_size, workload.img_size, device=device)
    targets = torch.randint(0, model.num_classes, (workload.batch_size,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            result = task(images, targets)
        result["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def require(recipe: Fp8Recipe, device: torch.device) -> None:
    """Raise NotRunError, with the reason, where a recipe cannot run on a device."""
    obstacle = backend_named(recipe.backend).obstacle(recipe, device)
    if obstacle is not None:
        raise NotRunError(f"FP8 backend {recipe.backend} cannot run: {obstacle}")


def _clear(device: str) -> None:
    """Forget what the cell before left: its memory, and its compiled code."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def step_times_s(step: Callable[[], None], steps: int, device: str) -> list[float]:
    """Return the seconds of each step: on a GPU between events that the GPU itself records."""
    if device != "cuda":
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        return times
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(marks)]


def with_ratios(rows: list[Row]) -> list[Row]:
    """Return the finished cells with time_ratio and memory_ratio, None where there is nothing to compare with."""
    finished = [row for row in rows if row["part"] == LETTER and row["status"] == DONE and "median_ms" in row]
    bases = {(row["model"], row["compiled"]): row for row in finished if row["precision"] == BASE and not row["tweo"]}
    return [_with_ratio(row, bases.get((row["model"], row["compiled"]))) for row in finished]


def _with_ratio(row: Row, base: Row | None) -> Row:
    comparable = base is not None and base["batch_size"] == row["batch_size"]
    time_ratio = row["median_ms"] / base["median_ms"] if comparable else None
    memory_ratio = row["peak_mib"] / base["peak_mib"] if comparable and row["peak_mib"] is not None else None
    return row | {"time_ratio": time_ratio, "memory_ratio": memory_ratio}


def slowest_of(rows: list[Row]) -> Row | None:
    """Return the finished cell with the largest time ratio, or None; what others are compared with is none of them."""
    compared = [row for row in with_ratios(rows) if row["time_ratio"] is not None and _is_compared(row)]
    return max(compared, key=lambda row: row["time_ratio"], default=None)


def _is_compared(row: Row) -> bool:
    return bool(row["tweo"] or row["precision"] != BASE)


def profile_step(cell: Cell, plan: Plan) -> dict[str, Any]:
    """Say where the time of a cell's step goes.

    Returns:
        wall_ms, of a step while it is profiled; busy_ms, the sum over kernels (on a CPU over operators); and kernels:
        name, calls and ms per step of the fifteen that take longest.
    """
    on_gpu = plan.device == "cuda"
    step = build_step(cell, plan)
    for _ in range(plan.warm_up):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profile:
        began = time.perf_counter()
        for _ in range(PROFILED_STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
        wall = time.perf_counter() - began
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in profile.key_averages() if event.device_type == wanted and not event.is_user_annotation]
    times = {
        event.key: (event.count, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in events
    }
    longest = sorted(times.items(), key=lambda item: -item[1][1])[:15]
    return {
        **_about(cell),
        "wall_ms": 1e3 * wall / PROFILED_STEPS,
        "busy_ms": sum(us for _, us in times.values()) / 1e3 / PROFILED_STEPS,
        "kernels": [
            {"name": name[:80], "calls": count / PROFILED_STEPS, "ms": us / 1e3 / PROFILED_STEPS}
            for name, (count, us) in longest
        ],
    }
