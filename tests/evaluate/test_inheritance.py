"""A checkpoint is validated as it was trained: what decides its result comes from its training, or is refused."""

import argparse
import csv
import json
import shutil

import pytest
import timm
import torch
from timm.models import resume_checkpoint

from tests import models
from tests.evaluate.conftest import make_model, run, save_checkpoint
from tests.models import SWIN_ARCH, VIT_ARCH, as_words, tiny_vit
from tests.train.runs import TINY, VIT, last
from tweo_timm.evaluate.inheritance import ELSEWHERE, KINDS, OTHERS, inheritable
from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.run.flags import option_table
from tweo_timm.settings import Decides
from tweo_timm.train.cli import main as train
from tweo_timm.train.options import TrainOptions

TRAINING, VALIDATION = option_table(TrainOptions), option_table(ValidateOptions)
GRAY = ["--model", VIT_ARCH, "--model-kwargs", *TINY, "--num-classes", "3", "--input-size", "1", "32", "32"]
RESNET = ["--model", "resnet10t", "--num-classes", "3", "--img-size", "32"]
SWIN = ["--model", SWIN_ARCH, "--model-kwargs", *as_words(models.SWIN), "--num-classes", "3", "--img-size", "32"]
BN = ["--model", "test_efficientnet", "--num-classes", "3", "--img-size", "32", "--bn-eps", "0.9"]
HERE = ["--device", "cpu", "-j", "0", "-b", "4"]


def trained(data, out, *words, name="run"):
    """Train one epoch; the run folder, and the loss of its validation."""
    words = [*words, "--data-dir", data, *HERE, "--opt", "adamw", "--lr", "1e-2", "--warmup-epochs", "0"]
    assert train([str(w) for w in [*words, "--epochs", "1", "--output", out, "--experiment", name]]) == 0
    with open(out / name / "summary.csv") as file:
        return out / name, float(next(csv.DictReader(file))["eval_loss"])


def validated(capsys, folder, data, *words):
    """Validate its last checkpoint; status, the loss, and what was said on stderr."""
    report = folder / "report"
    words = ["--checkpoint", folder / "last.pth.tar", "--data-dir", data, *HERE, "--report", report, *words]
    status, _, err = run(capsys, *words)
    records = json.loads((report / "report.json").read_text())["checkpoints"] if status == 0 else [{"loss": None}]
    return status, records[0]["loss"], err


@pytest.mark.parametrize("table", [TRAINING, VALIDATION], ids=["training", "validation"])
def test_every_flag_says_what_it_decides(table):
    assert [name for name, option in table.items() if not isinstance(option.decides, Decides)] == []


def test_every_option_of_training_is_taken_over_or_declared_not_to_matter():
    taken = inheritable()
    deciding = {name for name, option in TRAINING.items() if option.decides in KINDS}
    assert deciding - set(ELSEWHERE) == set(taken) - {"val_split", "val_num_samples"}
    assert set(OTHERS) <= set(TRAINING)
    for name, dest in taken.items():
        ours, theirs = TRAINING[name], VALIDATION[dest]
        assert (ours.scalar, ours.is_list, ours.is_mapping) == (theirs.scalar, theirs.is_list, theirs.is_mapping)


def turned(root):
    path = root / "turned.txt"
    path.write_text("cat\nbee\nant\n")
    return path


# Each of these changes the loss if it is forgotten.
DECIDED = {
    "--class-map": [*VIT, "--class-map", "{map}"],
    "--input-img-mode": [*VIT, "--input-img-mode", "HSV"],
    "--in-chans": [*GRAY, "--mean", "0.1", "--std", "0.5"],
    "--pretrained-cfg-overlay": [*VIT, "--pretrained-cfg-overlay", "mean=(0.9,0.1,0.5)", "crop_pct=0.5"],
    "--crop-pct": [*VIT, "--crop-pct", "0.5", "--gp", "avg"],
    "--val-split": [*VIT, "--val-split", "train"],
    "--bn-eps": BN,
    "--clipped-softmax": [*VIT, "--clipped-softmax", "0.9"],
    "--clipped-softmax of a Swin": [*SWIN, "--clipped-softmax", "0.9"],
    "--split-bn": [*RESNET, "--aug-splits", "2", "--split-bn"],
}


@pytest.mark.parametrize("flags", DECIDED)
def test_what_training_measured_is_measured_again_without_a_flag(flags, capsys, photos, tmp_path):
    words = [word.replace("{map}", str(turned(tmp_path))) for word in DECIDED[flags]]
    folder, loss = trained(photos, tmp_path, *words)
    status, again, err = validated(capsys, folder, photos, *(["--use-train-size"] if "resnet10t" in words else []))
    assert status == 0, err
    assert again == pytest.approx(loss, rel=1e-5)


def test_a_crop_for_testing_that_is_not_the_trainings_is_said(capsys, photos, tmp_path, caplog):
    # timm's validate.py takes an architecture's size and crop for testing, and its train.py never does.
    folder, _ = trained(photos, tmp_path, *RESNET)
    assert validated(capsys, folder, photos)[0] == 0
    assert "crop_pct 0.95, where the training had 0.875" in caplog.text
    assert "--use-train-size" in caplog.text


def test_the_command_line_wins_with_a_default_too(capsys, photos, tmp_path):
    folder, loss = trained(photos, tmp_path, *VIT, "--crop-pct", "0.5", "--val-split", "train")
    status, given, _ = validated(capsys, folder, photos, "--split", "validation")
    assert status == 0
    assert given != pytest.approx(loss, rel=1e-3)


def test_weights_alone_are_validated_with_the_batch_norms_of_their_training(capsys, photos, tmp_path):
    folder, loss = trained(photos, tmp_path, *BN)
    torch.save(last(folder)["state_dict"], folder / "last.pth.tar")
    status, again, err = validated(capsys, folder, photos, *BN)
    assert status == 0, err
    assert again == pytest.approx(loss, rel=1e-5)


def test_a_class_map_that_is_gone_is_named(capsys, photos, tmp_path):
    folder, _ = trained(photos, tmp_path, *VIT, "--class-map", turned(tmp_path))
    turned(tmp_path).unlink()
    status, _, err = validated(capsys, folder, photos)
    assert status == 1
    assert "class 0 is 'cat' there and 'ant' in the data; class 2 is 'ant' there and 'cat' in the data" in err
    content = last(folder)
    del content["class_names"]
    torch.save(content, folder / "last.pth.tar")
    status, _, err = validated(capsys, folder, photos)
    assert status == 1
    assert f"trained with --class-map {tmp_path / 'turned.txt'}, which is not here" in err
    assert validated(capsys, folder, photos, "--class-map", "")[0] == 0


def test_class_names_are_in_checkpoints_that_timm_loads_and_resumes(photos, tmp_path):
    folder, _ = trained(photos, tmp_path, *VIT)
    assert last(folder)["class_names"] == ["ant", "bee", "cat"]
    model = tiny_vit(num_classes=3, checkpoint_path=str(folder / "last.pth.tar"))
    assert resume_checkpoint(model, str(folder / "last.pth.tar")) == 1


def test_a_renamed_class_folder_is_named_by_validation_and_by_resumption(capsys, photos, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    folder, loss = trained(data, tmp_path, *VIT)
    for split in ("train", "validation"):
        (data / split / "ant").rename(data / split / "wasp")
    status, _, err = validated(capsys, folder, data)
    assert status == 1
    assert "class 0 is 'ant' there and 'bee' in the data" in err
    # Bee, cat and wasp are classes 1, 2 and 0 of the model.
    (tmp_path / "labels.txt").write_text("1\n2\n0\n")
    status, again, err = validated(capsys, folder, data, "--valid-labels", tmp_path / "labels.txt")
    assert status == 0, err
    assert again == pytest.approx(loss, rel=1e-5)
    more = ["--data-dir", str(data), *HERE, "--opt", "adamw", "--epochs", "2", "--output", str(tmp_path)]
    assert train([*VIT, *more, "--experiment", "run", "--resume", "auto"]) == 1
    assert "class 0 is 'ant' there and 'bee' in the data" in capsys.readouterr().err
    assert len((folder / "summary.csv").read_text().splitlines()) == 2


def test_results_hold_the_class_names(capsys, photos, checkpoints, common, tmp_path):
    run(capsys, "--checkpoint", checkpoints[0], *common, "--results-file", tmp_path / "r.csv")
    with open(tmp_path / "r.csv") as file:
        assert json.loads(next(csv.DictReader(file))["class_names"]) == ["ant", "bee", "cat"]


FOREIGN = {
    "DeiT and MAE": {"input_size": 32, "mean": "imagenet", "data_set": "IMNET"},
    "a pair": {"img_size": [32, 32], "crop_pct": -1},
    "words": {"img_size": 32, "model_kwargs": "depth=2", "interpolation": 3, "pretrained_cfg_overlay": "x"},
}


@pytest.mark.parametrize("code", FOREIGN)
def test_options_of_other_code_that_do_not_parse_are_left_out_with_a_line(code, capsys, common, tmp_path, caplog):
    model = timm.create_model("resnet10t", num_classes=3)
    args = argparse.Namespace(num_classes=3, **FOREIGN[code])
    path = save_checkpoint(tmp_path / "x" / "last.pth.tar", model, arch="resnet10t", args=args)
    status, result, err = run(capsys, "--checkpoint", path, *common)
    assert status == 0, err
    assert result["img_size"] == 32
    strange = {"mean", "crop_pct", "model_kwargs", "interpolation", "pretrained_cfg_overlay"} & FOREIGN[code].keys()
    assert all(f"says {name} = {FOREIGN[code][name]!r}" in caplog.text for name in strange)


def test_a_checkpoint_with_objects_of_other_code_says_which(capsys, common, tmp_path):
    path = save_checkpoint(tmp_path / "x" / "last.pth.tar", make_model(0), where=tmp_path)
    status, _, err = run(capsys, "--checkpoint", path, *common)
    assert status == 1
    assert "pathlib" in err
    assert "truncated" not in err
