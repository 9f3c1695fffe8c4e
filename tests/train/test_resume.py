"""A run that was interrupted and continued is, to the last bit, the run that was not."""

import csv
import logging
import os
import random
import resource
import signal

import pytest
import torch
from timm.utils import unwrap_model

from tests.train.runs import command, killed_after_an_update, last, load, rows, same_tensors, start, train
from tweo_timm.run.checkpoint_file import CheckpointFile
from tweo_timm.run.progress import ProgressLine
from tweo_timm.run.world import World
from tweo_timm.train import validation
from tweo_timm.train.build import build_session
from tweo_timm.train.checkpoint import restore
from tweo_timm.train.cli import main
from tweo_timm.train.options import parse_train_options

ALL_RANDOM = [
    *("--model-ema", "--model-ema-decay", "0.9", "--mixup", "0.5", "--cutmix", "0.5", "--reprob", "0.5"),
    *("--remode", "pixel", "--drop", "0.1", "--drop-path", "0.1", "--grad-accum-steps", "2", "--tweo-weight", "0.1"),
    *("--tweo-schedule", "cosine", "--tweo-tau", "0.5", "--outlier-interval", "2", "--clip-grad", "1.0"),
]
LOADERS = {
    "prefetcher": ["-j", "0"],
    "prefetcher and workers": ["-j", "2"],
    "no prefetcher": ["-j", "0", "--no-prefetcher"],
    "no prefetcher but workers": ["-j", "2", "--no-prefetcher"],
}
TENSORS = ("state_dict", "state_dict_ema", "optimizer")


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    """Run folders of runs that nothing interrupted, by loader."""
    out = tmp_path_factory.mktemp("uninterrupted")
    return {name: train(images, out, *ALL_RANDOM, *extra, name=name) for name, extra in LOADERS.items()}


def assert_same_run(folder, reference):
    continued, whole = last(folder), last(reference)
    for key in TENSORS:
        assert same_tensors(continued[key], whole[key]), key
    assert same_tensors(continued["exact"]["processes"], whole["exact"]["processes"])
    assert continued["metric"] == whole["metric"]
    for name in ("summary.csv", "outliers.jsonl", "losses.jsonl"):
        assert (folder / name).read_text() == (reference / name).read_text(), name
    kept = [
        {path.name for path in root.glob("*.pth.tar*") if "recovery" not in path.name} for root in (folder, reference)
    ]
    assert kept[0] == kept[1]
    best = [load(root / "model_best.pth.tar") for root in (folder, reference)]
    assert same_tensors(best[0]["state_dict_ema"], best[1]["state_dict_ema"])


@pytest.mark.parametrize(
    ("loader", "batches"),
    [
        ("prefetcher", 1),
        ("prefetcher", 3),
        ("prefetcher", 10),
        ("prefetcher and workers", 3),
        ("no prefetcher", 3),
        ("no prefetcher but workers", 10),
    ],
)
def test_a_run_stopped_inside_an_epoch_continues_bit_for_bit(
    loader, batches, images, tmp_path, interrupt, uninterrupted
):
    words = command(images, tmp_path, *ALL_RANDOM, *LOADERS[loader], "--resume", "auto")
    interrupt(batches)
    assert main(words) == 128 + signal.SIGTERM
    assert list((tmp_path / "run").glob("recovery-*"))
    assert main(words) == 0
    assert_same_run(tmp_path / "run", uninterrupted[loader])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_job_does_not_take_the_loaders_processes(
    number, images, tmp_path, interrupt, uninterrupted
):
    loader = "prefetcher and workers"
    words = command(images, tmp_path, *ALL_RANDOM, *LOADERS[loader], "--resume", "auto")
    interrupt(3, number, workers_too=True)
    assert main(words) == 128 + number
    assert main(words) == 0
    assert_same_run(tmp_path / "run", uninterrupted[loader])


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning", "ignore:It is highly recommended:UserWarning")
@pytest.mark.parametrize(
    "optimizer", ["adahessian", "lookahead_adahessian", pytest.param("kron", marks=pytest.mark.slow)]
)
def test_an_optimizer_that_draws_random_numbers_goes_on_with_the_next_ones(
    optimizer, images, tmp_path, interrupt, monkeypatch
):
    monkeypatch.setattr("timm.layers.config._USE_FUSED_ATTN", 0)
    train(images, tmp_path, "--opt", optimizer, "--model-ema", name="whole")
    words = command(images, tmp_path, "--opt", optimizer, "--model-ema", "--resume", "auto")
    interrupt(3)
    assert main(words) == 128 + signal.SIGTERM
    assert main(words) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_clipped_softmax_goes_on_clipped(images, tmp_path, interrupt):
    clipped = ["--clipped-softmax", "0.9", "--model-ema"]
    train(images, tmp_path, *clipped, name="whole")
    words = command(images, tmp_path, *clipped, "--resume", "auto")
    interrupt(3)
    assert main(words) == 128 + signal.SIGTERM
    assert main(words) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    train(images, tmp_path, "--model-ema", name="plain")
    assert not same_tensors(last(tmp_path / "plain")["state_dict"], last(tmp_path / "whole")["state_dict"])


def test_a_run_stopped_between_epochs_continues_bit_for_bit(images, tmp_path, interrupt, uninterrupted):
    words = command(images, tmp_path, *ALL_RANDOM, "--resume", "auto")
    interrupt(7, signal.SIGINT)
    assert main(words) == 128 + signal.SIGINT
    assert main(words) == 0
    assert_same_run(tmp_path / "run", uninterrupted["prefetcher"])


def test_a_run_stopped_while_it_validates_continues_bit_for_bit(images, tmp_path, monkeypatch, uninterrupted):
    words = command(images, tmp_path, *ALL_RANDOM, "--resume", "auto")

    class Cut(ProgressLine):
        def advance(self):
            os.kill(os.getpid(), signal.SIGTERM)
            super().advance()

    with monkeypatch.context() as patch:
        patch.setattr(validation, "ProgressLine", Cut)
        assert main(words) == 128 + signal.SIGTERM
    assert main(words) == 0
    assert_same_run(tmp_path / "run", uninterrupted["prefetcher"])


def test_a_finished_run_resumed_changes_nothing_and_reports_its_best(images, tmp_path, capsys, caplog):
    words = command(images, tmp_path, "--resume", "auto")
    assert main(words) == 0
    before = last(tmp_path / "run")
    capsys.readouterr()
    caplog.set_level(logging.INFO)
    assert main(words) == 0
    with open(tmp_path / "run" / "summary.csv") as file:
        best = max(float(row["eval_top1"]) for row in csv.DictReader(file))
    assert f"*** Best metric: {best}" in caplog.text
    assert capsys.readouterr().out.endswith("--result\n[]\n")
    assert same_tensors(last(tmp_path / "run")["state_dict"], before["state_dict"])


def test_a_truncated_checkpoint_is_passed_over_with_a_warning(images, tmp_path, interrupt, uninterrupted, caplog):
    words = command(images, tmp_path, *ALL_RANDOM, "--resume", "auto", "--recovery-interval", "1")
    interrupt(10)
    assert main(words) == 128 + signal.SIGTERM
    newest = sorted((tmp_path / "run").glob("recovery-1-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:5000])
    assert main(words) == 0
    assert newest.name in caplog.text
    assert "truncated" in caplog.text
    assert_same_run(tmp_path / "run", uninterrupted["prefetcher"])


def test_a_folder_of_nothing_but_damaged_checkpoints_is_an_error(images, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pth.tar").write_bytes(b"PK no checkpoint")
    assert main(command(images, tmp_path, "--resume", "auto")) == 1
    assert "none of the 1 checkpoints" in capsys.readouterr().err
    assert (tmp_path / "run" / "last.pth.tar").read_bytes() == b"PK no checkpoint"


def test_a_full_disk_keeps_the_last_good_checkpoint(images, tmp_path, interrupt, capsys, uninterrupted):
    words = command(images, tmp_path, *ALL_RANDOM, "--resume", "auto")
    interrupt(9)
    assert main(words) == 128 + signal.SIGTERM
    good = (tmp_path / "run" / "last.pth.tar").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, hard))
    try:
        assert main(words) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = capsys.readouterr().err
    assert "cannot write a checkpoint" in message
    assert "recovery-1-1.pth.tar" in message  # written at once
    assert (tmp_path / "run" / "last.pth.tar").read_bytes() == good
    assert not list((tmp_path / "run").glob("*tmp*"))
    assert main(words) == 0
    assert_same_run(tmp_path / "run", uninterrupted["prefetcher"])


def killed_at_random(words, folder, kills, seed):
    """Start, kill at random, start again; let the last one finish. Returns how many were really killed."""
    rng = random.Random(seed)
    hit = 0
    for _ in range(kills):
        process = start(words)
        hit += killed_after_an_update(folder, [process], rng)
        process.join()
    process = start(words)
    process.join()
    assert process.exitcode == 0
    return hit


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_continues_bit_for_bit(kills, images, tmp_path):
    epochs = ["--epochs", "3" if kills == 3 else "12"]
    settings = [*ALL_RANDOM, *LOADERS["prefetcher and workers"], *epochs, "--recovery-interval", "1"]
    reference = start(command(images, tmp_path, *settings, name="whole"))
    reference.join()
    assert reference.exitcode == 0
    words = command(images, tmp_path, *settings, "--resume", "auto", name="killed")
    hit = killed_at_random(words, tmp_path / "killed", kills, seed=kills)
    assert hit >= kills // 3
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_checkpoint_of_timm_continues_at_the_next_epoch(images, tmp_path, caplog):
    folder = train(images, tmp_path, "--epochs", "1", name="first")
    content = last(folder)
    torch.save({k: v for k, v in content.items() if k not in ("exact", "saver")}, tmp_path / "timm.pth.tar")
    second = train(images, tmp_path, "--resume", str(tmp_path / "timm.pth.tar"), "--sched-on-updates", name="second")
    assert [row["epoch"] for row in rows(second)] == [1, 1]
    assert last(second)["exact"]["updates"] == 14


def test_an_average_under_its_old_name_is_the_average(images, tmp_path):
    words = command(images, tmp_path, "--epochs", "1", "--model-ema", "--model-ema-decay", "0.5")
    assert main(words) == 0
    content = last(tmp_path / "run")
    session = build_session(parse_train_options(words), World(torch.device("cpu")))
    old = {"model": content["state_dict"], "model_ema": content["state_dict_ema"], "epoch": 0}
    restore(CheckpointFile(tmp_path / "old.pth.tar", old), session.task, None, None)
    averaged = unwrap_model(session.task.get_eval_model(ema=True))
    assert same_tensors(averaged.state_dict(), content["state_dict_ema"])
    assert same_tensors(session.model.state_dict(), content["state_dict"])


def test_start_epoch_overrides_the_position_of_a_checkpoint(images, tmp_path):
    folder = train(images, tmp_path, "--epochs", "1", name="first")
    again = train(
        images, tmp_path, "--resume", str(folder / "last.pth.tar"), "--start-epoch", "0", "--epochs", "1", name="again"
    )
    assert [row["epoch"] for row in rows(again)] == [0, 0]


def test_resuming_without_the_optimizer_takes_weights_alone(images, tmp_path):
    folder = train(images, tmp_path, "--epochs", "1", name="first")
    again = train(
        images, tmp_path, "--resume", str(folder / "last.pth.tar"), "--no-resume-opt", "--opt", "sgd", name="again"
    )
    assert [row["epoch"] for row in rows(again)] == [1, 1]


def test_going_back_to_an_earlier_checkpoint_drops_what_came_after_it(images, tmp_path):
    folder = train(images, tmp_path, "--epochs", "3", "--recovery-interval", "3", name="run")
    reference = last(folder)["state_dict"]
    assert list(folder.glob("recovery-2-*"))
    checkpoint = str(folder / "checkpoint-0.pth.tar")
    train(images, tmp_path, "--epochs", "3", "--stop-epoch", "2", "--resume", checkpoint, name="run")
    assert not list(folder.glob("recovery-2-*"))
    assert [row["epoch"] for row in rows(folder)] == [0, 0, 1, 1]
    train(images, tmp_path, "--epochs", "3", "--resume", "auto", name="run")
    assert same_tensors(last(folder)["state_dict"], reference)


def rates(folder):
    with open(folder / "summary.csv") as file:
        return [float(row["lr"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["--epochs", "2"], ["--epochs", "4"]),
        (["--epochs", "4", "--stop-epoch", "2", "--lr", "1e-2"], ["--epochs", "4", "--lr", "1e-3"]),
        (["--epochs", "4", "--stop-epoch", "2", "-b", "4"], ["--epochs", "4", "-b", "8"]),
        (["--epochs", "4", "--stop-epoch", "2", "-b", "16"], ["--epochs", "4", "-b", "8"]),
    ],
    ids=["more epochs", "another rate", "larger batches", "smaller batches"],
)
@pytest.mark.parametrize("schedule", [[], ["--sched-on-updates"]], ids=["by epochs", "by updates"])
def test_a_run_that_goes_on_under_other_settings_has_their_learning_rates(first, second, schedule, images, tmp_path):
    whole = rates(train(images, tmp_path, *second, *schedule, name="whole"))
    train(images, tmp_path, *first, *schedule)
    continued = rates(train(images, tmp_path, *second, *schedule, "--resume", "auto"))
    assert continued[2:] == pytest.approx(whole[2:], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("settings", [["-b", "16"], ["--grad-accum-steps", "3"]], ids=" ".join)
def test_an_epoch_under_way_does_not_go_on_in_another_shape(settings, images, tmp_path, interrupt, capsys):
    interrupt(5)
    assert main(command(images, tmp_path)) == 128 + signal.SIGTERM
    assert main(command(images, tmp_path, *settings, "--resume", "auto")) == 1
    message = capsys.readouterr().err
    assert f"{settings[0].replace('-b', '--batch-size')} {8 if '-b' in settings else 1}, now {settings[1]}" in message
    assert "--start-epoch 0" in message


def test_a_run_that_went_back_and_was_interrupted_does_not_return_to_what_it_left(images, tmp_path, interrupt, caplog):
    folder = train(images, tmp_path, "--epochs", "6", "--stop-epoch", "4")
    left = last(folder)
    back = ["--epochs", "6", "--stop-epoch", "3", "--lr", "1e-4"]
    interrupt(3)
    words = command(images, tmp_path, *back, "--resume", str(folder / "checkpoint-0.pth.tar"))
    assert main(words) == 128 + signal.SIGTERM
    train(images, tmp_path, *back, "--resume", "auto")
    assert [row["epoch"] for row in rows(folder)] == [0, 0, 1, 1, 2, 2]
    assert rates(folder)[1] < 1e-4
    assert same_tensors(load(folder / "last.old1.pth.tar")["state_dict"], left["state_dict"])
    assert "last.old1.pth.tar" in caplog.text


def test_an_interrupted_run_without_a_name_says_by_which_it_goes_on(images, tmp_path, interrupt, caplog):
    words = [word for word in command(images, tmp_path) if word not in ("--experiment", "run")]
    interrupt(3)
    assert main(words) == 128 + signal.SIGTERM
    (folder,) = tmp_path.iterdir()
    assert f"--experiment {folder.name} --resume auto" in caplog.text
    assert main([*words, "--experiment", folder.name, "--resume", "auto"]) == 0
    assert [row["epoch"] for row in rows(folder)] == [0, 0, 1, 1]


def test_settings_that_changed_since_the_checkpoint_are_named(images, tmp_path, caplog):
    train(images, tmp_path, "--epochs", "1")
    caplog.clear()
    train(images, tmp_path, "--epochs", "1", "--resume", "auto")
    assert "other settings" not in caplog.text
    train(images, tmp_path, "--epochs", "2", "--resume", "auto", "--clip-grad", "1", "-j", "1", "--log-interval", "9")
    assert "clip_grad None, now 1.0; epochs 1, now 2; workers 0, now 1" in caplog.text
    assert "log_interval" not in caplog.text


def test_a_stop_on_purpose_changes_nothing_of_what_follows(images, tmp_path):
    settings = ["--epochs", "3", "--val-interval", "2", "--drop", "0.1", "--reprob", "0.3"]
    whole = train(images, tmp_path, *settings, name="whole")
    train(images, tmp_path, *settings, "--stop-epoch", "1")
    folder = train(images, tmp_path, *settings, "--resume", "auto")
    assert same_tensors(last(folder)["state_dict"], last(whole)["state_dict"])


def test_a_table_begun_with_other_columns_is_continued_under_ours(images, tmp_path):
    folder = train(images, tmp_path, "--epochs", "1")
    (folder / "summary.csv").write_text("epoch,train_loss,eval_top1,lr\n0,1.5,33.0,0.001\n")
    train(images, tmp_path, "--epochs", "2", "--resume", "auto")
    with open(folder / "summary.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["epoch"] for row in table] == ["0", "1"]
    assert table[0]["eval_top1"] == "33.0"
    assert float(table[1]["train_peak_abs"]) > 0
    assert None not in table[1]
