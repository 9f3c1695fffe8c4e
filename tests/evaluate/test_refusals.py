"""What validate.py cannot do, it says in one line that names the cause."""

import shutil

import pytest
import torch

from tests.evaluate.conftest import ARCH, make_model, run, save_checkpoint


def test_checkpoint_of_another_architecture_is_refused_by_name(capsys, checkpoints, common):
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], "--model", "swin_tiny_patch4_window7_224", *common)
    assert status == 1
    assert ARCH in err
    assert "leave out --model" in err
    assert "Traceback" not in err


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


def test_ema_weights_are_used_when_asked_for_and_missing_ones_are_an_error(capsys, common, tmp_path, checkpoints):
    ema = make_model(5)
    path = save_checkpoint(tmp_path / "ema" / "last.pth.tar", make_model(0), state_dict_ema=ema.state_dict())
    plain = save_checkpoint(tmp_path / "plain" / "last.pth.tar", ema)
    assert (
        run(capsys, "--checkpoint", path, "--use-ema", *common)[1]["peak_abs"]
        == (run(capsys, "--checkpoint", plain, *common)[1]["peak_abs"])
    )
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], "--use-ema", *common)
    assert status == 1
    assert "no EMA weights" in err


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
