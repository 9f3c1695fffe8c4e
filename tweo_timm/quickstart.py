"""The quickstart: four small trainings on real images, their comparison, and the pictures. `make quickstart` runs it.

Every step is a command that it prints before running it, so that each can be repeated by hand.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from tweo_timm import machine
from tweo_timm.photos import write_photo_crops

RUNS = ("healthy", "healthy_tweo", "stress", "stress_tweo")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, validate and compare; see `--help` for the choices.

    Args:
        argv: the words after the program's name; None takes the process's own.

    Returns:
        The exit status: 0 if every step succeeded.
    """
    parser = argparse.ArgumentParser(prog="tweo-quickstart", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("quickstart"), metavar="DIR", help="everything goes here")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="train every recipe once a seed")
    parser.add_argument("--fp8", action="store_true", help="train with emulated FP8")
    options = parser.parse_args(argv)
    started = time.monotonic()
    try:
        photos = write_photo_crops(options.output / "photos")
    except ValueError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    names = _train_all(photos, options)
    report = options.output / "report"
    checkpoints = [str(options.output / name / "last.pth.tar") for name in names]
    precision = ["--quantize", "w8a8-tt", "w8a8-tt+res", "w4a4-tt+res"] if len(options.seeds) == 1 else []
    loading = ["--data-dir", str(photos), "--device", "cpu", "--workers", "1"]
    run_command(["evaluate", "--checkpoint", *checkpoints, *loading, *precision, "--report", str(report)])
    _print_seeds(report / "report.csv", options.seeds)
    print(f"\nPictures and tables: {report}/  (start with {report}/report.md)")
    print(f"Run folders with summary.csv and outliers.jsonl: {options.output}/<run>/")
    print(f"Trained in {_precision(options.output / names[0])} on {_processor()}.")
    print(f"Done in {time.monotonic() - started:.0f} s, installation not counted.")
    return 0


def _train_all(photos: Path, options: argparse.Namespace) -> list[str]:
    """Train the four recipes once per seed; a run that is complete already is not repeated."""
    runs = [(seed, run) for seed in options.seeds for run in RUNS]
    names: list[str] = []
    began = time.monotonic()
    for done, (seed, run) in enumerate(runs):
        name = run + ("_fp8" if options.fp8 else "") + (f"_seed{seed}" if seed else "")
        names.append(name)
        left = f", about {(time.monotonic() - began) / done * (len(runs) - done):.0f} s left" if done else ""
        print(f"\nTraining {done + 1} of {len(runs)}{left}: {name}")
        words = ["--data-dir", str(photos), "--output", str(options.output)]
        words += ["--experiment", name, "--seed", str(seed), *(["--fp8", "emulated"] if options.fp8 else [])]
        run_command(["train", "-c", f"quickstart_{run}", *words, "--resume", "auto"])
    return names


def _precision(folder: Path) -> str:
    """The precision that a run trained in, from its args.yaml."""
    from tweo_timm.run.precision import precision_of  # loads torch, for which --help does not wait

    return precision_of(argparse.Namespace(**yaml.safe_load((folder / "args.yaml").read_text())))


def _processor() -> str:
    about = machine.describe()
    return f"{about['processor']}, {about['cores']} cores"


def run_command(words: list[str]) -> None:
    """Print and run one of our commands; a failure ends the quickstart with the command's own message and status."""
    shown = shlex.join(["python", "-m", f"tweo_timm.{words[0]}", *words[1:]])
    print(f"\n$ TIMM_FUSED_ATTN=0 OMP_NUM_THREADS=1 {shown}", flush=True)
    # Shapes this small: fused attention has a slow backward on CPUs, and threads wait more than they work.
    environment = {"TIMM_FUSED_ATTN": "0", "OMP_NUM_THREADS": "1", **os.environ}
    command = [sys.executable, "-m", f"tweo_timm.{words[0]}", *words[1:]]
    status = subprocess.run(command, env=environment, check=False).returncode
    if status:
        print(f"quickstart: this step failed with status {status}: {shown}", file=sys.stderr)
        raise SystemExit(status)


def _print_seeds(table: Path, seeds: Sequence[int]) -> None:
    """Print mean and spread of each recipe over the seeds, where there are several."""
    if len(seeds) < 2:
        return
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    print("\n| run | seeds | Top-1 %, mean (min to max) | training peak, mean (min to max) | peak, mean (min to max) |")
    print("|---|---|---|---|---|")
    families: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        families.setdefault(row["name"].split("_seed")[0], []).append(row)
    for family, members in families.items():
        cells = [_spread([float(row[key]) for row in members]) for key in ("top1", "training_peak_abs", "peak_abs")]
        print(f"| {family} | {len(members)} | " + " | ".join(cells) + " |")


def _spread(values: list[float]) -> str:
    return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    raise SystemExit(main())
