"""What TWEO costs in memory: the largest resident set of a whole run of train.py with it, against one without.

    python benchmarks/train_memory.py                        # both workloads, on 2 cores under ten minutes
    python benchmarks/train_memory.py --workload quickstart

Every run is a process of its own, which the kernel measures from its start to its end: loading data, validation and
checkpoints included. Runs take turns, round by round: `off` (TWEO off, nothing watched), `watched` (TWEO off, the
statistics of outliers that train.py keeps by default) and `on`. Printed: the median of each, its ratio to the median of
`off`, and the smallest and largest. What Python, torch and timm take before a model is there is part of all of them: it
is printed as `imports`, and the last column is the ratio of what comes on top of it.

glibc adapts to what was freed the size from which it gives memory back at once, and what a process keeps then varies by
several percent from run to run. The size is fixed here, at glibc's initial one, which leaves a few tenths of a
percent; --adaptive-malloc measures runs as they are.

Target: `on` at most 1.01 of `off`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tweo_timm.photos import write_photo_crops

REPOSITORY = Path(__file__).parents[1]
WORKLOADS = {
    "vit_small_patch16_224": [
        *("--model", "vit_small_patch16_224", "-b", "16", "--amp", "--amp-dtype", "bfloat16", "--opt", "adamw"),
        *("--num-classes", "14", "-j", "0", "--warmup-epochs", "0", "--epochs", "1"),
    ],
    "quickstart": ["-c", str(REPOSITORY / "recipes" / "quickstart_stress.yaml"), "--epochs", "2"],
}
ARMS = {
    "off": ["--tweo-weight", "0", "--outlier-interval", "0"],
    "watched": ["--tweo-weight", "0"],
    "on": ["--tweo-weight", "0.01"],
}
TARGET = 1.01
FIXED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
KIB_PER_MIB = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=[*WORKLOADS, "all"], default="all")
    parser.add_argument("--crops", type=int, default=4, help="training images of each of the 14 photographs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--adaptive-malloc", action="store_true", help="glibc's own way, with its luck")
    arguments = parser.parse_args()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | ({} if arguments.adaptive_malloc else FIXED_MALLOC)
    print(f"{'workload':24}{'arm':9}{'peak MiB':>10}{'ratio':>8}{'smallest':>10}{'largest':>9}{'on top':>8}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = write_photo_crops(folder / "photos", train=arguments.crops, validation=1)
        for workload in WORKLOADS if arguments.workload == "all" else [arguments.workload]:
            words = [*WORKLOADS[workload], "--data-dir", str(photos), "--device", "cpu"]
            report(workload, measure(words, arguments.rounds, folder, environment))
    print(f"target for `on`: {TARGET}")


def measure(words: list[str], rounds: int, folder: Path, environment: dict[str, str]) -> dict[str, list[float]]:
    """Return the largest resident set in MiB of every run, by arm; `imports` is a program that only imports."""
    program = "from tweo_timm.train import cli, loop"
    found = {"imports": [peak_mib(["-c", program], folder, environment)]}
    found |= {arm: [] for arm in ARMS}
    output = folder / "output"
    for _ in range(rounds):
        for arm, more in ARMS.items():
            run = [str(REPOSITORY / "train.py"), *words, *more, "--output", str(output), "--experiment", "run"]
            found[arm].append(peak_mib(run, folder, environment))
            shutil.rmtree(output)  # its checkpoints are large
    return found


def peak_mib(words: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Run Python with some words, and return its largest resident set; that of its loader processes is not added."""
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen([sys.executable, *words], env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}:\n{log.read()[-3000:]}")
    return usage.ru_maxrss / KIB_PER_MIB  # Linux counts in KiB


def report(workload: str, found: dict[str, list[float]]) -> None:
    (imports,), off = found["imports"], statistics.median(found["off"])
    print(f"{workload:24}{'imports':9}{imports:10.1f}")
    for arm in ARMS:
        median = statistics.median(found[arm])
        spread = f"{min(found[arm]):10.1f}{max(found[arm]):9.1f}"
        on_top = (median - imports) / (off - imports)
        print(f"{workload:24}{arm:9}{median:10.1f}{median / off:8.4f}{spread}{on_top:8.3f}", flush=True)


if __name__ == "__main__":
    main()
