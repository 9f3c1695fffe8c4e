"""Comparing gradients changes nothing of a training; --tweo-weight auto trains, is recorded and continues exactly."""

import csv
import signal

import pytest
import torch
import yaml

from tests.train.runs import command, last, same_tensors, session_of, train
from tweo_timm.train import build
from tweo_timm.train.cli import main

RANDOM = ["--drop", "0.1", "--drop-path", "0.1", "--mixup", "0.5", "--grad-accum-steps", "2", "--tweo-tau", "0.5"]
FAMILIES = {
    "random": [*RANDOM, "--tweo-weight", "0.01"],
    "checkpointed": ["--grad-checkpointing", "--drop-path", "0.1", "--tweo-weight", "0.01"],
    "fp8": ["--fp8", "emulated", "--tweo-weight", "0.01", "--amp", "--amp-dtype", "bfloat16"],
}
AUTO = [*RANDOM, "--tweo-weight", "auto", "--outlier-interval", "2"]


def summary(folder):
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("words", FAMILIES.values(), ids=FAMILIES)
def test_comparing_gradients_changes_no_bit_of_a_run(words, images, tmp_path, monkeypatch):
    measured = train(images, tmp_path, *words, name="measured")
    monkeypatch.setattr(build, "_gradients_apart", lambda *_: False)
    plain = train(images, tmp_path, *words, name="plain")
    for key in ("state_dict", "optimizer"):
        assert same_tensors(last(measured)[key], last(plain)[key]), key
    processes = [last(folder)["exact"]["processes"] for folder in (measured, plain)]
    assert same_tensors(*processes)  # random states and FP8 scales
    rows, others = summary(measured), summary(plain)
    assert all(float(row.pop("train_tweo_grad_ratio")) > 0 for row in rows)
    assert all(row.pop("train_tweo_grad_ratio") == "nan" for row in others)
    assert rows == others


def test_a_baseline_has_neither_weight_nor_ratio(images, tmp_path):
    rows = summary(train(images, tmp_path, "--epochs", "1"))
    assert [(row["train_tweo_weight"], row["train_tweo_grad_ratio"]) for row in rows] == [("0.0", "0.0")]


def test_auto_is_the_papers_weight_from_scratch_and_less_where_the_penalty_is_huge(images, tmp_path, caplog):
    scratch = summary(train(images, tmp_path, "--tweo-weight", "auto", name="scratch"))
    assert [float(row["train_tweo_weight"]) for row in scratch] == pytest.approx([0.01, 0.01])
    state = torch.load(tmp_path / "scratch" / "last.pth.tar", weights_only=False)["state_dict"]
    state["pos_embed"] *= 1e4
    torch.save(state, tmp_path / "huge.pth")
    caplog.set_level("INFO")
    words = ["--tweo-weight", "auto", "--initial-checkpoint", str(tmp_path / "huge.pth")]
    huge = train(images, tmp_path, *words, name="huge")
    assert all(float(row["train_tweo_weight"]) < 1e-4 for row in summary(huge))
    assert "Weight: " in caplog.text
    assert yaml.safe_load((huge / "args.yaml").read_text())["tweo_weight"] == "auto"


@pytest.mark.parametrize("batches", [2, 5, 9])
def test_auto_stopped_inside_an_epoch_continues_bit_for_bit(batches, images, tmp_path, interrupt):
    whole = train(images, tmp_path, *AUTO, name="whole")
    words = command(images, tmp_path, *AUTO, "--resume", "auto", name="stopped")
    interrupt(batches)
    assert main(words) == 128 + signal.SIGTERM
    assert main(words) == 0
    for key in ("state_dict", "optimizer"):
        assert same_tensors(last(tmp_path / "stopped")[key], last(whole)[key])
    assert same_tensors(*(last(folder)["exact"]["processes"] for folder in (whole, tmp_path / "stopped")))
    assert summary(tmp_path / "stopped") == summary(whole)


@pytest.mark.parametrize("words", [["--torchcompile"], ["--fsdp"]], ids=["compiled", "sharded"])
def test_auto_is_refused_where_a_graph_allows_one_backward_pass_only(words, images, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "check_sharding", lambda *_: None)
    monkeypatch.setattr(build, "shard", lambda *_: None)
    with pytest.raises(ValueError, match=r"--tweo-weight auto finds the gradients.*give a number"):
        session_of(images, tmp_path, *words, "--tweo-weight", "auto")
