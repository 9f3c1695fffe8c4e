"""How fast ONNX files run in onnxruntime, side by side on this machine.

A time alone says little: machines differ, and a busy one slows down whatever it runs. So the files take turns in every
round, each after a rest in which the threads of the one before fall asleep and a run in which its own wake up, and what
counts is the ratio to the first of them within a round. An int8 file is measured against the two forms that need no
calibration: the float32 model, and what onnxruntime makes of it when it finds the scales of activations at run time.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tweo_timm import machine
from tweo_timm.quant.export import export_onnx
from tweo_timm.quant.onnx_file import OnnxModel
from tweo_timm.quant.ort import separate_integers

REST_S = 0.05
"""Before each run: the threads of another session may spin on for some milliseconds."""
ROUNDS = 10
BUDGET_S = 60.0
"""For one batch size; see `take_turns`."""

Run = Callable[[Tensor], object]
"""Takes images (B, C, H, W), float32, on the CPU; what it returns does not matter."""


def measure_latency(files: Mapping[str, str | Path], images: Tensor) -> list[dict[str, Any]]:
    """Time files at batch 1 and at a batch of all images, with torch's number of threads.

    There are `ROUNDS` rounds; a model so large that they take more than `BUDGET_S` gets fewer, one at least.

    Args:
        files: label -> an ONNX file with a dynamic batch; the first is what the others are compared with.
        images: (B, C, H, W).

    Returns:
        For each batch size: batch, threads, rounds, cpu, onnxruntime (its version), and rows: those of `latency_rows`
        as a list, with the label as `file` and its size_mb.
    """
    runs = {label: file_run(path) for label, path in files.items()}
    images = images.detach().float().cpu()
    found = []
    for batch in sorted({1, len(images)}):
        times = take_turns(runs, images[:batch], ROUNDS, BUDGET_S)
        found.append(
            {
                "batch": batch,
                "threads": torch.get_num_threads(),
                "rounds": len(next(iter(times.values()))),
                "cpu": machine.describe()["processor"],
                "onnxruntime": version("onnxruntime"),
                "rows": [
                    {"file": label, "size_mb": round(Path(files[label]).stat().st_size / 1e6, 3), **row}
                    for label, row in latency_rows(times, batch).items()
                ],
            }
        )
    return found


def write_rivals(
    model: nn.Module, example: Tensor, folder: Path, float_file: str | Path | None = None
) -> dict[str, Path]:
    """Write the two forms of a float model that need no calibration.

    Args:
        model: the float model.
        example: images (B, C, H, W) of the size that the files are for.
        folder: where to; it exists.
        float_file: the first of them, where it has been written already.

    Returns:
        label -> file: float32, then dynamic int8.

    Raises:
        RuntimeError: if the model cannot be exported.
    """
    if float_file is None:
        float_file = folder / "float32.onnx"
        export_onnx(model, float_file, example)
    dynamic = folder / "dynamic.onnx"
    write_dynamic(float_file, dynamic)
    return {"float32 ONNX": Path(float_file), "dynamic int8 ONNX": dynamic}


def write_dynamic(float_file: str | Path, path: str | Path) -> None:
    """Quantize the products with weights of a float file to int8, with scales of activations found at run time.

    Args:
        float_file: an ONNX file.
        path: the file to write.
    """
    import onnx
    import onnx_ir as ir
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(float_file)
    del model.graph.value_info[:]  # onnxruntime takes the shape of a transposed Gemm weight for an error
    with _quiet_root_logger():
        quantize_dynamic(model, path, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
    quantized = ir.load(path)
    separate_integers(quantized)
    ir.save(quantized, path)


@contextlib.contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """Hold back what onnxruntime says there about every tensor, and the handler that it would give it."""
    root, handler = logging.getLogger(), logging.NullHandler()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


def file_run(path: str | Path, threads: int | None = None) -> Run:
    """Open a file in onnxruntime, to be run on images; see `session_settings`.

    A file that takes images in another form than float32 gets them so from the untimed run on, which comes first.
    """
    model = OnnxModel(path, threads)
    prepared = functools.lru_cache(1)(lambda images: model.input.feed(images, model.preprocessing))
    return lambda images: model.run(prepared(images))


@torch.inference_mode()
def take_turns(
    runs: Mapping[str, Run], images: Tensor, rounds: int, budget_s: float = math.inf
) -> dict[str, list[float]]:
    """Time everyone once in every round, each after a rest and an untimed run.

    In the rest the threads of the one before fall asleep, in the untimed run one's own wake up.

    Args:
        runs: label -> what to time.
        images: (B, C, H, W), float32, on the CPU.
        rounds: how many to measure.
        budget_s: no round but the first starts once this time is over.

    Returns:
        label -> seconds in each round.
    """
    times: dict[str, list[float]] = {label: [] for label in runs}
    deadline = time.perf_counter() + budget_s
    for number in range(rounds):
        if number and time.perf_counter() > deadline:
            break
        for label, run in runs.items():
            time.sleep(REST_S)
            run(images)
            start = time.perf_counter()
            run(images)
            times[label].append(time.perf_counter() - start)
    return times


def latency_rows(times: Mapping[str, list[float]], batch: int) -> dict[str, dict[str, float]]:
    """Sum up the seconds of all rounds.

    Args:
        times: label -> seconds in each round; the first is the reference.
        batch: images in a run.

    Returns:
        label -> median_ms, min_ms, p99_ms (the percentile between the two slowest of few rounds), images_per_s (at the
        median), and ratio: the median over rounds of the reference's time over its own, above one if it is faster;
        ratio_low and ratio_high: the least and the largest of a round.
    """
    reference = next(iter(times.values()))
    return {label: _latency_row(reference, values, batch) for label, values in times.items()}


def _latency_row(reference: list[float], values: list[float], batch: int) -> dict[str, float]:
    ratios = [theirs / own for theirs, own in zip(reference, values, strict=True)]
    return {
        "median_ms": 1e3 * statistics.median(values),
        "min_ms": 1e3 * min(values),
        "p99_ms": 1e3 * float(np.percentile(values, 99)),
        "images_per_s": batch / statistics.median(values),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }
