"""Latency of one model as int8 and float ONNX files in onnxruntime, and in PyTorch, as ratios in one run.

    python benchmarks/onnx_latency.py --threads 2 --batches 1 8 --rounds 20

Weights are random: latency does not care. All contestants take turns in every round, each after a rest in which the
threads of the one before fall asleep and a run in which its own wake up. A ratio is the median over rounds of float32
onnxruntime's time over the contestant's in that round, so that a busy machine disturbs both sides. OpenVINO takes part
where it is installed.
`--operators` adds where the time goes: for each operator, the sum over its nodes of the shortest time seen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch

from tweo_timm.quant.export import export_onnx
from tweo_timm.quant.latency import Run, cpu_name, file_run, latency_rows, take_turns, write_dynamic
from tweo_timm.quant.ort import node_census
from tweo_timm.quant.static import quantize_static

REFERENCE = "onnxruntime float32"
QDQ, QDQ_ALL = "static int8, QDQ", "static int8 +res+attn, QDQ"
MODELS = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224")


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "threads": options.threads,
        "rounds": options.rounds,
        "models": {},
    }
    print(
        f"{report['cpu']}, {options.threads} threads, onnxruntime {onnxruntime.__version__}, torch {torch.__version__}"
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
    files = write_files(model, images, folder / name, options.scheme)
    result: dict[str, Any] = {
        "files": {
            label: {"mb": path.stat().st_size / 1e6, "nodes": node_census(path)} for label, path in files.items()
        },
        "batches": {},
    }
    for batch in options.batches:
        runs = contestants(model, files, options.threads) | openvino_contestants(files, batch, size, options.threads)
        times = take_turns(runs, torch.randn(batch, *size), options.rounds)
        result["batches"][batch] = print_table(name, batch, times)
        if options.operators:
            print_operators(files, torch.randn(batch, *size), options)
    for label, file in result["files"].items():
        print(f"  {label}: {file['mb']:.1f} MB, {file['nodes']}")
    return result


def write_files(model: torch.nn.Module, images: torch.Tensor, stem: Path, scheme: str) -> dict[str, Path]:
    """Every form of the model as a file; the float one first."""
    quantized = quantize_static(model, [images], scheme)
    with_stream = quantize_static(model, [images], f"{scheme}+res")
    with_all = quantize_static(model, [images], f"{scheme}+res+attn")
    labels = (REFERENCE, "dynamic int8", QDQ, "static int8, fused", "static int8 +res, fused", QDQ_ALL)
    files = {label: stem.with_suffix(f".{index}.onnx") for index, label in enumerate(labels)}
    float_file, dynamic, qdq, fused, fused_stream, qdq_all = files.values()
    export_onnx(model, float_file, images)
    export_onnx(quantized, qdq, images)
    export_onnx(with_all, qdq_all, images)
    export_onnx(quantized, fused, images, target="onnxruntime")
    export_onnx(with_stream, fused_stream, images, target="onnxruntime")
    write_dynamic(float_file, dynamic)
    return files


def contestants(model: torch.nn.Module, files: dict[str, Path], threads: int) -> dict[str, Run]:
    runs = {label: file_run(path, threads) for label, path in files.items()}
    half = timm.create_model(model.default_cfg["architecture"]).eval().bfloat16()
    runs["PyTorch float32"] = model
    runs["PyTorch bfloat16"] = lambda images: half(images.bfloat16())
    return runs


def openvino_contestants(files: dict[str, Path], batch: int, size: tuple[int, ...], threads: int) -> dict[str, Run]:
    """The float and the standard QDQ files in OpenVINO; nothing where it is not installed."""
    try:
        import openvino
    except ImportError:
        return {}
    chosen = {
        "OpenVINO float32": (REFERENCE, "f32"),
        "OpenVINO bfloat16": (REFERENCE, "bf16"),
        "OpenVINO int8, QDQ": (QDQ, "f32"),
        "OpenVINO int8, QDQ, rest bfloat16": (QDQ, "bf16"),
        "OpenVINO int8 +res+attn, QDQ": (QDQ_ALL, "f32"),
        "OpenVINO int8 +res+attn, QDQ, rest bfloat16": (QDQ_ALL, "bf16"),
    }
    runs: dict[str, Run] = {}
    for label, (file, precision) in chosen.items():
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


def print_table(name: str, batch: int, times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    print(f"\n{name}, batch {batch}\n\n| | median ms | min ms | images/s | speed, {REFERENCE} = 1 |\n|--|--|--|--|--|")
    rows = latency_rows(times, batch)
    for label, row in rows.items():
        speeds = f"{row['median_ms']:.1f} | {row['min_ms']:.1f} | {row['images_per_s']:.0f} | {row['ratio']:.2f}"
        print(f"| {label} | {speeds} |", flush=True)
    return rows


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
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = options.threads
    session_options.enable_mem_reuse = False
    session_options.enable_profiling = True
    session_options.profile_file_prefix = str(path)
    session = onnxruntime.InferenceSession(path, session_options, providers=["CPUExecutionProvider"])
    for _ in range(options.rounds):
        session.run(None, {"images": images.numpy()})
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
