"""A model without a head, a backbone of DINOv2 say: its activations are measured, and nothing is scored."""

import argparse
import json

import pytest
import torch

from tests.evaluate.conftest import make_model, run, save_checkpoint
from tests.models import VIT, VIT_ARCH, as_words
from tweo_timm.outliers import record_outliers


def headless(path, **kwargs):
    """A checkpoint that says that it has no classes, and its weights alone."""
    model = make_model(0, **kwargs).eval()
    model.reset_classifier(0)
    args = argparse.Namespace(model=VIT_ARCH, num_classes=0, model_kwargs=VIT, input_size=[3, 32, 32], crop_pct=1.0)
    save_checkpoint(path / "backbone.pth.tar", model, args=args)
    torch.save(model.state_dict(), path / "weights.pth")
    return model


def test_it_has_no_top1_and_everything_else(capsys, common, tmp_path):
    model = headless(tmp_path)
    words = [*common, "--quantize", "w8a8-tt", "--calibration-images", 8, "--export", "onnx", "--fp8-readiness"]
    status, result, err = run(capsys, "--checkpoint", tmp_path / "backbone.pth.tar", *words, "--report", tmp_path / "r")
    assert status == 1  # because of the export, which is compared by its Top-1
    assert "the model has no head" in err
    assert (result["top1"], result["top1_err"], result["top5"]) == (None, None, None)
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    (record,) = report["checkpoints"]
    assert (record["loss"], record["correct"], record["quantized"][0]["top1"]) == (None, None, None)
    assert record["quantized"][0]["fidelity"]["top1_agreement"] is None
    assert 0 < record["quantized"][0]["fidelity"]["relative_error"] < 0.1
    assert "no classes to score" in report["verdict"]["lines"][0]
    with record_outliers(model) as recorder:
        model(torch.zeros(1, 3, 32, 32))
    assert [block["name"] for block in record["blocks"]] == [b["name"] for b in recorder.summary()["blocks"]]
    assert run(capsys, "--compare-reports", tmp_path / "r" / "report.json")[1]["top1"] is None


def test_weights_without_a_head_name_the_flag(capsys, common, tmp_path):
    headless(tmp_path)
    words = ["--model", VIT_ARCH, "--model-kwargs", *as_words(VIT)]
    status, _, err = run(capsys, *words, "--checkpoint", tmp_path / "weights.pth", *common)
    assert status == 1
    assert "A model without a head takes --num-classes 0" in err
    status, result, _ = run(capsys, *words, "--checkpoint", tmp_path / "weights.pth", *common, "--num-classes", 0)
    assert status == 0
    assert result["top1"] is None
    assert result["peak_abs"] > 0


@pytest.mark.parametrize("words", [["--task", "multilabel"], ["--real-labels", "real.json"]])
def test_what_is_about_classes_is_refused(words, capsys, common, tmp_path):
    headless(tmp_path)
    status, _, err = run(capsys, "--checkpoint", tmp_path / "backbone.pth.tar", *common, *words)
    assert status == 1
    assert words[0] in err
