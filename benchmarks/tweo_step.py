"""What TWEO costs: time and peak memory of a training step with it, against the same step without.

    python benchmarks/tweo_step.py [--repeats 15] [--threads 1] [--json FILE] [--model quickstart] [--device cpu]

Arms of one run: `off` (timm's ClassificationTask), `weight 0` (attached, measures only) and `on` (weight 0.01). They
take turns, in an order that rotates, so that whatever else the machine does hits all of them alike; on CPU the clock
counts this process's own seconds (--clock wall counts everybody's). Time is the median over the rounds of the ratio to
`off` in the same round, with the fastest turns compared beside it. Memory is the peak of what is allocated, parameters,
gradients and optimizer state included: exact on CPU (from the allocator's events), so two steps are enough.

Targets: time at most 1.05 and peak memory at most 1.01 of `off`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import timm
import torch
from timm.task import ClassificationTask
from torch import nn

from tweo_timm import TweoConfig, attach_tweo

MODELS = {
    "vit_small_patch16_224": ({}, 16, 224),
    "quickstart": ({"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4}, 32, 32),
}
ARMS = {"off": None, "weight 0": TweoConfig(weight=0.0), "on": TweoConfig(weight=0.01)}
TARGETS = {"time": 1.05, "memory": 1.01}


def build_step(model_name: str, config: TweoConfig | None, device: torch.device) -> Callable[[], None]:
    """Return a function that does one training step: forward under bfloat16 autocast, backward, AdamW."""
    kwargs, batch_size, img_size = MODELS[model_name]
    torch.manual_seed(0)
    arch = "vit_tiny_patch16_224" if model_name == "quickstart" else model_name
    model = timm.create_model(arch, num_classes=100, **kwargs).to(device).train()
    task = ClassificationTask(model, nn.CrossEntropyLoss(), device=device, verbose=False)
    if config is not None:
        attach_tweo(task, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    targets = torch.randint(0, 100, (batch_size,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            result = task(images, targets)
        result["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


CLOCKS = {"own": time.process_time, "wall": time.perf_counter}


def seconds(step: Callable[[], None], calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        step()
    return (clock() - start) / calls


def peak_bytes(model_name: str, config: TweoConfig | None, device: torch.device) -> int:
    """The largest number of bytes allocated at once, from building the model to the end of its second step."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step = build_step(model_name, config, device)
        step()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step = build_step(model_name, config, device)
        step()
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def measure(
    model_name: str, repeats: int, device: torch.device, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Return seconds, bytes and their ratios to `off`, by arm."""
    memory = {arm: peak_bytes(model_name, config, device) for arm, config in ARMS.items()}
    steps = {arm: build_step(model_name, config, device) for arm, config in ARMS.items()}
    warm = min(seconds(step, 2, clock) for step in steps.values())
    calls = max(1, round(0.2 / warm))  # a turn of at least a fifth of a second
    rounds: list[dict[str, float]] = []
    arms = list(ARMS)
    for turn in range(repeats):
        order = arms[turn % 3 :] + arms[: turn % 3]
        rounds.append({arm: seconds(steps[arm], calls, clock) for arm in order})
    return {
        arm: {
            "time_s": statistics.median(times[arm] for times in rounds),
            "time_ratio": statistics.median(times[arm] / times["off"] for times in rounds),
            "fastest_ratio": min(times[arm] for times in rounds) / min(times["off"] for times in rounds),
            "peak_bytes": memory[arm],
            "memory_ratio": memory[arm] / memory["off"],
        }
        for arm in ARMS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of all three arms")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, help="own: this process's seconds, the default on CPU; wall")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = args.clock or ("own" if args.device == "cpu" else "wall")
    found = {}
    print(
        f"torch {torch.__version__}, timm {timm.__version__}, {args.device}, {args.threads} thread(s), {clock} seconds"
    )
    print(f"{'model':24}{'arm':10}{'s/step':>10}{'time':>8}{'fastest':>9}{'peak MiB':>10}{'memory':>8}")
    for name in MODELS if args.model == "all" else [args.model]:
        found[name] = measure(name, args.repeats, torch.device(args.device), CLOCKS[clock])
        for arm, row in found[name].items():
            print(
                f"{name:24}{arm:10}{row['time_s']:10.4f}{row['time_ratio']:8.3f}{row['fastest_ratio']:9.3f}"
                f"{row['peak_bytes'] / 2**20:10.1f}{row['memory_ratio']:8.4f}"
            )
    print(f"targets for `on`: time {TARGETS['time']}, memory {TARGETS['memory']}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"torch": torch.__version__, "timm": timm.__version__, "models": found}, file, indent=2)


if __name__ == "__main__":
    main()
