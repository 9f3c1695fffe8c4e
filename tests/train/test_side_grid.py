"""--side-grid: every combination is the run that its own settings give, from one cache."""

import csv
import multiprocessing
import signal

import pytest

from tests.processes import start
from tests.train.runs import command, last, same_tensors, train, train_together
from tweo_timm.run.failure import Failure
from tweo_timm.side.cache import FeatureCache
from tweo_timm.train import command as training
from tweo_timm.train.cli import main
from tweo_timm.train.folder import locked
from tweo_timm.train.options import parse_train_options
from tweo_timm.train.side_grid import points

LIVE = ["--side", "miet", "--side-gap", "1", "--side-rank", "4", "--no-aug"]
SIDE = [*LIVE, "--side-cache"]
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
    assert main(command(images, tmp_path, *LIVE, "--side-grid", "rank=4")) == 1
    assert table(tmp_path / "run")[0]["stopped"]
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


def test_a_grid_needs_a_name_and_to_know_its_augmentations():
    with pytest.raises(ValueError, match="--experiment NAME"):
        parse_train_options([*SIDE, "x", "--side-grid", "rank=4"])
    with pytest.raises(ValueError, match="--side-grid computes features once: give --no-aug"):
        parse_train_options([*LIVE[:-1], "--experiment", "e", "--side-grid", "rank=4"])


def test_a_grid_without_a_cache_computes_features_once_and_leaves_none(images, tmp_path, monkeypatch):
    words = ["--side-augmentations", "2", "--reprob", "0.5"]
    made = []
    begin = FeatureCache.begin
    monkeypatch.setattr(FeatureCache, "begin", lambda self: made.append(self.name) or begin(self))
    grid = train(images, tmp_path, *LIVE[:-1], *words, "--side-grid", "rank=4,8")
    assert made == ["train", "validation"]
    assert {path.name for path in grid.iterdir()} == {"rank=4", "rank=8", "grid.csv"}
    alone = train(
        images, tmp_path, *SIDE[:6], *words, "--side-cache", str(tmp_path / "f"), "--side-rank", "8", name="a"
    )
    for entry in ("state_dict", "optimizer"):
        assert same_tensors(last(alone)[entry], last(grid / "rank=8")[entry])


def test_a_grid_that_is_interrupted_goes_on_from_the_features_it_had(images, tmp_path, monkeypatch, interrupt):
    whole = train(images, tmp_path / "whole", *LIVE, *GRID)
    words = command(images, tmp_path, *LIVE, *GRID, "--resume", "auto")
    interrupt(20)  # in the second combination
    assert main(words) == 128 + signal.SIGTERM
    assert (tmp_path / "run" / "grid.features").is_dir()
    monkeypatch.setattr(FeatureCache, "begin", None)
    assert main(words) == 0
    assert (tmp_path / "run" / "grid.csv").read_text() == (whole / "grid.csv").read_text()
    for row in table(whole):
        ours, theirs = (last(folder / row["setting"]) for folder in (tmp_path / "run", whole))
        assert same_tensors(ours["state_dict"], theirs["state_dict"])
    assert not (tmp_path / "run" / "grid.features").exists()


@pytest.mark.slow
def test_two_processes_make_the_grid_of_one(images, tmp_path):
    words = [*LIVE, "--opt", "sgd", "--lr", "0.1", "--side-grid", "rank=4,8"]
    alone = train(images, tmp_path, *words, "-b", "56", name="alone")
    assert train_together(command(images, tmp_path, *words, "-b", "28", name="both")) == [0, 0]
    assert [row["top1"] for row in table(alone)] == [row["top1"] for row in table(tmp_path / "both")]
    assert not (tmp_path / "both" / "grid.features").exists()


def test_a_grid_has_its_folder_to_itself_and_makes_none_if_it_cannot_run(images, tmp_path, capsys):
    words = command(images, tmp_path, *LIVE, *GRID)
    assert main([*words, "--tweo-blocks", "nothing"]) == 1
    assert not (tmp_path / "run").exists()
    ready = multiprocessing.Event()

    def other_grid():
        (tmp_path / "run").mkdir()
        with locked(tmp_path / "run"):
            ready.set()
            signal.pause()

    other = start(other_grid)
    assert ready.wait(60)
    assert main(words) == 1
    other.kill()
    other.join()
    assert "another run is writing to" in capsys.readouterr().err
