"""Write the exact bits of runs and reports, to compare two revisions on one machine, in one session:

    OMP_NUM_THREADS=1 python -m tests.photograph.bits before.json
    OMP_NUM_THREADS=1 python -m tests.photograph.bits after.json
    python -m tests.photograph.bits --compare before.json after.json

Bits differ between processors and releases of torch, so none are committed: tests/photograph/test_weights.py holds
rounded numbers instead. Of every run of `SCENARIOS` the file holds a hash of each tensor in the last checkpoint
(weights, average, optimizer, random states, FP8 scales), its other entries, and the rows of its tables; of validations
of two of them each number in report.json and scales.json. Left out: the options (photographed by test_commands.py),
paths, versions and times.
"""

import argparse
import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch

from tests.images import write_images
from tests.photograph.runs import SCENARIOS, take, trained

TABLES = ("summary.csv", "outliers.jsonl", "fp8_health.jsonl")
VALIDATED = {
    "vit-tweo-averaged": ["--use-ema", "--quantize", "w8a8-tt", "w8a8-ct+res", "--export", "onnx"],
    "swin-tweo-fp8": ["--quantize", "w4a4-ck+res", "w4a4-tt+qwt"],
}
DIAGNOSES = ["--sites", "all", "--stethoscope", "--colinearity", "--fp8-readiness"]
VALIDATION = ["--device", "cpu", "-j", "0", "-b", "4", "--calibration-images", "8"]
# Of a moment or a place. An exported file's bytes hold the version of its exporter.
PASSING = {"args", "checkpoint", "command", "made", "versions", "latency", "path", "size_mb"}


def flat(value, name=""):
    """Every leaf of a nested value by its path: a tensor as hash, everything else as text."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {name: bits(value) if isinstance(value, torch.Tensor) else repr(value)}
    leaves = {}
    for key, item in items:
        if key not in PASSING:
            leaves |= flat(item, f"{name}/{key}")
    return leaves


def bits(tensor):
    """dtype, shape and the beginning of SHA-256 of the elements."""
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()[:16]}"


def bits_of_run(folder):
    found = flat(torch.load(folder / "last.pth.tar", weights_only=False), "last.pth.tar")
    for path in (folder / name for name in TABLES):
        lines = path.read_text().splitlines() if path.exists() else []
        found |= {f"{path.name}/{number}": line for number, line in enumerate(lines)}
    return found


def bits_of_validation(folder, words, images, out):
    words = ["--checkpoint", str(folder / "last.pth.tar"), "--data-dir", str(images), *VALIDATION, *words, *DIAGNOSES]
    ended = take("validate.py", [*words, "--report", str(out)])
    assert ended.status == 0, ended.err
    found = {}
    for path in (out / "report.json", *sorted(out.glob("*.scales.json"))):
        found |= flat(json.loads(path.read_text().replace(str(out), "")), path.name)
    text = (out / "report.csv").read_text()
    return found | {f"report.csv/{number}": line for number, line in enumerate(text.splitlines())}


def photograph():
    """Every scenario's leaves: name of the run -> path -> bits."""
    torch.set_num_threads(1)
    made = {"machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}}
    made["machine"] |= {"capability": torch.backends.cpu.get_cpu_capability(), "node": platform.node()}
    with tempfile.TemporaryDirectory() as root:
        out = Path(root)
        images = write_images(out / "images", train=40, val=12)
        for scenario in SCENARIOS:
            made[scenario] = bits_of_run(trained(scenario, images, out / "runs"))
        for name, words in VALIDATED.items():
            report = out / "reports" / name
            made[f"report of {name}"] = bits_of_validation(out / "runs" / name, words, images, report)
    return made


def compare(before, after):
    """Lines that say what differs, is new, or is gone; none if nothing."""
    if before["machine"] != after["machine"]:
        return [f"of two machines, whose bits say nothing: {before['machine']} and {after['machine']}"]
    lines = []
    for run in before | after:
        old, new = before.get(run, {}), after.get(run, {})
        for path in old | new:
            if old.get(path) != new.get(path):
                lines.append(f"{run} {path}: {old.get(path, 'not there')} -> {new.get(path, 'gone')}")
    return lines


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.photograph.bits")
    parser.add_argument("out", nargs="?", type=Path, help="JSON file to write")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="two files to compare")
    args = parser.parse_args()
    if args.out:
        args.out.write_text(json.dumps(photograph(), indent=0))
    if not args.compare:
        return 0
    before, after = (json.loads(path.read_text()) for path in args.compare)
    lines = compare(before, after)
    print("\n".join(lines) if lines else f"equal: {sum(map(len, before.values()))} bits of {len(before) - 1} runs")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
