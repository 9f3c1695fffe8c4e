"""A training that timm's sweep.py starts; the behaviours are those that timm 1.0.31's tests/test_sweep.py asks for."""

import fcntl
import os

import pytest
import yaml

from tests.train.runs import command
from tweo_timm.train.cli import main
from tweo_timm.train.step import TrainStep


def is_free(path):
    """Whether a process could have the lock alone; flock asks it of each opening of a file anew."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


@pytest.fixture
def attempt(tmp_path):
    """Two lock files, the file of the live attempt, and the words that name them."""
    locks = [tmp_path / "plan.lock", tmp_path / "job.train"]
    for path in locks:
        path.touch()
    live = tmp_path / "job.attempt"
    live.write_text("a1")
    return locks, live, ["--sweep-locks", *map(str, locks), "--sweep-attempt", str(live), "a1"]


def test_a_training_of_a_sweep_holds_its_locks_until_it_ends_and_records_no_word_of_them(
    images, tmp_path, attempt, monkeypatch
):
    locks, _, words = attempt
    free, step = [], TrainStep.__call__

    def call(self, *batch):
        free.extend(map(is_free, locks))
        step(self, *batch)

    monkeypatch.setattr(TrainStep, "__call__", call)
    assert main([*command(images, tmp_path), *words, "--epochs", "1"]) == 0
    assert free
    assert not any(free)
    assert all(map(is_free, locks))
    assert not any("sweep" in name for name in yaml.safe_load((tmp_path / "run" / "args.yaml").read_text()))


@pytest.mark.parametrize(("live", "part"), [("a2\n", "not the live one (a2 is)"), ("", "it was retired")])
def test_an_attempt_that_was_given_up_trains_nothing(live, part, images, tmp_path, attempt, capsys):
    locks, file, words = attempt
    file.write_text(live)
    assert main([*command(images, tmp_path), *words]) == 1
    assert part in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert all(map(is_free, locks))


def test_half_of_a_sweep_s_words_or_a_file_that_is_not_there_is_one_line(images, tmp_path, attempt, capsys):
    _, file, words = attempt
    assert main([*command(images, tmp_path), *words[:3]]) == 1
    assert "--sweep-attempt belong together" in capsys.readouterr().err
    file.unlink()
    assert main([*command(images, tmp_path), *words]) == 1
    assert f"--sweep-attempt {file}: No such file" in capsys.readouterr().err
