"""A GPU's first hour: everything that only a GPU can show, in four parts that each keep what they have.

    python benchmarks/gpu_report.py                        # all parts, into gpu_report/: `make gpu`
    python benchmarks/gpu_report.py --parts a b            # and later: --parts c d
    PYTHONPATH=. python benchmarks/gpu_report.py --data-dir photos   # where nothing can be installed

(a) the tests marked gpu; (b) speed and memory of a training step: bfloat16, native FP8, Transformer Engine, without and
with TWEO, eager and compiled; (c) trainings by train.py, and native against emulated FP8; (d) int8 and float16 of what
was trained. It is planned to take less than 15 minutes on one H100, which nobody has measured yet: a part begins
nothing new when its time is used up. Every result is kept at once in results.jsonl; the same command again measures
what is missing, what failed and what was not run. report.md and report.json say what was not run, and why.

It needs this source tree, torch and timm. The photographs of part (c) come from scikit-image and scikit-learn; where
these are missing, a folder made elsewhere takes their place. Where there is no GPU, models are tiny: that tests this
program and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what is measured is this tree

import torch

from benchmarks.gpu.environment import describe
from benchmarks.gpu.ledger import FAILED, Ledger, Part
from benchmarks.gpu.plan import Plan, gpu_plan, tiny_plan
from benchmarks.gpu.table import PARTS, markdown
from tweo_timm.outputs import Outputs

LETTERS = [part.LETTER for part in PARTS]


def main(argv: list[str] | None = None) -> int:
    """Measure what has no result yet, and write the report.

    Returns:
        0, 1 if something failed, 2 for a folder that holds results of other machines, versions or settings.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=LETTERS, default=LETTERS, help="which parts (all)")
    parser.add_argument("--output", type=Path, default=Path("gpu_report"), metavar="DIR", help="where everything goes")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="photograph crops made by tweo_timm.photos")
    parser.add_argument("--train-seconds", type=float, default=20, metavar="S", help="of each of 8 trainings (20)")
    parser.add_argument("--tiny", action="store_true", help="tiny models; always so without a GPU")
    options = parser.parse_args(argv)
    plan = make_plan(options)
    if plan.device == "cpu":  # models this small: threads wait more than they work
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    plan.output.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(plan.output / "results.jsonl")
    environment = {**describe(plan), "train_seconds": plan.train_s}
    try:
        ledger.claim(environment)
    except ValueError as error:
        print(f"gpu_report: {error}", file=sys.stderr)
        return 2
    try:
        for part in PARTS:
            if part.LETTER in options.parts:
                limit = plan.limits_s[part.LETTER]
                part.measure_part(Part(part.LETTER, ledger, limit, environment["revision"]), plan)
    finally:
        write_report(ledger, plan.output)
    return int(any(row["status"] == FAILED for row in ledger.rows()))


def make_plan(options: argparse.Namespace) -> Plan:
    """Return what to do on this machine."""
    on_gpu = torch.cuda.is_available()
    if on_gpu and not options.tiny:
        return gpu_plan(options.output, options.data_dir, options.train_seconds)
    return tiny_plan(options.output, options.data_dir, "cuda" if on_gpu else "cpu")


def write_report(ledger: Ledger, folder: Path) -> None:
    """Write report.md and report.json from what is known so far."""
    rows = ledger.rows()
    text = markdown(rows)
    Outputs(folder).write("report.md", text)
    Outputs(folder).write("report.json", json.dumps(rows, indent=1))
    print(f"\n{text}\nWritten: {folder}/report.md, report.json", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
