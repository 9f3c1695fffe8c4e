"""A resumed run has the settings of its own command: whatever an optimizer's restored state would overwrite."""

import csv

import pytest
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from tests.train.runs import command, last, same_tensors, session_of, train
from tweo_timm.run.checkpoint_file import read
from tweo_timm.train.cli import main
from tweo_timm.train.loop import Trainer
from tweo_timm.train.param_groups import under_settings
from tweo_timm.train.signals import SignalWatch

WARMUP = ["--epochs", "4", "--warmup-epochs", "1", "--lr", "2e-3"]


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A run of four epochs that is over; its rate is 0 at the end."""
    return train(images, tmp_path_factory.mktemp("finished"), *WARMUP)


def resumed_groups(images, out, checkpoint, *more):
    """The optimizer's groups of a run that is about to begin its first epoch."""
    session = session_of(images, out, *more, "--resume", str(checkpoint))
    trainer = Trainer(session, SignalWatch())
    trainer.resume(read(checkpoint))
    trainer.set_off()
    return session.optimizer.param_groups


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ([*WARMUP, "--start-epoch", "0"], 1e-5),
        ([*WARMUP, "--start-epoch", "0", "--warmup-epochs", "0"], 2e-3),
        ([*WARMUP, "--start-epoch", "1"], 2e-3 * 0.5 * (1 + 2**-0.5)),
        ([*WARMUP, "--sched", "none"], 2e-3),
        ([*WARMUP, "--sched", "none", "--start-epoch", "0"], 2e-3),
        (["--epochs", "8", "--lr", "5e-4", "--sched", "constant"], 5e-4),
        (["--epochs", "4", "--lr", "3e-3", "--start-epoch", "0", "--sched-on-updates"], 3e-3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_first_rate_is_that_of_the_command(settings, rate, images, tmp_path, finished):
    groups = resumed_groups(images, tmp_path, finished / "last.pth.tar", *settings)
    assert [group["lr"] for group in groups] == pytest.approx([rate] * len(groups), rel=1e-12)


@pytest.mark.parametrize(("lr", "how"), [("2e-3", "exactly"), ("1e-3", "under other settings")])
def test_only_a_run_under_the_same_settings_goes_on_exactly(lr, how, images, tmp_path, finished, caplog):
    caplog.set_level("INFO")
    resumed_groups(images, tmp_path, finished / "last.pth.tar", *WARMUP, "--lr", lr)
    assert f"Resumed {finished / 'last.pth.tar'} {how}: epoch" in caplog.text


def test_begun_again_from_a_checkpoint_a_run_writes_the_rates_of_a_new_one(images, tmp_path, finished):
    words = command(images, tmp_path, *WARMUP, "--resume", str(finished / "last.pth.tar"), "--start-epoch", "0")
    assert main(words) == 0
    written = [
        list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
        for folder in (finished, tmp_path / "run")
    ]
    assert [row["lr"] for row in written[1]] == [row["lr"] for row in written[0]]
    assert float(written[1][0]["lr"]) == 1e-5


def test_every_setting_of_the_groups_is_that_of_the_command(images, tmp_path, finished):
    others = [
        "--weight-decay",
        "0.3",
        "--opt-betas",
        "0.8",
        "0.9",
        "--opt-eps",
        "1e-4",
        "--lr",
        "7e-3",
        "--epochs",
        "9",
    ]
    resumed = resumed_groups(images, tmp_path, finished / "last.pth.tar", *others, "--start-epoch", "0")
    fresh = session_of(images, tmp_path, *others).optimizer.param_groups
    for group, wanted in zip(resumed, fresh, strict=True):
        assert {**group, "params": 0} == {**wanted, "params": 0}


def test_momentum_is_that_of_the_command(images, tmp_path):
    folder = train(images, tmp_path, "--epochs", "1", "--opt", "sgd")
    resumed = resumed_groups(images, tmp_path, folder / "last.pth.tar", "--opt", "sgd", "--momentum", "0.5")
    assert {group["momentum"] for group in resumed} == {0.5}


def test_layer_scales_are_those_of_the_command(images, tmp_path):
    folder = train(images, tmp_path, "--epochs", "1", "--layer-decay", "0.9")
    resumed = resumed_groups(images, tmp_path, folder / "last.pth.tar", "--layer-decay", "0.5", "--epochs", "3")
    fresh = session_of(images, tmp_path, "--layer-decay", "0.5").optimizer.param_groups
    assert [group["lr_scale"] for group in resumed] == [group["lr_scale"] for group in fresh]
    top = resumed[-1]["lr"] / resumed[-1]["lr_scale"]
    assert [group["lr"] for group in resumed] == pytest.approx([top * group["lr_scale"] for group in resumed])


def test_layer_scales_hold_without_a_schedule(images, tmp_path):
    scheduled = session_of(images, tmp_path, "--layer-decay", "0.5").optimizer.param_groups
    plain = session_of(images, tmp_path, "--layer-decay", "0.5", "--sched", "none").optimizer.param_groups
    assert [group["lr"] for group in plain] == pytest.approx([group["lr"] for group in scheduled], rel=1e-12)
    assert len({group["lr"] for group in plain}) > 2


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")
def test_a_plateau_keeps_its_reductions_under_another_rate_and_takes_other_settings(images, tmp_path, monkeypatch):
    plateau = ["--sched", "plateau", "--patience-epochs", "0", "--decay-rate", "0.5"]
    first = session_of(images, tmp_path, *plateau, "--lr", "1e-3")
    for metric in (1.0, 0.5, 0.4):  # Top-1 that falls: halved twice
        first.scheduler.step(5, metric)
    assert {group["lr"] for group in first.optimizer.param_groups} == {2.5e-4}
    state = {**first.optimizer.state_dict()}
    second = session_of(images, tmp_path, *plateau, "--lr", "1e-2")
    groups = under_settings(state, second.optimizer, remembered_rates=True)["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([2.5e-3] * len(groups))
    again = under_settings(state, first.optimizer, remembered_rates=True)["param_groups"]
    assert [group["lr"] for group in again] == [2.5e-4] * len(again)


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")
def test_a_plateau_has_the_patience_of_the_command(images, tmp_path):
    plateau = ["--sched", "plateau", "--epochs", "1"]
    checkpoint = train(images, tmp_path, *plateau, "--patience-epochs", "7") / "last.pth.tar"
    session = session_of(images, tmp_path, *plateau, "--patience-epochs", "2", "--decay-rate", "0.3")
    Trainer(session, SignalWatch()).resume(read(checkpoint))
    memory = session.scheduler.lr_scheduler
    assert (memory.patience, memory.factor) == (2, 0.3)
    assert memory.best == last(checkpoint.parent)["metric"]


def steps_of(optimizer, module, count):
    for _ in range(count):
        optimizer.zero_grad()
        module(torch.randn(4, 8)).square().mean().backward(create_graph=getattr(optimizer, "is_second_order", False))
        optimizer.step()


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("name", [name for name in list_optimizers() if not name.startswith(("bnb", "fused", "kron"))])
def test_unchanged_settings_restore_an_optimizer_to_the_bit(name):
    """No optimizer of timm counts in an entry that its groups are built with, or it would begin anew."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = create_optimizer_v2(module, opt=name, lr=1e-3, weight_decay=0.05)
    steps_of(optimizer, module, 7)
    state = optimizer.state_dict()
    fresh = create_optimizer_v2(module, opt=name, lr=1e-3, weight_decay=0.05)
    assert same_tensors(under_settings(state, fresh), state)
