"""fp16 and fp8 as schemes of --quantize."""

import json

from tests.evaluate.conftest import run


def test_a_report_has_the_formats_and_what_saturated(capsys, checkpoints, common, tmp_path):
    words = ["--checkpoint", checkpoints[0], *common, "--quantize", "fp16", "fp8-unit", "--calibration-images", "8"]
    assert run(capsys, *words, "--report", tmp_path)[0] == 0
    half, float8 = json.loads((tmp_path / "report.json").read_text())["checkpoints"][0]["quantized"]
    assert half["fidelity"]["relative_error"] < 5e-3
    assert "saturated" not in half
    assert float8["saturated"]["values"] == 0
