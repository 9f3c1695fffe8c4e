"""train.py --side: only the side network is trained and stored, and every flag means what it means elsewhere."""

import copy
import re
import signal
from pathlib import Path

import pytest
import torch
from timm.utils import unwrap_model

from tests.train.runs import command, last, load, same_tensors, session_of, train, train_together
from tests.train.test_resume import assert_same_run
from tweo_timm.side import Last
from tweo_timm.train.cli import main
from tweo_timm.train.options import TrainOptions, parse_train_options

SIDE = ["--side", "last", "--side-gap", "1", "--side-rank", "4"]
MIET = ["--side", "miet", "--side-gap", "1", "--side-rank", "4"]
QUANTIZED = ["--side-precision", "w8a8-tt+res+rot", "--side-calibration-images", "8"]
ALL_RANDOM = [
    *("--model-ema", "--model-ema-decay", "0.9", "--mixup", "0.5", "--cutmix", "0.5", "--reprob", "0.5"),
    *("--drop", "0.1", "--drop-path", "0.1", "--grad-accum-steps", "2", "--clip-grad", "1.0", "--tensorboard"),
]


@pytest.mark.parametrize("words", [SIDE, [*MIET, *QUANTIZED]], ids=["last", "miet, quantized"])
def test_optimizer_and_checkpoint_hold_side_network_and_head_alone(words, images, tmp_path):
    session = session_of(images, tmp_path, *words, "--model-ema")
    trained = {name for name, p in session.model.named_parameters() if p.requires_grad}
    given = {id(p) for group in session.optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for name, p in session.model.named_parameters() if name in trained}
    assert unwrap_model(session.task.get_eval_model(ema=True)).backbone is session.model.backbone
    before = copy.deepcopy(session.model.backbone.state_dict())
    content = last(train(images, tmp_path, *words, "--model-ema"))
    assert content["state_dict"].keys() == content["state_dict_ema"].keys() == trained
    assert not any(name.startswith("backbone") for name in trained)
    assert content["side"]["backbone"]["arch"] == "vit_tiny_patch16_224"
    assert content["side"]["backbone"]["precision"] == session.options.side_precision
    again = session_of(images, tmp_path, *words)
    assert same_tensors(again.model.backbone.state_dict(), before)
    assert again.model.describe() == content["side"]


@pytest.mark.parametrize(
    "words",
    [pytest.param(SIDE, id="last"), pytest.param([*MIET, *QUANTIZED], id="miet, quantized", marks=pytest.mark.slow)],
)
def test_a_run_stopped_inside_an_epoch_continues_bit_for_bit(words, images, tmp_path, interrupt):
    whole = train(images, tmp_path / "whole", *words, *ALL_RANDOM)
    assert list(whole.glob("events.*"))
    words = command(images, tmp_path, *words, *ALL_RANDOM, "--resume", "auto")
    interrupt(3)
    assert main(words) == 128 + signal.SIGTERM
    assert main(words) == 0
    (whole / "outliers.jsonl").touch()
    (tmp_path / "run" / "outliers.jsonl").touch()
    assert_same_run(tmp_path / "run", whole)


def test_two_processes_train_as_one(images, tmp_path):
    words = [*SIDE, "--opt", "sgd", "--lr", "0.1", "--no-aug", "--model-ema", "--model-ema-decay", "0.5"]
    alone = last(train(images, tmp_path, *words, "-b", "56", name="alone"))
    assert train_together(command(images, tmp_path, *words, "-b", "28", name="both")) == [0, 0]
    both = last(tmp_path / "both")
    for entry in ("state_dict", "state_dict_ema"):
        for name, value in alone[entry].items():
            torch.testing.assert_close(both[entry][name], value, rtol=1e-5, atol=1e-6)


def test_a_run_continues_beside_the_same_backbone_only(images, tmp_path, capsys):
    session = session_of(images, tmp_path)
    for number in (0, 1):
        weights = {name: value + number for name, value in session.model.state_dict().items()}
        torch.save(weights, tmp_path / f"{number}.pth")  # with a classifier of three classes, which is left out
    words = [*SIDE, "--initial-checkpoint", str(tmp_path / "0.pth")]
    folder = train(images, tmp_path, *words)
    at_end = last(folder)
    words = command(images, tmp_path, *SIDE, "--resume", "auto", "--epochs", "3")
    assert main([*words, "--initial-checkpoint", str(tmp_path / "1.pth")]) == 1
    said = capsys.readouterr().err
    assert "another side network or backbone: fingerprint" in said
    assert main([*words, "--initial-checkpoint", str(tmp_path / "0.pth"), "--side-rank", "8"]) == 1
    assert "rank 4, not 8" in capsys.readouterr().err
    assert main(command(images, tmp_path, "--resume", "auto", "--epochs", "3")) == 1
    assert "is of a side network and --side is not" in capsys.readouterr().err
    assert same_tensors(load(folder / "last.pth.tar")["state_dict"], at_end["state_dict"])


def test_the_weights_of_a_backbone_are_read_without_their_classifier(images, tmp_path):
    whole = session_of(images, tmp_path).model
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    net = session_of(
        images, tmp_path, *SIDE, "--seed", "7", "--initial-checkpoint", str(tmp_path / "weights.pth")
    ).model
    assert isinstance(net, Last)
    expected = {name: value for name, value in whole.state_dict().items() if not name.startswith("head.")}
    assert same_tensors(dict(net.backbone.state_dict()), expected)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--side", "last", "--tweo-weight", "0.01"], "--tweo-weight 0.01 does not go with --side last: the frozen"),
        (["--side", "last", "--tweo-schedule", "linear", "--tweo-end-weight", "0.01"], "--tweo-end-weight 0.01"),
        (["--side", "miet", "--fp8", "emulated"], "give --side-precision"),
        (["--side", "last", "--grad-checkpointing"], "--grad-checkpointing does not go"),
        (["--side", "last", "--layer-decay", "0.7"], "--layer-decay 0.7 does not go"),
        (["--side", "last", "--model-dtype", "bfloat16"], "--model-dtype bfloat16 does not go"),
        (["--side", "last", "--fsdp"], "--fsdp does not go"),
        (["--side", "last", "--clipped-softmax", "0.5"], "--clipped-softmax 0.5 does not go"),
        (["--side", "last", "--side-precision", "w9"], "--side-precision w9 is not float32 or bfloat16"),
        (["--side", "last", "--side-rank", "0"], "--side-rank is 0"),
        (["--side", "last", "--side-heads", "3"], "--side-heads is 3; it must be a divisor of the rank, 16"),
        (["--side-rank", "8"], "does nothing without --side"),
    ],
)
def test_what_does_not_go_with_a_frozen_backbone_is_refused_by_name(words, part):
    with pytest.raises(ValueError, match=re.escape(part)):
        parse_train_options(words)


@pytest.mark.parametrize("name", ["side_last", "side_miet"])
def test_recipes_run_and_say_that_nobody_here_has_run_them(name, images, tmp_path):
    path = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"
    header = path.read_text().split("\n\n")[0]
    assert f"train.py -c recipes/{path.name}" in header
    assert "Status:      not run by us." in header
    words = ["-c", str(path), "--no-pretrained", "--side-gap", "1", "--warmup-epochs", "0"]
    assert last(train(images, tmp_path, *words))["side"]["side"] == name.removeprefix("side_")


def test_a_gap_that_does_not_divide_the_blocks_is_one_message(images, tmp_path, capsys):
    assert main(command(images, tmp_path, "--side", "last")) == 1
    assert "gap is 3; it must divide the 2 blocks" in capsys.readouterr().err
    assert TrainOptions().side == "off"
