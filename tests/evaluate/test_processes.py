"""validate.py in two processes gives what it gives in one, although 21 images do not divide by two."""

import json

import pytest

from tests.processes import run_together
from tweo_timm.evaluate.cli import main


def test_two_processes_report_what_one_does(checkpoints, photos, tmp_path):
    words = ["--checkpoint", str(checkpoints[0]), "--data-dir", str(photos), "--device", "cpu", "-j", "0", "-b", "4"]
    words += ["--sites", "all", "--quantize", "w8a8-tt", "--calibration-images", "8"]
    assert main([*words, "--report", str(tmp_path / "one")]) == 0
    assert run_together(lambda: main([*words, "--report", str(tmp_path / "two")])) == [0, 0]
    one, two = (json.loads((tmp_path / name / "report.json").read_text())["checkpoints"][0] for name in ("one", "two"))
    assert two["correct"] == one["correct"]
    assert two["data"] == one["data"]
    assert (two["top1"], two["peak_abs"], two["peak_block"]) == (one["top1"], one["peak_abs"], one["peak_block"])
    for mine, theirs in zip([*two["blocks"], *two["sites"]], [*one["blocks"], *one["sites"]], strict=True):
        for key in ("mean_abs", "kurtosis", "p999_abs", "count", "share_of_images_above_448"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-6), (mine["name"], key)
        assert mine["peak_abs"] == theirs["peak_abs"]
    assert two["quantized"][0]["correct"] == one["quantized"][0]["correct"]


def test_an_export_by_two_processes_is_refused(checkpoints, photos, capfd):
    words = ["--checkpoint", str(checkpoints[0]), "--data-dir", str(photos), "--device", "cpu", "--export", "onnx"]
    assert run_together(lambda: main(words)) == [1, 1]
    assert "without torchrun" in capfd.readouterr().err
