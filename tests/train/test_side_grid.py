"""--side-grid: every combination is the run that its own settings give, from one cache."""

import csv

import pytest

from tests.train.runs import command, last, same_tensors, train
from tweo_timm.run.failure import Failure
from tweo_timm.train import command as training
from tweo_timm.train.cli import main
from tweo_timm.train.options import parse_train_options
from tweo_timm.train.side_grid import points

SIDE = ["--side", "miet", "--side-gap", "1", "--side-rank", "4", "--no-aug", "--side-cache"]
GRID = ["--side-grid", "lr=1e-3,3e-3", "rank=4,8"]


def table(folder):
    return list(csv.DictReader((folder / "grid.csv").read_text().splitlines()))


def test_each_combination_is_its_own_run_and_a_table_compares_them(images, tmp_path, capsys):
    grid = train(images, tmp_path, *SIDE, str(tmp_path / "features"), *GRID)
    printed = capsys.readouterr().out
    names = ["lr=0.001,rank=4", "lr=0.001,rank=8", "lr=0.003,rank=4", "lr=0.003,rank=8"]
    assert [row["setting"] for row in table(grid)] == names
    assert all(f"| {name} | " in printed for name in names)
    own = [*SIDE, str(tmp_path / "features"), "--lr", "3e-3", "--side-rank", "8"]
    alone = train(images, tmp_path, *own, name="alone")
    for entry in ("state_dict", "optimizer"):
        assert same_tensors(last(alone)[entry], last(grid / "lr=0.003,rank=8")[entry])
    assert (alone / "summary.csv").read_text() == (grid / "lr=0.003,rank=8" / "summary.csv").read_text()
    row = table(grid)[3]
    assert float(row["top1"]) == last(alone)["saver"]["best_metric"]
    assert int(row["trained_parameters"]) == sum(v.numel() for v in last(alone)["state_dict"].values())
    assert (int(row["bytes_16bit"]), int(row["bytes_8bit"])) == (17 * 32 * 2, 17 * 32 + 4)


def test_a_combination_that_breaks_does_not_take_the_others_along(images, tmp_path, monkeypatch):
    run = training.train_once

    def breaks(options, *rest):
        if options.side_rank == 4:
            raise Failure("the loss is not finite")
        return run(options, *rest)

    monkeypatch.setattr(training, "train_once", breaks)
    assert main(command(images, tmp_path, *SIDE, str(tmp_path / "features"), "--side-grid", "rank=4,8")) == 1
    stopped, whole = table(tmp_path / "run")
    assert stopped["stopped"] == "the loss is not finite"
    assert whole["top1"]


@pytest.mark.parametrize(
    ("grid", "part"),
    [
        (["ranks=4"], "did you mean 'rank'"),
        (["gap=1,2"], "leaves the backbone's features"),
        (["rank"], "NAME=VALUE,VALUE"),
        (["rank=four"], "an integer"),
        (["rank=0"], "--side-grid at rank=0: --side-rank is 0"),
        (["rank=4", "side-rank=8"], "names a setting twice"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(grid, part):
    options = parse_train_options([*SIDE, "x", "--experiment", "e", "--side-grid", *grid])
    with pytest.raises(ValueError, match=part):
        points(options)


@pytest.mark.parametrize(("words", "part"), [(SIDE[:-1], "give --side-cache"), ([*SIDE, "x"], "--experiment NAME")])
def test_a_grid_needs_a_cache_and_a_name(words, part):
    with pytest.raises(ValueError, match=part):
        parse_train_options([*words, "--side-grid", "rank=4"])
