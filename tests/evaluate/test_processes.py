"""validate.py in two processes gives what it gives in one, although 21 images do not divide by two."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tweo_timm.evaluate.cli import main

REPOSITORY = Path(__file__).parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_report_what_one_does(checkpoints, photos, tmp_path):
    words = ["--checkpoint", str(checkpoints[0]), "--data-dir", str(photos), "--device", "cpu", "-j", "0", "-b", "4"]
    words += ["--sites", "all", "--quantize", "w8a8-tt", "--calibration-images", "8"]
    assert main([*words, "--report", str(tmp_path / "one")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = [*launcher, str(REPOSITORY / "validate.py"), *words, "--report", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    one, two = (json.loads((tmp_path / name / "report.json").read_text())["checkpoints"][0] for name in ("one", "two"))
    assert two["correct"] == one["correct"]
    assert two["data"] == one["data"]
    assert (two["top1"], two["peak_abs"], two["peak_block"]) == (one["top1"], one["peak_abs"], one["peak_block"])
    for mine, theirs in zip([*two["blocks"], *two["sites"]], [*one["blocks"], *one["sites"]], strict=True):
        for key in ("mean_abs", "kurtosis", "p999_abs", "count", "share_of_images_above_448"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-6), (mine["name"], key)
        assert mine["peak_abs"] == theirs["peak_abs"]
    assert two["quantized"][0]["correct"] == one["quantized"][0]["correct"]
