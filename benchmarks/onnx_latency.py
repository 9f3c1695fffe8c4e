"""Latency of one model as int8 and float ONNX files in onnxruntime, and in PyTorch, as ratios in one run.

    python benchmarks/onnx_latency.py --threads 2 --batches 1 8 --rounds 20

Weights are random: latency does not care. All contestants take turns in every round, each after a rest in which the
threads of the one before fall asleep and a run in which its own wake up. A ratio is the median over rounds of float32
onnxruntime's time over the contestant's in that round, so that a busy machine disturbs both sides. OpenVINO takes part
where it is installed.

Our sessions compute exactly, by an option where int8 products saturate: rows "plain" and "exact" have a file without
and with it on every processor; "w7" has weights of 7 bits, which need none. An error ratio is how far a contestant is
from the PyTorch model of its file, over how far quantization moved that: above 1 it is wrong, unless the model with its
random weights is as far from itself.
`--operators` adds where the time goes: for each operator, the sum over its nodes of the shortest time seen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch

from tweo_timm import machine
from tweo_timm.quant.deploy import ERROR_RATIO_LIMIT, Agreement
from tweo_timm.quant.export import INPUT, export_onnx
from tweo_timm.quant.latency import Run, file_run, latency_rows, take_turns, write_dynamic
from tweo_timm.quant.ort import node_census, session_settings
from tweo_timm.quant.scheme import Scheme
from tweo_timm.quant.static import quantize_static

REFERENCE, DYNAMIC = "onnxruntime float32", "dynamic int8"
QDQ, QDQ_W7, QDQ_ALL = "static int8, QDQ", "static int8 w7, QDQ", "static int8 +res+attn, QDQ"
FUSED, FUSED_W7, FUSED_STREAM = "static int8, fused", "static int8 w7, fused", "static int8 +res, fused"
OPTIONAL = (DYNAMIC, QDQ, FUSED)
"""Files that are run without and with the option for exact products too."""
OPENVINO = {
    "OpenVINO float32": (REFERENCE, "f32"),
    "OpenVINO bfloat16": (REFERENCE, "bf16"),
    "OpenVINO int8, QDQ": (QDQ, "f32"),
    "OpenVINO int8, QDQ, rest bfloat16": (QDQ, "bf16"),
    "OpenVINO int8 w7, QDQ": (QDQ_W7, "f32"),
    "OpenVINO int8 w7, QDQ, rest bfloat16": (QDQ_W7, "bf16"),
    "OpenVINO int8 +res+attn, QDQ": (QDQ_ALL, "f32"),
    "OpenVINO int8 +res+attn, QDQ, rest bfloat16": (QDQ_ALL, "bf16"),
}
"""Contestant -> the file that it runs, and the precision of what is not int8."""
MODELS = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224")


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "machine": machine.describe() | {"int8_saturates": machine.int8_saturates()},
        "threads": options.threads,
        "rounds": options.rounds,
        "models": {},
    }
    saturates = "saturate" if report["machine"]["int8_saturates"] else "are exact"
    print(
        f"{report['machine']['processor']} (int8 products {saturates}), {options.threads} threads, "
        f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            report["models"][name] = measure(name, Path(folder), options)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 8))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--scheme", default="w8a8-tt")
    parser.add_argument("--operators", action="store_true", help="also print where the time goes")
    parser.add_argument("--json", help="also write everything to this file")
    return parser.parse_args()


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    size = model.pretrained_cfg["input_size"]
    images = torch.randn(8, *size)
    files, quantized = write_files(model, images, folder / name, Scheme.parse(options.scheme))
    result: dict[str, Any] = {
        "files": {
            label: {"mb": path.stat().st_size / 1e6, "nodes": node_census(path)} for label, path in files.items()
        },
        "batches": {},
    }
    for batch in options.batches:
        runs = contestants(model, files, options.threads) | openvino_contestants(files, batch, size, options.threads)
        images = torch.randn(batch, *size)
        times, ratios = take_turns(runs, images, options.rounds), error_ratios(runs, model, quantized, images)
        result["batches"][batch] = print_table(name, batch, times, ratios)
        if options.operators:
            print_operators(files, torch.randn(batch, *size), options)
    for label, file in result["files"].items():
        print(f"  {label}: {file['mb']:.1f} MB, {file['nodes']}")
    return result


def write_files(
    model: torch.nn.Module, images: torch.Tensor, stem: Path, scheme: Scheme
) -> tuple[dict[str, Path], dict[str, torch.nn.Module]]:
    """Every form of the model as a file, the float one first; and what the quantized ones are exported from."""
    half_range = replace(scheme, weight_bits=7)
    schemes = {
        (QDQ, "qdq"): scheme,
        (FUSED, "onnxruntime"): scheme,
        (QDQ_W7, "qdq"): half_range,
        (FUSED_W7, "onnxruntime"): half_range,
        (FUSED_STREAM, "onnxruntime"): replace(scheme, residual=True),
        (QDQ_ALL, "qdq"): replace(scheme, residual=True, attention=True),
    }
    made = {each: quantize_static(model, [images], each) for each in dict.fromkeys(schemes.values())}
    files = {label: stem.with_suffix(f".{index}.onnx") for index, (label, _) in enumerate(schemes)}
    for (label, target), each in schemes.items():
        export_onnx(made[each], files[label], images, target=target)
    float_file, dynamic = stem.with_suffix(".float.onnx"), stem.with_suffix(".dynamic.onnx")
    export_onnx(model, float_file, images)
    write_dynamic(float_file, dynamic)
    sources = {label: made[each] for (label, _), each in schemes.items()}
    return {REFERENCE: float_file, DYNAMIC: dynamic} | files, sources


def contestants(model: torch.nn.Module, files: dict[str, Path], threads: int) -> dict[str, Run]:
    runs = {label: file_run(path, threads) for label, path in files.items()}
    for label in OPTIONAL:
        runs |= {f"{label}, {how}": optional_run(files[label], threads, how) for how in ("plain", "exact")}
    half = timm.create_model(model.default_cfg["architecture"]).eval().bfloat16()
    runs["PyTorch float32"] = model
    runs["PyTorch bfloat16"] = lambda images: half(images.bfloat16())
    return runs


def optional_run(path: Path, threads: int, how: str) -> Run:
    """A file without ("plain") or with the option for exact products, whatever this processor needs."""
    settings = session_settings(threads)
    for key, value in machine.EXACT_INT8.items():
        settings.add_session_config_entry(key, value if how == "exact" else "0")
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images.numpy()})


@torch.inference_mode()
def error_ratios(
    runs: dict[str, Run], model: torch.nn.Module, quantized: dict[str, torch.nn.Module], images: torch.Tensor
) -> dict[str, float]:
    """Contestant -> the error ratio of its file, for those that are exported from a quantized model."""
    original, ratios = model(images), {}
    wanted = {label: each(images) for label, each in quantized.items()}
    for contestant, run in runs.items():
        file = contestant.removesuffix(", plain").removesuffix(", exact")
        source = OPENVINO[contestant][0] if contestant in OPENVINO else file
        if source in wanted:
            agreement = Agreement()
            agreement.update(wanted[source], torch.tensor(run(images)[0]), original)
            ratios[contestant] = agreement.summary()["error_ratio"]
    return ratios


def openvino_contestants(files: dict[str, Path], batch: int, size: tuple[int, ...], threads: int) -> dict[str, Run]:
    """The float and the standard files in OpenVINO, where it is installed; in bfloat16 where the processor has it."""
    try:
        import openvino
    except ImportError:
        return {}
    runs: dict[str, Run] = {}
    has_bfloat16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for label, (file, precision) in OPENVINO.items():
        if precision == "bf16" and not has_bfloat16:
            continue
        graph = openvino.Core().read_model(files[file])
        graph.reshape([batch, *size])
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
        }
        request = openvino.compile_model(graph, "CPU", settings).create_infer_request()
        runs[label] = lambda images, request=request: request.infer({0: images.numpy()})
    return runs


def print_table(
    name: str, batch: int, times: dict[str, list[float]], ratios: dict[str, float]
) -> dict[str, dict[str, float]]:
    titles = ("", "median ms", "min ms", "images/s", f"speed, {REFERENCE} = 1", "error ratio")
    print(f"\n{name}, batch {batch}\n\n| {' | '.join(titles)} |\n{'|--' * len(titles)}|")
    rows = latency_rows(times, batch)
    for label, row in rows.items():
        speeds = f"{row['median_ms']:.1f} | {row['min_ms']:.1f} | {row['images_per_s']:.0f} | {row['ratio']:.2f}"
        error = "" if label not in ratios else f"{ratios[label]:.2g}"
        wrong = " (wrong)" if label in ratios and not ratios[label] <= ERROR_RATIO_LIMIT else ""
        print(f"| {label} | {speeds} | {error}{wrong} |", flush=True)
    return {label: row | {"error_ratio": ratios[label]} if label in ratios else row for label, row in rows.items()}


def print_operators(files: dict[str, Path], images: torch.Tensor, options: argparse.Namespace) -> None:
    columns = {label: operator_times(path, images, options) for label, path in files.items()}
    operators = sorted(
        {op for column in columns.values() for op in column}, key=lambda op: -columns[REFERENCE].get(op, 0)
    )
    print(f"\n| ms | {' | '.join(columns)} |\n|--|{'--|' * len(columns)}")
    for op in [*operators, None]:
        cells = [sum(column.values()) if op is None else column.get(op, 0.0) for column in columns.values()]
        print(f"| {op or 'all'} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")


def operator_times(path: Path, images: torch.Tensor, options: argparse.Namespace) -> dict[str, float]:
    """Operator -> milliseconds, from onnxruntime's profile."""
    session_options = session_settings(options.threads)
    session_options.enable_profiling = True
    session_options.profile_file_prefix = str(path)
    session = onnxruntime.InferenceSession(path, session_options, providers=["CPUExecutionProvider"])
    for _ in range(options.rounds):
        session.run(None, {INPUT: images.numpy()})
    shortest: dict[tuple[str, str], float] = defaultdict(lambda: float("inf"))
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            key = event["args"]["op_name"], event["name"]
            shortest[key] = min(shortest[key], event["dur"] / 1e3)
    totals: dict[str, float] = defaultdict(float)
    for (operator, _), milliseconds in shortest.items():
        totals[operator] += milliseconds
    return dict(totals)


if __name__ == "__main__":
    main()
