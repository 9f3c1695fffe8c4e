"""Cost of FP8 emulation: a training step against plain bfloat16 autocast, and against torchao's emulation if installed.

    python benchmarks/fp8_step.py       # vit_small_patch16_224, batch 16
    python benchmarks/fp8_step.py --model vit_tiny_patch16_224 --img-size 64 --batch 4 --rounds 3

Contenders take turns within one process, so that a busy machine disturbs all of them; the time of each is its median
step, a ratio is against plain bfloat16. Memory is the growth of the peak resident set over one step, each contender in
a process of its own (`--memory`, Linux only). Cores shared with other work make the emulation look worse than it is: it
starts many short parallel operators, and each waits for the slowest core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import timm
import torch
import torch.nn.functional as F
from torch import nn

from tweo_timm import Fp8Recipe, patch_fp8
from tweo_timm.fp8.cast import E4M3, E5M2, round_to_fp8

CONTENDERS = ("bf16", "fp8_delayed", "fp8_current", "fp8_unit", "torchao_emulated")


def build(contender: str, options: argparse.Namespace) -> Callable[[], object]:
    """Return one training step (forward, backward) of the contender."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(options.model, img_size=options.img_size)
    if contender.startswith("fp8"):
        patch_fp8(model, Fp8Recipe(backend="emulated", scaling=contender.removeprefix("fp8_")))
    elif contender == "torchao_emulated":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        model = convert_to_float8_training(model, config=Float8LinearConfig(emulate=True))
    images = torch.randn(options.batch, 3, options.img_size, options.img_size)
    targets = torch.randint(0, 1000, (options.batch,))
    return partial(step, model, images, targets)


def step(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images), targets)
    loss.backward()
    model.zero_grad(set_to_none=True)


def timed(run: Callable[[], object], times: list[float]) -> None:
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)


def peak_memory_mib(contender: str, options: argparse.Namespace) -> float:
    """Return the growth of the resident set over one step, measured in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory_here, (contender, options))


def _peak_memory_here(contender: str, options: argparse.Namespace) -> float:
    torch.set_num_threads(options.threads)
    run = build(contender, options)
    before = _status_kib("VmRSS")
    # Not getrusage: its maximum survives exec, so a child starts at the size of its parent.
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    """Return a size from Linux's record of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def cast_times(options: argparse.Namespace) -> dict[str, float]:
    """Return nanoseconds an element of our rounding and of the cast to float8 and back, on one activation."""
    x, scale = torch.randn(options.batch * 197, 1536).bfloat16(), torch.tensor(1.7)
    times: dict[str, list[float]] = {}
    for _ in range(options.rounds + 1):
        for fmt in (E4M3, E5M2):
            timed(partial(round_to_fp8, x, scale, fmt), times.setdefault(f"round_{fmt.name}", []))
            trip = partial(float8_round_trip, x, scale, fmt)
            timed(trip, times.setdefault(f"float8_round_trip_{fmt.name}", []))
    return {name: median(values) / x.numel() * 1e9 for name, values in times.items()}


def float8_round_trip(x, scale, fmt):
    return (x.float() * scale).clamp(-fmt.max, fmt.max).to(fmt.dtype).to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6, help="timed steps of each contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, in one process a contender")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    runs = {}
    for contender in dict.fromkeys(["bf16", *options.contenders]):
        try:
            runs[contender] = build(contender, options)
        except ImportError as error:
            print(f"{contender}: not run, {error}")
    times: dict[str, list[float]] = {contender: [] for contender in runs}
    for round_index in range(options.rounds + 1):
        for contender, run in runs.items():
            timed(run, times[contender] if round_index else [])  # the first round warms up
    memory = {contender: peak_memory_mib(contender, options) for contender in runs} if options.memory else {}

    record = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), **vars(options), "steps": {}}
    print(
        f"{options.model}, {options.img_size} px, batch {options.batch}, {options.threads} threads, "
        f"torch {torch.__version__}"
    )
    for contender, values in times.items():
        row = {"time_s": median(values), "time_ratio": median(values) / median(times["bf16"])}
        if memory:
            row |= {"memory_mib": memory[contender], "memory_ratio": memory[contender] / memory["bf16"]}
        record["steps"][contender] = row
        print(f"  {contender:18s}" + "  ".join(f"{key} {value:8.3f}" for key, value in row.items()))
    record["cast_ns_per_element"] = cast_times(options)
    print("  ns per element: " + ", ".join(f"{k} {v:.2f}" for k, v in record["cast_ns_per_element"].items()))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
