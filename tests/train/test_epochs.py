"""What happens at the end of an epoch, and between: rates, averages of the weights, validation, milestones."""

import csv
import json

import pytest
import torch
from timm.utils import NativeScaler, unwrap_model

from tests.train.runs import command, last, load, rows, session_of, train
from tweo_timm.run.world import World
from tweo_timm.train import loop
from tweo_timm.train.build import build_session
from tweo_timm.train.cli import main
from tweo_timm.train.options import parse_train_options
from tweo_timm.train.replay import ReplayLoader
from tweo_timm.train.signals import SignalWatch


def listed(folder):
    with open(folder / "summary.csv") as file:
        return [(row["epoch"], row["eval_top1"] != "") for row in csv.DictReader(file)]


def test_an_epoch_that_is_not_validated_has_no_row_and_is_kept_for_recovery_until_the_end(images, tmp_path, interrupt):
    settings = ("--epochs", "4", "--val-interval", "3", "--save-epochs", "4", "--checkpoint-hist", "1")
    words = command(images, tmp_path, *settings, "--resume", "auto")
    interrupt(9)
    assert main(words) == 143
    assert (tmp_path / "run" / "recovery-0-7.pth.tar").exists()
    folder = train(images, tmp_path, *settings, "--resume", "auto")
    lines = (folder / "summary.csv").read_text().splitlines()
    assert lines[0].startswith("epoch,train_loss,eval_loss,eval_top1,eval_top5,lr,train_task_loss")
    assert listed(folder) == [("2", True), ("3", True)]
    assert sorted({row["epoch"] for row in rows(folder)}) == [0, 1, 2, 3]
    assert not list(folder.glob("recovery-*"))
    assert (folder / "milestone-4.pth.tar").exists()
    assert len(list(folder.glob("checkpoint-*"))) == 1


def test_recovery_files_that_were_asked_for_stay(images, tmp_path):
    folder = train(images, tmp_path, "--epochs", "1", "--recovery-interval", "3")
    assert sorted(path.name for path in folder.glob("recovery-*")) == ["recovery-0-3.pth.tar", "recovery-0-6.pth.tar"]


def test_without_a_validation_split_the_training_loss_decides(images, tmp_path, interrupt, capsys):
    settings = ("--val-split", "", "--epochs", "3", "--checkpoint-hist", "1", "--resume", "auto")
    interrupt(10)
    assert main(command(images, tmp_path, *settings)) == 143
    folder = train(images, tmp_path, *settings)
    with open(folder / "summary.csv") as file:
        table = list(csv.DictReader(file))
    losses = [float(row["train_loss"]) for row in table]
    assert not any(name.startswith("eval_") and name != "eval_peak_abs" for name in table[0])
    assert load(folder / "model_best.pth.tar")["metric"] == pytest.approx(min(losses))
    printed = json.loads(capsys.readouterr().out.split("--result\n")[1])
    assert printed[-1]["train"]["loss"] == pytest.approx(min(losses[1:]))  # of this process
    assert "validation" not in printed[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model-dtype", "bfloat16"], torch.bfloat16),
        (["--model-dtype", "bfloat16", "--model-ema-force-fp32"], torch.float32),
        (["--model-dtype", "float16"], torch.float32),
        ([], torch.float32),
    ],
    ids=str,
)
def test_the_average_is_kept_in_a_dtype_that_holds_its_steps(words, expected, images, tmp_path):
    session = session_of(images, tmp_path, *words, "--model-ema", "--seed", "7")
    ema = session.task.get_trainable_module(ema=True)
    assert {p.dtype for p in ema.parameters()} == {expected} == {session.ema_dtype}
    assert ema._sr_generator.initial_seed() == 7


def test_a_float32_average_of_a_bfloat16_model_is_validated_in_float32(images, tmp_path):
    words = ("--model-dtype", "bfloat16", "--model-ema", "--model-ema-force-fp32", "--epochs", "1")
    folder = train(images, tmp_path, *words)
    assert {tensor.dtype for tensor in last(folder)["state_dict_ema"].values()} == {torch.float32}
    assert {tensor.dtype for tensor in last(folder)["state_dict"].values()} == {torch.bfloat16}


def test_the_base_rate_grows_with_the_average_of_several_batch_sizes(images, tmp_path):
    sizes = ["--train-img-sizes", "32", "32", "--train-batch-sizes", "8", "4", "--train-size-probs", "1", "1"]
    words = [word for word in command(images, tmp_path, *sizes, "--opt", "sgd") if word not in ("--lr", "1e-3")]
    session = build_session(parse_train_options(words), World(torch.device("cpu")))
    assert session.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 6 / 256)


def test_the_average_of_a_convnet_shares_its_batch_norm_too(images, tmp_path, monkeypatch):
    shared = []
    monkeypatch.setattr(loop, "distribute_bn", lambda model, size, reduce: shared.append((model, size, reduce)))
    convnet = ["--model", "resnet10t", "--num-classes", "3", "--img-size", "32"]
    session = session_of(images, tmp_path, "--model-ema", model=convnet)
    session.world = World(torch.device("cpu"), distributed=True, size=2)
    loop.Trainer(session, SignalWatch())._share_batch_norm()
    averaged = unwrap_model(session.task.get_eval_model(ema=True))
    assert [(model is session.model, model is averaged) for model, _, _ in shared] == [(True, False), (False, True)]


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")
def test_a_plateau_schedule_begins_its_warm_up_where_the_run_does(images, tmp_path):
    words = ("--sched", "plateau", "--warmup-epochs", "5", "--start-epoch", "3", "--epochs", "4", "--val-interval", "2")
    folder = train(images, tmp_path, *words)
    with open(folder / "summary.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["lr"]) == pytest.approx(1e-5 + 3 / 5 * (1e-3 - 1e-5))


def test_a_milestone_is_validated_whatever_the_interval(images, tmp_path):
    folder = train(images, tmp_path, "--epochs", "3", "--val-interval", "3", "--save-epochs", "1")
    assert listed(folder) == [("0", True), ("2", True)]
    assert load(folder / "milestone-1.pth.tar")["metric"] is not None


def test_a_lookahead_optimizer_is_synchronised_at_the_end_of_an_epoch(images, tmp_path, monkeypatch):
    """The slow weights begin with the sixth update; after the seventh and last, the model goes half the way to them."""
    session = session_of(images, tmp_path, "--opt", "lookahead_adamw")
    weight = session.model.get_parameter("blocks.1.mlp.fc1.weight")
    trainer, reached = loop.Trainer(session, SignalWatch()), []
    monkeypatch.setattr(session.task, "update_ema", lambda step: reached.append(weight.detach().clone()))
    trainer.train_epoch(0)
    assert len(reached) == 7
    torch.testing.assert_close(weight.detach(), (reached[5] + reached[6]) / 2)
    assert not torch.equal(reached[5], reached[6])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--warmup-epochs 2", True),
        ("--warmup-epochs 2 --stop-epoch 1", True),
        ("--warmup-epochs 1", False),
        ("--warmup-epochs 2 --warmup-prefix", False),
        ("--warmup-epochs 2 --sched none", False),
    ],
)
def test_a_run_that_never_leaves_its_warm_up_says_so(words, said, images, tmp_path, caplog):
    session_of(images, tmp_path, *words.split())
    assert ("never leave the warm-up" in caplog.text) == said


@pytest.mark.parametrize("clip", [(), ("--clip-grad", "0.1")], ids=["free", "clipped"])
def test_a_group_that_the_data_did_not_complete_is_one_update_under_a_loss_scaler_too(
    clip, images, tmp_path, monkeypatch
):
    words = ("--no-aug", "--opt", "sgd", *clip)
    whole = session_of(images, tmp_path, *words, "-b", "56")
    loop.Trainer(whole, SignalWatch()).train_epoch(0)
    monkeypatch.setattr(ReplayLoader, "__len__", lambda self: len(self.loader) + 1)
    parts = session_of(images, tmp_path, *words, "-b", "14", "--grad-accum-steps", "5")
    parts.scaler = NativeScaler(device="cpu")
    loop.Trainer(parts, SignalWatch()).train_epoch(0)
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_first_epoch_behind_the_last_one_is_refused(images, tmp_path, capsys):
    assert main(command(images, tmp_path, "--start-epoch", "2")) == 1
    assert "--start-epoch 2 leaves nothing to train of 2 epochs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_mixup_by_halves_trains_on_half_of_each_batch_as_timm_s_prefetcher_makes_it(images, tmp_path):
    session = session_of(images, tmp_path, "--mixup", "0.5", "--mixup-mode", "half")
    session.data.start_epoch(0, 0)
    assert {len(batch) for batch, _ in session.data.batches()} == {4}
