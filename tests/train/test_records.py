"""What a run writes beside its checkpoints: statistics, TensorBoard, wandb, health of FP8, images."""

import csv

from tests.train.runs import rows, train


def test_outlier_statistics_of_training_count_the_armed_batches_only(images, tmp_path, monkeypatch):
    from tweo_timm.stats import ActivationStats

    counted = []
    original = ActivationStats.update
    monkeypatch.setattr(ActivationStats, "update", lambda self, x: (counted.append(x.requires_grad), original(self, x)))
    folder = train(
        images,
        tmp_path,
        *(
            "--epochs",
            "1",
            "--outlier-interval",
            "3",
            "--grad-checkpointing",
            "--tensorboard",
            "--grad-accum-steps",
            "2",
        ),
    )
    assert sum(counted) == 2 * 2  # batches 1 and 4 of 7, two blocks, none of them again in the backward pass
    with open(folder / "summary.csv") as file:
        (epoch,) = csv.DictReader(file)
    assert float(epoch["train_tweo_loss"]) > 0  # measured at weight 0, in every batch
    row = rows(folder)[0]
    assert {"train_mean_abs", "train_kurtosis", "train_p999_abs", "eval_mean_abs", "eval_kurtosis"} <= row.keys()
    assert row["train_peak_abs"] > row["train_mean_abs"] > 0


def test_tensorboard_holds_scalars_by_update_and_histograms_of_blocks(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(images, tmp_path, "--epochs", "1", "--tensorboard", "--log-interval", "2")
    board = EventAccumulator(str(folder)).Reload()
    assert {"train_loss", "eval_top1", "step/loss", "step/lr", "train_peak_abs/blocks.0"} <= set(
        board.Tags()["scalars"]
    )
    assert {"train_abs_activation/blocks.1", "eval_abs_activation/blocks.1"} <= set(board.Tags()["histograms"])
    assert [event.step for event in board.Scalars("step/loss")] == [2, 4, 6, 7]


def test_losses_have_a_row_per_log_line_whose_last_is_the_epochs_mean(images, tmp_path):
    folder = train(images, tmp_path, "--epochs", "2", "--log-interval", "3", "--tweo-weight", "0.1")
    found = rows(folder, "losses.jsonl")
    assert [(row["epoch"], row["update"]) for row in found] == [(0, 3), (0, 6), (0, 7), (1, 10), (1, 13), (1, 14)]
    with open(folder / "summary.csv") as file:
        epochs = list(csv.DictReader(file))
    for row, epoch in zip(found[2::3], epochs, strict=True):
        assert row["task_loss"] == float(epoch["train_task_loss"])
    assert found[0]["samples"] * 2 == found[1]["samples"]


def test_fp8_health_is_reported_every_so_many_updates(images, tmp_path):
    settings = ("--epochs", "1", "--fp8", "emulated", "--fp8-health-interval", "3")
    folder = train(images, tmp_path, *settings)
    found = rows(folder, "fp8_health.jsonl")
    assert {row["update"] for row in found} == {0, 3, 6}
    assert {row["tensor"] for row in found} == {"x", "w", "dy"}


def test_wandb_gets_the_rows_of_the_summary(images, tmp_path, monkeypatch):
    import sys
    import types

    calls = []
    run = types.SimpleNamespace(log=calls.append, finish=lambda: calls.append("finish"))
    module = types.SimpleNamespace(init=lambda **kwargs: (calls.append(kwargs), run)[1], __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", module)
    words = ("--log-wandb", "--wandb-project", "tweo", "--wandb-tags", "a", "b", "--wandb-resume-id", "x1")
    train(images, tmp_path, "--epochs", "1", *words)
    started, row, end = calls
    assert (started["project"], started["name"], started["tags"]) == ("tweo", "run", ["a", "b"])
    assert (started["id"], started["resume"]) == ("x1", "must")
    assert started["config"]["batch_size"] == 8
    assert row["epoch"] == 0
    assert "eval_top1" in row
    assert end == "finish"


def test_input_batches_are_saved_at_each_log_line(images, tmp_path):
    folder = train(images, tmp_path, "--epochs", "1", "--save-images", "--log-interval", "4")
    assert sorted(path.name for path in folder.glob("*.jpg")) == ["train-batch-0-4.jpg", "train-batch-0-7.jpg"]
