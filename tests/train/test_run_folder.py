"""What becomes of a run whose folder somebody touches, and of one that has nothing left to do."""

import os
import shutil

import pytest

from tests.train.runs import command, last, same_tensors, train
from tweo_timm.train.cli import main
from tweo_timm.train.folder import LOCK, locked
from tweo_timm.train.step import TrainStep


@pytest.fixture
def between(monkeypatch):
    """A function that lets something happen after so many micro-batches."""

    def after(batches, happens):
        seen, original = [], TrainStep.__call__

        def call(self, images, targets):
            original(self, images, targets)
            seen.append(1)
            if len(seen) == batches:
                happens()

        monkeypatch.setattr(TrainStep, "__call__", call)

    return after


def test_a_run_whose_folder_is_renamed_ends_in_one_line_and_goes_on_when_it_has_its_name_again(
    images, tmp_path, between, capsys
):
    whole = train(images, tmp_path, name="whole")
    folder, elsewhere = tmp_path / "run", tmp_path / "moved"
    between(10, lambda: folder.rename(elsewhere))  # in the second epoch
    assert main(command(images, tmp_path)) == 1
    assert f"the run folder {folder} was renamed or removed" in capsys.readouterr().err
    assert not folder.exists()
    elsewhere.rename(folder)
    assert main(command(images, tmp_path, "--resume", "auto")) == 0
    assert same_tensors(last(folder)["state_dict"], last(whole)["state_dict"])


def test_a_folder_that_took_the_name_of_a_removed_one_is_left_alone(images, tmp_path, between, capsys):
    folder = tmp_path / "run"

    def replace():
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / LOCK).write_text("another run's")

    between(3, replace)
    assert main([*command(images, tmp_path), "--recovery-interval", "4", "--epochs", "1"]) == 1
    assert "was renamed or removed while the run wrote there" in capsys.readouterr().err
    assert os.listdir(folder) == [LOCK]


def test_a_lock_takes_its_own_file_away_only(tmp_path):
    with locked(tmp_path):
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).write_text("another run's")
    assert (tmp_path / LOCK).read_text() == "another run's"


def test_a_finished_run_that_is_continued_says_so(images, tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    folder = train(images, tmp_path, "--epochs", "1")
    before = (folder / "last.pth.tar").stat().st_mtime_ns
    assert main([*command(images, tmp_path, "--epochs", "1"), "--resume", "auto"]) == 0
    assert "Already finished: 1 of 1 epochs are done" in caplog.text
    assert capsys.readouterr().out.endswith("--result\n[]\n")
    assert (folder / "last.pth.tar").stat().st_mtime_ns == before
