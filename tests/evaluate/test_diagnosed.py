"""Quantization, export and diagnoses in a report: complete, and what fails costs itself alone."""

import argparse
import json

import pytest
import timm
import torch

from tests.evaluate.conftest import make_model, run
from tests.models import VIT, VIT_ARCH
from tweo_timm.evaluate.cli import main
from tweo_timm.media import markdown, one_line
from tweo_timm.quant.onnx_file import OnnxModel


def test_a_model_without_blocks_keeps_its_record_when_all_sites_are_wanted(capsys, common, tmp_path):
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "weights.pth")
    words = ["--checkpoint", tmp_path / "weights.pth", "--model", "resnet10t", "--num-classes", 3, "--img-size", 32]
    status, result, err = run(capsys, *words, "--sites", "all", *common)
    assert status == 0, err
    assert "top1" in result


def test_quantized_and_diagnosed_report_is_complete(capsys, checkpoints, common, tmp_path):
    words = ["--quantize", "w8a8-tt", "w4a4-ck+res", "--calibration-images", 8, "--sites", "all"]
    words += ["--stethoscope", "--colinearity", "--fp8-readiness", "--report", tmp_path / "r"]
    status, _, err = run(capsys, "--checkpoint", *checkpoints, *common, *words)
    assert status == 0, err
    record = json.loads((tmp_path / "r" / "report.json").read_text())["checkpoints"][0]
    assert [entry["scheme"] for entry in record["quantized"]] == ["w8a8-tt", "w4a4-ck+res"]
    assert record["quantized"][0]["calibration"] == {"split": "train", "images": 8, "seed": 42, "method": "absmax"}
    assert record["quantized"][0]["fidelity"]["relative_error"] < record["quantized"][1]["fidelity"]["relative_error"]
    markdown = (tmp_path / "r" / "report.md").read_text()
    for heading in ("Stethoscope", "Colinearity", "FP8 readiness", "ten sites"):
        assert heading in markdown, heading
    assert {"quantized.png", "colinearity.png"} <= {path.name for path in (tmp_path / "r").iterdir()}


def test_exported_files_are_run_timed_and_reported(capsys, checkpoints, common, tmp_path, monkeypatch):
    monkeypatch.setattr("tweo_timm.quant.latency.ROUNDS", 1)
    words = ["--quantize", "w8a8-tt", "--calibration-images", 8, "--export", "onnx", "--report", tmp_path / "r"]
    status = main([str(word) for word in ("--checkpoint", checkpoints[0], *common, *words)])
    out, err = capsys.readouterr()
    assert status == 0, err
    record = json.loads((tmp_path / "r" / "report.json").read_text())["checkpoints"][0]
    (float_file,) = record["exported"]["files"]
    assert float_file["top1"] == pytest.approx(record["top1"], rel=1e-6)
    assert record["exported"]["latency"] == []
    exported = record["quantized"][0]["exported"]
    assert exported["top1"] == pytest.approx(record["quantized"][0]["top1"], rel=1e-6)
    assert (tmp_path / "r" / "base.w8a8-tt.onnx").stat().st_size > 0
    assert [entry["batch"] for entry in exported["latency"]] == [1, 4]
    row = exported["latency"][1]["rows"][1]
    threads = exported["latency"][1]["threads"]
    cells = ["w8a8-tt", "4", str(threads), "1", "dynamic int8 ONNX", f"{row['median_ms']:.2f}", f"{row['min_ms']:.2f}"]
    cells += [f"{row['p99_ms']:.2f}", f"{row['size_mb']:.3g}", f"{row['images_per_s']:.1f}", f"{row['ratio']:.2f}"]
    for text in (out.split("--result\n")[0], (tmp_path / "r" / "report.md").read_text()):
        assert "base.w8a8-tt.onnx" in text
        assert f"| {' | '.join(cells)} |" in text


def test_a_file_that_cannot_be_written_costs_no_measurement(capsys, checkpoints, common, tmp_path):
    (tmp_path / "r" / "base.w8a8-tt.onnx").mkdir(parents=True)
    words = ["--quantize", "w8a8-tt", "--calibration-images", 8, "--export", "onnx", "--report", tmp_path / "r"]
    status, result, err = run(capsys, "--checkpoint", checkpoints[0], *common, *words)
    assert status == 1
    assert "--export onnx, base w8a8-tt:" in err
    record = json.loads((tmp_path / "r" / "report.json").read_text())["checkpoints"][0]
    assert record["exported"]["files"]
    entry = record["quantized"][0]
    assert entry["top1"] >= 0
    assert "exported" not in entry
    assert markdown(one_line(entry["not_exported"])) in (tmp_path / "r" / "report.md").read_text()
    assert result["top1"] == pytest.approx(record["top1"], abs=1e-3)


def test_a_file_that_computes_something_else_is_wrong_by_status_message_and_table(
    capsys, checkpoints, common, tmp_path, monkeypatch
):
    monkeypatch.setattr("tweo_timm.quant.latency.ROUNDS", 1)
    right = OnnxModel.forward
    monkeypatch.setattr(OnnxModel, "forward", lambda self, images: -right(self, images))
    words = ["--quantize", "w8a8-tt", "--calibration-images", 8, "--export", "onnx", "--report", tmp_path / "r"]
    status = main([str(word) for word in ("--checkpoint", checkpoints[0], *common, *words)])
    out, err = capsys.readouterr()
    assert status == 1
    markdown = (tmp_path / "r" / "report.md").read_text()
    for file in ("base.float32.onnx", "base.w8a8-tt.onnx", "base.w8a8-tt.onnxruntime.onnx"):
        (message,) = [line for line in err.splitlines() if f"{file} is off" in line]
        assert message.startswith(f"validate.py: error: --export onnx, base: {file}")
        assert message.removeprefix("validate.py: error: ") in markdown
    for text in (out, markdown):
        assert text.count("| wrong |") == 3
        assert text.count("| qdq (wrong) |") == 2  # one per batch


def test_reports_from_before_exports_were_timed_are_still_read(capsys, checkpoints, common, tmp_path):
    assert run(capsys, "--checkpoint", checkpoints[0], *common, "--export", "onnx", "--report", tmp_path / "a")[0] == 0
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    exported = report["checkpoints"][0]["exported"]
    del exported["latency"], exported["files"][0]["fault"]
    (tmp_path / "a" / "report.json").write_text(json.dumps(report))
    words = ["--compare-reports", tmp_path / "a" / "report.json", "--report", tmp_path / "b"]
    assert run(capsys, *words)[0] == 0
    markdown = (tmp_path / "b" / "report.md").read_text()
    assert "base.float32.onnx" in markdown
    assert "Latency" not in markdown


def test_diagnosis_that_a_model_does_not_allow_is_reported_and_loses_nothing(capsys, common, tmp_path):
    model = timm.create_model("resnet10t", num_classes=3)
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    words = ["--model", "resnet10t", "--num-classes", 3, "--img-size", 32, "--colinearity", "--report", tmp_path / "r"]
    status, _, err = run(capsys, "--checkpoint", path, *words, *common)
    assert status == 0, err
    record = json.loads((tmp_path / "r" / "report.json").read_text())["checkpoints"][0]
    assert "refused" in record["colinearity"]
    assert "No colinearity" in (tmp_path / "r" / "report.md").read_text()


def collapsed(checkpoints, folder):
    """A checkpoint like the first one, whose last block overflows: its weights are finite, its outputs are not."""
    content = torch.load(checkpoints[0], weights_only=False)
    weights = {name: value.clone() for name, value in content["state_dict"].items()}
    weights["blocks.1.mlp.fc1.bias"].fill_(1e20)
    weights["blocks.1.mlp.fc2.weight"].fill_(1e30)
    folder.mkdir()
    torch.save(content | {"state_dict": weights}, folder / "last.pth.tar")
    return folder / "last.pth.tar"


def test_a_model_that_collapsed_is_reported_beside_one_that_did_not(capsys, checkpoints, common, tmp_path):
    paths = [collapsed(checkpoints, tmp_path / "nan"), checkpoints[0]]
    words = ["--quantize", "w8a8-tt", "--calibration-images", 8, "--report", tmp_path / "r"]
    status, results, err = run(capsys, "--checkpoint", *paths, *common, *words)
    assert status == 1
    assert "--quantize w8a8-tt is not possible for nan" in err
    assert [result["peak_abs"] is None for result in results] == [True, False]
    records = json.loads((tmp_path / "r" / "report.json").read_text())["checkpoints"]
    assert [len(record["quantized"]) for record in records] == [0, 1]
    assert "w8a8-tt" in records[0]["not_quantized"]
    assert "--quantize w8a8-tt is not possible for nan" in (tmp_path / "r" / "report.md").read_text()
    assert {"histogram.png", "peak_per_block.png"} <= {path.name for path in (tmp_path / "r").iterdir()}


def test_a_bad_checkpoint_does_not_keep_the_others_from_being_measured(capsys, checkpoints, common, tmp_path):
    bad = tmp_path / "bad.pth.tar"
    bad.write_bytes(b"PK no checkpoint")
    status, result, err = run(capsys, "--checkpoint", bad, checkpoints[1], *common)
    assert status == 1
    assert "bad.pth.tar" in err
    assert result["name"] == "tweo"


@pytest.mark.parametrize("more", [["--no-prefetcher"], ["--stethoscope", "--quantize", "w8a8-tt"]], ids=" ".join)
def test_a_model_for_grey_images_needs_no_mean_of_its_own(capsys, common, tmp_path, more):
    path = tmp_path / "last.pth.tar"
    args = argparse.Namespace(num_classes=3, in_chans=1, model_kwargs=VIT)
    torch.save({"arch": VIT_ARCH, "args": args, "state_dict": make_model(0, in_chans=1).state_dict()}, path)
    status, result, err = run(capsys, "--checkpoint", path, "--img-size", 32, *common, *more)
    assert status == 0, err
    assert result["img_size"] == 32


def test_diagnoses_and_quantization_take_a_model_in_half_precision(capsys, checkpoints, common, tmp_path):
    words = ["--model-dtype", "bfloat16", "--stethoscope", "--colinearity", "--quantize", "w8a8-tt"]
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], *common, *words, "--report", tmp_path / "r")
    assert status == 0, err
    record = json.loads((tmp_path / "r" / "report.json").read_text())["checkpoints"][0]
    assert "refused" not in record["stethoscope"]
    assert record["quantized"]


def test_a_model_in_half_precision_is_exported_from_batches_that_timm_leaves_in_float32(
    capsys, checkpoints, common, tmp_path
):
    pytest.importorskip("onnxruntime")
    words = ["--model-dtype", "bfloat16", "--no-prefetcher", "--export", "onnx", "--report", tmp_path / "r"]
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], *common, *words)
    assert status == 0, err
    assert list((tmp_path / "r").glob("*.onnx"))


def test_named_blocks_are_those_of_every_diagnosis(capsys, checkpoints, common, tmp_path):
    words = ["--tweo-blocks", r"blocks\.1", "--stethoscope", "--report", tmp_path / "r"]
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], *common, *words)
    assert status == 0, err
    record = json.loads((tmp_path / "r" / "report.json").read_text())["checkpoints"][0]
    assert [block["name"] for block in record["blocks"]] == ["blocks.1"]
    assert "blocks.0" not in json.dumps(record["stethoscope"])


def test_what_the_diagnoses_say_are_sentences(capsys, checkpoints, common, tmp_path):
    words = ["--stethoscope", "--colinearity", "--fp8-readiness", "--report", tmp_path]
    assert run(capsys, "--checkpoint", checkpoints[0], *common, *words)[0] == 0
    prose = [line for line in (tmp_path / "report.md").read_text().splitlines() if line and line[0] not in "|#!*-`"]
    for line in prose:
        for sentence in line.rstrip(".").split(". "):
            assert not sentence[0].islower(), line
        assert line.endswith("."), line


def test_what_large_activations_are_worth_is_in_the_report(capsys, checkpoints, common, tmp_path):
    words = ["--zero-outliers", 0.5, 4, "--report", tmp_path]
    assert run(capsys, "--checkpoint", checkpoints[0], *common, *words)[0] == 0
    record = json.loads((tmp_path / "report.json").read_text())["checkpoints"][0]
    whole, half, four = record["zero_outliers"]
    assert (whole["k"], half["k"], four["k"]) == (0, 0.5, 4)
    assert (whole["score"], whole["loss"]) == (record["top1"], pytest.approx(record["loss"], rel=1e-6))
    assert abs(half["loss"] - whole["loss"]) > abs(four["loss"] - whole["loss"])
    assert "| 50 % |" in (tmp_path / "report.md").read_text()
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], *common, "--zero-outliers", 1.5)
    assert status == 1
    assert "--zero-outliers 1.5 is no number of elements" in err
