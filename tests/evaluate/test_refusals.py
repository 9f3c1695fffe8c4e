"""What validate.py cannot do, it says in one line that names the cause."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.evaluate.conftest import make_model, run, save_checkpoint
from tests.models import VIT_ARCH


def test_checkpoint_of_another_architecture_is_refused_by_name(capsys, checkpoints, common):
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], "--model", "swin_tiny_patch4_window7_224", *common)
    assert status == 1
    assert VIT_ARCH in err
    assert "leave out --model" in err
    assert "Traceback" not in err


def test_another_name_whose_weights_fit_is_validated_as_timm_does_with_a_word(capsys, checkpoints, common, caplog):
    top1 = run(capsys, "--checkpoint", checkpoints[0], *common)[1]["top1"]
    for name in (f"{VIT_ARCH}.augreg_in21k", "deit_tiny_patch16_224"):
        words = ["--mean", 0.5, "--std", 0.5, "--model", name]  # DeiT is of another mean
        status, result, err = run(capsys, "--checkpoint", checkpoints[0], *words, *common)
        assert status == 0, err
        assert (result["model"], result["top1"]) == (name, top1)
        assert f"trained as a {VIT_ARCH}, validated as the {name}" in caplog.text


def test_weights_that_do_not_fit_are_refused(capsys, common, tmp_path):
    wrong = save_checkpoint(tmp_path / "x" / "last.pth.tar", make_model(0, depth=3))
    status, _, err = run(capsys, "--checkpoint", wrong, *common)
    assert status == 1
    assert "do not fit" in err


@pytest.mark.parametrize("damage", ["truncate", "text", "missing"])
def test_damaged_and_missing_checkpoints_are_named(capsys, checkpoints, common, tmp_path, damage):
    path = tmp_path / "broken.pth.tar"
    if damage == "truncate":
        path.write_bytes(checkpoints[0].read_bytes()[:2000])
    elif damage == "text":
        path.write_text("not a checkpoint")
    status, _, err = run(capsys, "--checkpoint", path, *common)
    assert status == 1
    assert "broken.pth.tar" in err
    assert "Traceback" not in err


def test_ema_weights_are_used_where_there_are_any_and_else_the_plain_ones_with_a_word(
    capsys, common, tmp_path, checkpoints, caplog
):
    ema = make_model(5)
    path = save_checkpoint(tmp_path / "ema" / "last.pth.tar", make_model(0), state_dict_ema=ema.state_dict())
    plain = save_checkpoint(tmp_path / "plain" / "last.pth.tar", ema)
    assert (
        run(capsys, "--checkpoint", path, "--use-ema", *common)[1]["peak_abs"]
        == (run(capsys, "--checkpoint", plain, *common)[1]["peak_abs"])
    )
    # timm's --use-ema is "use ema version of weights if present"
    _, mixed, _ = run(capsys, "--checkpoint", path, checkpoints[0], "--use-ema", *common)
    alone = run(capsys, "--checkpoint", checkpoints[0], *common)[1]
    assert mixed[1]["peak_abs"] == alone["peak_abs"]
    assert "no EMA weights" in caplog.text
    assert str(path) not in caplog.text


def test_class_count_mismatch_says_both_numbers(capsys, common, tmp_path, photos, checkpoints):
    data = tmp_path / "two"
    shutil.copytree(photos, data)
    shutil.rmtree(data / "validation" / "cat")
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], "--data-dir", data, "--device", "cpu", "-j", "0")
    assert status == 1
    assert "2 classes" in err
    assert "3" in err


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_named(capsys, tmp_path, photos, checkpoints, workers):
    data = tmp_path / "damaged"
    shutil.copytree(photos, data)
    (data / "validation" / "bee" / "3.png").write_bytes(b"no image")
    words = ["--data-dir", data, "--device", "cpu", "-j", workers, "-b", "4"]
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], *words)
    assert status == 1
    assert "3.png" in err
    assert "Traceback" not in err


def test_a_misspelt_checkpoint_or_model_is_told_what_was_meant(capsys, checkpoints, photos):
    common = ["--data-dir", photos, "--device", "cpu"]
    status, _, err = run(capsys, "--checkpoint", checkpoints[0].with_name("lats.pth.tar"), *common)
    assert status == 1
    assert "does not exist" in err
    assert "did you mean 'last.pth.tar'" in err
    status, _, err = run(capsys, "--model", "vit_smal_patch16_224", *common)
    assert status == 1
    assert "did you mean 'vit_small_patch16_224'" in err


def test_missing_data_folder_is_one_clear_line(capsys, checkpoints):
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], "--data-dir", "/nowhere/at/all", "--device", "cpu")
    assert status == 1
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("validate.py: error: --data-dir /nowhere/at/all does not exist")


BAD = {
    "--torchcompile induktor": "did you mean 'inductor'",
    "--gp medium": "pooling",
    "--model-kwargs img_size=abc": "cannot create",
    "--crop-pct 0": "--crop-pct is 0",
    "--multilabel-threshold 0.3": "--multilabel-threshold does nothing",
    "--task multilabel --multilabel-threshold 1": "--multilabel-threshold is 1",
    "--compare-reports r.json": "--compare-reports validates nothing",
    "--valid-labels nowhere.txt": "--valid-labels nowhere.txt",
    "--gp=": "--gp ''",
    "--mean 0.5 0.5": "--mean has 2 values",
    "--interpolation bicubik": "did you mean 'bicubic'",
    "--crop-mode boarder": "did you mean 'border'",
    "--pretrained-cfg-overlay crop_mode=boarder": "did you mean 'border'",
    "--crop-pct nan": "--crop-pct is nan",
    "--task multilabel --export onnx": "--export is about one label an image",
    "--target-format multihot": "--target-format multihot needs --task multilabel",
    "--split vlaidation": "did you mean 'validation'",
    "--quantize w8a8-tt --calibration-split trian": "no split 'trian'",
    "--results-file nowhere/r.csv": "no folder nowhere",
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_setting_is_one_line(words, capsys, checkpoints, common):
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], *common, *words.split())
    assert status == 1
    assert "Traceback" not in err
    assert BAD[words] in err


def test_weights_alone_need_a_model_name(capsys, common, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(make_model(0).state_dict(), path)
    status, _, err = run(capsys, "--checkpoint", path, *common)
    assert status == 1
    assert "--model NAME" in err


def test_impossible_wishes_are_refused_before_anything_is_measured(capsys, checkpoints, common):
    status, result, err = run(capsys, "--checkpoint", checkpoints[0], *common, "--quantize", "w8a8-xx")
    assert status == 1
    assert result is None
    assert "w8a8-xx" in err


@pytest.mark.parametrize(
    ("lines", "complaint"), [("0\n1\n3\n", "index 3"), ("0\n0\n1\n", "twice"), ("1\n2\n", "lists 2")]
)
def test_valid_labels_that_cannot_be_are_refused(lines, complaint, capsys, checkpoints, common, tmp_path):
    (tmp_path / "labels.txt").write_text(lines)
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], *common, "--valid-labels", tmp_path / "labels.txt")
    assert status == 1
    assert complaint in err


def test_real_labels_need_five_classes(capsys, checkpoints, common, tmp_path):
    (tmp_path / "real.json").write_text("[]")
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], *common, "--real-labels", tmp_path / "real.json")
    assert status == 1
    assert "--real-labels counts the five best of a model's classes, and here are 3" in err


def test_logits_that_are_not_finite_are_not_scored(capsys, common, tmp_path, checkpoints):
    # timm's validate.py counts the place of the first NaN as a guess, and exits with 0.
    model = make_model(3)
    with torch.no_grad():
        model.norm.bias.fill_(1)
        model.head.weight.fill_(1e38)  # finite, and the logits overflow
    path = save_checkpoint(tmp_path / "broken" / "last.pth.tar", model)
    words = [*common, "--quantize", "w8a8-tt", "--calibration-images", 8, "--report", tmp_path / "r", "--metrics-avg"]
    status, results, err = run(capsys, "--checkpoint", checkpoints[0], path, *words, "macro")
    assert status == 1
    assert "broken: the logits of 21 images are not finite" in err
    assert "broken w8a8-tt: the logits of 21 images are not finite" in err
    sound, broken = results
    assert sound["top1"] is not None
    assert [broken[name] for name in ("top1", "top1_err", "top5", "macro_f1_score")] == [None] * 4
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    record = report["checkpoints"][1]
    assert record["not_finite"] == record["quantized"][0]["not_finite"] == 21
    assert (record["loss"], record["correct"], record["quantized"][0]["top1"]) == (None, None, None)
    assert report["comparison"][0]["top1_difference"] is None
    assert "| broken | - | - |" in (tmp_path / "r" / "report.md").read_text()
    again = ["--compare-reports", tmp_path / "r" / "report.json", "--results-file", tmp_path / "r.csv"]
    assert run(capsys, *again)[1][1]["top1"] is None


def test_several_labels_are_not_scored_from_logits_that_are_not_finite(capsys, common, tmp_path):
    model = make_model(3)
    with torch.no_grad():
        model.norm.bias.fill_(1)
        model.head.weight[0] = 1e38
    path = save_checkpoint(tmp_path / "broken" / "last.pth.tar", model)
    status, result, err = run(capsys, "--checkpoint", path, "--task", "multilabel", *common)
    assert status == 1
    assert "not finite" in err
    assert result["map"] is None


def test_diagnoses_of_a_broken_model_cost_themselves_alone(capsys, common, tmp_path):
    model = make_model(3)
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias[3] = 1e38  # finite, and its square is not
        model.norm.bias.fill_(1)
        model.head.weight.fill_(1e38)
    path = save_checkpoint(tmp_path / "broken" / "last.pth.tar", model)
    words = [*common, "--stethoscope", "--colinearity", "--fp8-readiness", "--sites", "all"]
    words += ["--export", "onnx"] if importlib.util.find_spec("onnxruntime") else []
    status, result, err = run(capsys, "--checkpoint", path, *words, "--report", tmp_path / "r")
    assert status == 1
    assert "Traceback" not in err
    assert result["top1"] is None
    assert not list((tmp_path / "r").glob("*.onnx"))


def test_names_that_the_locale_has_not_are_read_and_written_all_the_same(checkpoints, photos, tmp_path):
    """A folder, a class and a report with an ö, where the system's encoding is ASCII."""
    shutil.copytree(checkpoints[0].parent, tmp_path / "ök1")
    shutil.copytree(photos, tmp_path / "däta")
    (tmp_path / "däta" / "validation" / "ant").rename(tmp_path / "däta" / "validation" / "ö")
    words = [
        "--checkpoint",
        "ök1/last.pth.tar",
        "--data-dir",
        "däta",
        "--device",
        "cpu",
        "-j",
        "0",
        "-b",
        "8",
        "--report",
        "ö",
    ]
    script = Path(__file__).parents[2] / "validate.py"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, script, *words, "--results-file", "ö.csv"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {"report.json", "report.md", "report.csv"} <= {path.name for path in (tmp_path / "ö").iterdir()}
    assert "\\udcc3\\udcb6k1" in (tmp_path / "ö.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("w8a8-tt", "fp16"), "--quantize fp16 --export onnx: fp16 cannot be exported: "),
        (("w8a8-tk",), "w8a8-tk cannot be exported: its steps are computed at run time"),
        (("w8a8-tt+zero", "--export-dtype", "float16"), r"+zero) is for onnxruntime, whose operators return float32"),
    ],
)
def test_a_scheme_without_a_file_is_refused_by_name_before_anything_is_measured(
    words, message, capsys, checkpoints, common, monkeypatch
):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("tweo_timm.evaluate.measure.score", lambda *args: pytest.fail("scored"))
    status, result, err = run(capsys, "--checkpoint", checkpoints[0], *common, "--export", "onnx", "--quantize", *words)
    assert (status, result) == (1, None)
    assert message in err
