"""Does training on with the penalty help where a rotation is not enough: the trained rows of docs/repair.md.

    python benchmarks/repair_training.py                                     # both starts, three seeds
    python benchmarks/repair_training.py --starts stressed --seeds 0 --output quickstart/repair_training

Two starts, trained in float32 on one thread: the quickstart's ViT at its stress rate, and the same ViT at the healthy
rate with 300 planted in its position embedding (seeded_outlier.py). Each is then left as it is, trained on for 504
updates, or trained on as recipes/repair.yaml says; and each of the three is measured with the stream in integers, as
it is and with a learned rotation. A run that has its report is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what is measured is this tree

from tweo_timm import machine
from tweo_timm.photos import write_photo_crops

REPOSITORY = Path(__file__).resolve().parents[1]
SCHEMES = ("w8a8-tt+res", "w8a8-tt+res+rot", "w4a4-tt+res", "w4a4-tt+res+rot")
STARTS = {"stressed": "quickstart_stress", "planted": "quickstart_healthy"}
ONWARDS = ("--epochs", "9", "--lr", "5e-3", "--min-lr", "2e-3", "--warmup-epochs", "0")
# What recipes/repair.yaml says, beside a recipe that knows the model and its images.
REPAIR = ("--tweo-weight=auto", "--kd-model-name=self", "--distill-loss-weight=1", "--task-loss-weight=1")
ARMS: dict[str, Sequence[str] | None] = {"as it was": None, "trained on": (), "repair training": REPAIR}


def main() -> None:
    """Train and measure what has no report yet, and print one table per start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("quickstart/repair_training"), metavar="DIR")
    options = parser.parse_args()
    write_photo_crops(options.output / "photos")
    for start in options.starts:
        rows = [(arm, seed, values) for seed in options.seeds for arm, values in _of(start, seed, options.output)]
        print(_table(start, options.seeds, rows), flush=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{(used.ru_utime + used.ru_stime) / 60:.0f} minutes of processor time, {machine.describe()['processor']}")


def _of(start: str, seed: int, output: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every arm of one start and seed, with what was measured."""
    base = output / f"{start}_{seed}"
    for arm, added in ARMS.items():
        folder = base if added is None else base.with_name(f"{base.name}_{arm.replace(' ', '_')}")
        if not (folder / "report" / "report.json").exists():
            _train(start, seed, folder, _planted(start, seed, output) if added is None else _onwards(base, added))
            words = ["--checkpoint", f"{folder}/last.pth.tar", *_loading(output), "--quantize", *SCHEMES]
            _run("evaluate", [*words, "--report", f"{folder}/report"])
        record = json.loads((folder / "report" / "report.json").read_text())["checkpoints"][0]
        yield (
            arm,
            {"peak": record["peak_abs"], "Top-1 %": record["top1"]}
            | {entry["scheme"]: entry["top1"] for entry in record["quantized"]},
        )


def _planted(start: str, seed: int, output: Path) -> list[str]:
    if start != "planted":
        return []
    path = output / f"seeded_{seed}.pth"
    line = [str(REPOSITORY / "benchmarks" / "seeded_outlier.py"), str(path), "--embedding", "--seed", str(seed)]
    subprocess.run([sys.executable, *line], env=_environment(), check=True)
    return ["--initial-checkpoint", str(path)]


def _onwards(base: Path, added: Sequence[str]) -> list[str]:
    return ["--initial-checkpoint", f"{base}/last.pth.tar", *ONWARDS, *added]


def _train(start: str, seed: int, folder: Path, words: Sequence[str]) -> None:
    where = ["--output", str(folder.parent), "--experiment", folder.name, "--seed", str(seed)]
    _run("train", ["-c", STARTS[start], *_loading(folder.parent), *where, "--no-amp", *words])


def _loading(output: Path) -> list[str]:
    return ["--data-dir", str(output / "photos"), "--device", "cpu", "--workers", "1"]


def _run(command: str, words: Sequence[str]) -> None:
    line = ["-m", f"tweo_timm.{command}", *words]
    print(f"$ TIMM_FUSED_ATTN=0 OMP_NUM_THREADS=1 {shlex.join(['python', *line])}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, *line], env=_environment(), stdout=subprocess.DEVNULL, check=True)


def _environment() -> dict[str, str]:
    # As in the quickstart: shapes this small gain nothing from fused attention and threads.
    return {**os.environ, "TIMM_FUSED_ATTN": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def _table(start: str, seeds: Sequence[int], rows: Sequence[tuple[str, int, dict[str, Any]]]) -> str:
    """Each value of each seed, and its mean in front."""
    columns = list(rows[0][2])
    lines = [
        f"| {start}, seeds {', '.join(map(str, seeds))} | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for arm in ARMS:
        mine = [values for name, _, values in rows if name == arm]
        lines.append(f"| {arm} | {' | '.join(_cell([values[column] for values in mine]) for column in columns)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"


if __name__ == "__main__":
    main()
