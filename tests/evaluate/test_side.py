"""validate.py scores a side network as its training did, beside its own backbone and no other."""

import json

import pytest
import torch

from tests.evaluate.conftest import make_model, run
from tests.train.runs import TINY, VIT, last
from tweo_timm.train.cli import main as train

HERE = ["--device", "cpu", "-j", "0", "-b", "4"]
PRECISIONS = {
    "float32": [],
    "bfloat16": ["--side-precision", "bfloat16"],
    "quantized": ["--side-precision", "w8a8-tt+res+rot", "--side-calibration-images", "8"],
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Weights of two backbones, with classifiers."""
    folder = tmp_path_factory.mktemp("backbones")
    for seed in (0, 1):
        torch.save(make_model(seed).state_dict(), folder / f"{seed}.pth")
    return folder


@pytest.fixture(scope="module")
def runs(backbones, photos, tmp_path_factory):
    """A folder with a trained side network in each precision."""
    out = tmp_path_factory.mktemp("side")
    for name, words in PRECISIONS.items():
        words = [*words, *VIT, "--side", "last", "--side-gap", "1", "--side-rank", "4", "--opt", "adamw"]
        words += ["--lr", "1e-2"]
        words += [*HERE, "--data-dir", str(photos), "--initial-checkpoint", str(backbones / "0.pth"), "--epochs", "1"]
        assert train([*words, "--warmup-epochs", "0", "--output", str(out), "--experiment", name]) == 0
    return out


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow), "quantized"])
def test_a_side_network_is_scored_as_in_its_training(precision, runs, backbones, photos, capsys, tmp_path):
    folder = runs / precision
    words = ["--checkpoint", folder / "last.pth.tar", "--data-dir", photos, *HERE, "--report", tmp_path]
    status, _, err = run(capsys, *words, "--side-backbone", backbones / "0.pth")
    assert status == 0, err
    record = json.loads((tmp_path / "report.json").read_text())["checkpoints"][0]
    columns, values = (line.split(",") for line in (folder / "summary.csv").read_text().split()[:2])
    assert record["loss"] == pytest.approx(float(values[columns.index("eval_loss")]), rel=1e-6)
    assert record["side"]["trained_parameters"] == sum(v.numel() for v in last(folder)["state_dict"].values())
    assert record["side"]["backbone"] == last(folder)["side"]["backbone"]
    assert record["side"]["seconds"] > 0
    assert record["side"]["peak_memory_mib"] > 0
    assert "### Side network" in (tmp_path / "report.md").read_text()


def test_another_backbone_is_refused_and_none_is_asked_for(runs, backbones, photos, capsys):
    words = ["--checkpoint", runs / "float32" / "last.pth.tar", "--data-dir", photos, *HERE]
    status, _, err = run(capsys, *words, "--side-backbone", backbones / "1.pth")
    assert status == 1
    assert "beside another backbone: fingerprint" in err
    status, _, err = run(capsys, *words)
    assert status == 1
    assert "give --side-backbone FILE, the weights of vit_tiny_patch16_224 with the fingerprint" in err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--model-kwargs", *TINY[:-1], "num_heads=4"], "another backbone: num_heads 2, not 4"),
        (["--tweo-blocks", r"blocks\.0"], "would read ['blocks.0', 'blocks.0']: leave out --tweo-blocks"),
    ],
)
def test_the_same_weights_in_another_function_are_refused(words, part, runs, backbones, photos, capsys):
    command = ["--checkpoint", runs / "float32" / "last.pth.tar", "--data-dir", photos, *HERE, *words]
    status, _, err = run(capsys, *command, "--side-backbone", backbones / "0.pth")
    assert status == 1
    assert part in err


def test_other_calibration_images_are_refused(runs, backbones, photos, capsys):
    words = ["--checkpoint", runs / "quantized" / "last.pth.tar", "--data-dir", photos, *HERE]
    words += ["--side-backbone", backbones / "0.pth", "--calibration-split", "validation"]
    status, _, err = run(capsys, *words)
    assert status == 1
    assert "calibration" in err


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"side": "lastly"}, "side.side is"),
        ({"settings": {"rank": 0, "gap": 1, "modules_per_block": 1, "num_heads": 1}}, "side.settings.rank is 0"),
        ({"backbone": "none"}, "side.backbone is"),
        ({"num_classes": "many"}, "side.num_classes is"),
    ],
)
def test_what_a_stranger_says_of_a_side_network_is_read_by_type(
    change, part, runs, backbones, photos, capsys, tmp_path
):
    content = last(runs / "float32")
    torch.save({**content, "side": {**content["side"], **change}}, tmp_path / "odd.pth.tar")
    words = ["--checkpoint", tmp_path / "odd.pth.tar", "--data-dir", photos, *HERE]
    status, _, err = run(capsys, *words, "--side-backbone", backbones / "0.pth")
    assert status == 1
    assert part in err
