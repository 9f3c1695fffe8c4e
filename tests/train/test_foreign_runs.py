"""What lies in a run folder is a stranger's word: nothing outside is touched, nothing odd stops or misleads a run."""

import copy
import csv
import json
import multiprocessing
import subprocess

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import processes
from tests.train.runs import command, last, load, rows, session_of, train
from tweo_timm.run.checkpoint_file import CheckpointFile
from tweo_timm.train.checkpoint import AtomicSaver
from tweo_timm.train.cli import main
from tweo_timm.train.folder import LOCK, locked
from tweo_timm.train.loop import Trainer
from tweo_timm.train.options import as_namespace
from tweo_timm.train.signals import SignalWatch


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A run of two epochs that is over."""
    return train(images, tmp_path_factory.mktemp("finished"), "--model-ema")


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it as `run`, so that the same command continues it."""
    subprocess.run(["cp", "-r", str(finished), str(tmp_path / "run")], check=True)
    return tmp_path / "run"


def edited(path, change):
    content = load(path)
    change(content)
    torch.save(content, path)


def more_epochs(images, folder, *more):
    return main(command(images, folder.parent, "--model-ema", "--epochs", "3", "--resume", "auto", *more))


# ------------------------------------------------------------------------------------------- names, paths and links


@pytest.mark.parametrize(
    "name",
    ["../../precious.txt", "{outside}/precious.txt", "precious.txt", "checkpoint-0.pth.tar/../precious.txt", "link", 5],
)
def test_files_that_a_checkpoint_lists_are_removed_only_if_they_are_the_saver_s(name, images, folder, tmp_path):
    precious = [tmp_path / "precious.txt", folder / "precious.txt", tmp_path.parent / "precious.txt"]
    for path in precious:
        path.write_text("precious")
    if name == "link":
        (folder / "checkpoint-9.pth.tar").symlink_to(precious[0])
        name = "checkpoint-9.pth.tar"
    name = name.format(outside=tmp_path) if isinstance(name, str) else name
    edited(folder / "last.pth.tar", lambda c: c["saver"].update(checkpoint_files=[(name, -1.0)]))
    assert more_epochs(images, folder, "--checkpoint-hist", "1") == 0
    assert [path.read_text() for path in precious] == ["precious"] * 3
    precious[2].unlink()


def test_what_the_saver_did_write_is_still_ranked_and_removed(images, folder):
    edited(folder / "last.pth.tar", lambda c: c["saver"].update(checkpoint_files=[("checkpoint-0.pth.tar", -1.0)]))
    assert more_epochs(images, folder, "--checkpoint-hist", "1") == 0
    assert not (folder / "checkpoint-0.pth.tar").exists()


def test_a_ranking_by_another_metric_begins_anew(images, folder, caplog):
    assert more_epochs(images, folder, "--eval-metric", "loss") == 0
    assert "ranking begins anew" in caplog.text
    assert load(folder / "model_best.pth.tar")["epoch"] == 2
    assert all(metric is None for _, metric in last(folder)["saver"]["checkpoint_files"])


@pytest.mark.parametrize("name", [".", "..", "a/../..", "./", "/"])
def test_a_name_of_a_run_is_a_folder_in_the_output(name, images, folder, capsys):
    words = command(images, folder.parent, name=name)
    assert main(words) == 1
    assert "--experiment" in capsys.readouterr().err
    assert folder.exists()


def test_a_link_to_a_checkpoint_is_continued_in_place(images, folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "last.pth.tar").rename(elsewhere / "kept.pth.tar")
    (folder / "last.pth.tar").symlink_to(elsewhere / "kept.pth.tar")
    before = (elsewhere / "kept.pth.tar").read_bytes()
    assert more_epochs(images, folder) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "run"]
    assert {row["epoch"] for row in rows(folder)} == {0, 1, 2}
    assert not (folder / "last.pth.tar").is_symlink()
    assert (elsewhere / "kept.pth.tar").read_bytes() == before


# ---------------------------------------------------------------------------------------------- odd files in the folder


@pytest.mark.parametrize(
    "name", ["recovery-1-9-copy.pth.tar", "recovery-a-b.pth.tar", "recovery-1.pth.tar", "recovery-²-1.pth.tar"]
)
def test_files_of_similar_names_are_left_alone(name, images, folder):
    (folder / name).write_bytes(b"mine")
    assert more_epochs(images, folder) == 0
    assert (folder / name).read_bytes() == b"mine"


@pytest.mark.parametrize(
    "line",
    ['{"epoch": 1, "blo', "\udcff\udcfe", "[1, 2]", '{"epoch": "x"}', "[" * 100_000, '{"epoch": 1e400}'],
    ids=range(6),
)
def test_lines_that_are_no_rows_are_taken_out(line, images, folder):
    with open(folder / "outliers.jsonl", "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(line)
    assert more_epochs(images, folder) == 0
    assert [row["epoch"] for row in rows(folder)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("odd", ["9" * 200_000 + "\n", "\udcff,1\n", "²,1\n", "9" * 5000 + ",1\n"], ids=range(4))
def test_a_table_that_is_none_does_not_end_a_run(odd, images, folder):
    with open(folder / "summary.csv", "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(odd)
    assert more_epochs(images, folder) == 0
    with open(folder / "summary.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)][-1] == "2"


# -------------------------------------------------------------------------------------------------- one run at a time


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]], ids=["new", "continued"])
def test_two_runs_do_not_write_to_one_folder_and_a_killed_one_leaves_no_lock(resume, images, folder, capsys):
    ready, hold = multiprocessing.Event(), multiprocessing.Event()

    def other_run():
        with locked(folder):
            ready.set()
            hold.wait()

    other = processes.start(other_run)
    assert ready.wait(60)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    words = command(images, folder.parent, "--model-ema", "--epochs", "3", *resume)
    assert main(words) == 1
    assert "another run is writing" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    other.kill()
    other.join()
    assert (folder / LOCK).exists()
    assert main(words) == 0
    assert not (folder / LOCK).exists()


# -------------------------------------------------------------------------------------------- fields of other types


def test_a_dictionary_without_an_epoch_begins_at_the_first(images, finished, tmp_path):
    content = last(finished)
    torch.save({key: content[key] for key in ("state_dict", "optimizer")}, tmp_path / "plain.pth.tar")
    folder = train(images, tmp_path, "--resume", str(tmp_path / "plain.pth.tar"), "--epochs", "1")
    with open(folder / "summary.csv") as file:
        (row,) = csv.DictReader(file)
    assert (row["epoch"], float(row["lr"])) == ("0", 1e-3)


@pytest.mark.parametrize("how", ["--resume", "--initial-checkpoint"])
def test_weights_that_are_not_finite_are_refused_by_name(how, images, folder, tmp_path, capsys):
    name = "blocks.0.attn.qkv.weight"
    for entry in ("state_dict", "state_dict_ema"):
        edited(folder / "last.pth.tar", lambda c, entry=entry: c[entry][name][0].fill_(float("nan")))
    words = command(images, tmp_path, "--model-ema", how, str(folder / "last.pth.tar"), name="new")
    assert main(words) == 1
    assert f"{name} is not finite" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def setting(path, value):
    """Set an entry of a nested state."""

    def change(content):
        *parents, leaf = path
        for key in parents:
            content = content[key]
        content[leaf] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (["state_dict"], None, "state_dict is None"),
        (["state_dict"], [], "state_dict"),
        (["optimizer"], [1], "optimizer is of type list"),
        (["optimizer", "state", 0, "exp_avg"], torch.zeros(7, 7, 7), "optimizer: state[0].exp_avg"),
        (["optimizer", "state", 0, "exp_avg"], "x", "optimizer"),
        (["optimizer", "state", 0], {"step": torch.tensor(3.0)}, "optimizer"),
        (["optimizer", "param_groups"], 5, "optimizer"),
        (["exact"], {}, "exact"),
        (["exact", "epoch"], "1", "exact.epoch"),
        (["exact", "processes"], [None], "exact.processes[0] is None"),
        (["exact", "processes", 0, "random", "torch"], torch.zeros(3), "the random state"),
        (["epoch"], -3, "epoch is -3; it must be an integer, at least 0"),
        (["saver", "checkpoint_files"], "abc", "saver.checkpoint_files"),
        (["saver", "best_metric"], float("nan"), "saver.best_metric"),
        (["saver", "pending"], [True, 1], "saver.pending"),
        (["state_dict", "head.bias"], torch.zeros(3, dtype=torch.int64), "head.bias is int64"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, list) else "",
)
def test_an_entry_of_another_type_is_refused_by_name(path, value, named, images, folder, capsys):
    edited(folder / "last.pth.tar", setting(path, value))
    assert (
        main(command(images, folder.parent, "--model-ema", "--resume", str(folder / "last.pth.tar"), "--epochs", "3"))
        == 1
    )
    message = capsys.readouterr().err
    assert named in message
    assert "does not fit this run" in message
    assert message.strip().count("\n") == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**40) | st.just(-1),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value, path=()):
    """Every path to an entry of a checkpoint but its tensors."""
    for key in value if isinstance(value, dict) else range(len(value)):
        here = (*path, key)
        if isinstance(value[key], (dict, list)):
            yield here
            yield from places(value[key], here)
        elif not isinstance(value[key], torch.Tensor):
            yield here


def plain_content(path):
    content = load(path)
    content["args"] = vars(content["args"])
    content["saver"] = json.loads(json.dumps(content["saver"]))
    return content


class Resumption:
    """All that a run takes from a checkpoint before it trains, in a folder of its own."""

    def __init__(self, content, session, folder):
        self.content = content
        self.trainer = Trainer(session, SignalWatch())
        self.folder = folder
        self.places = list(places(content))

    def go_on_from(self, content):
        path = self.folder / "last.pth.tar"
        path.write_bytes(b"")
        file = CheckpointFile(path, content)
        self.trainer.resume(file)
        AtomicSaver(self.folder, as_namespace(self.trainer.session.options)).take_over(file)
        self.trainer.set_off()

    def try_with(self, place, value):
        """Put a value in place of an entry; what comes of it is a run that goes on, or one line that names the file."""
        changed = inner = copy.copy(self.content)
        for key in place[:-1]:
            inner[key] = copy.copy(inner[key])
            inner = inner[key]
        inner[place[-1]] = value
        message = "last.pth.tar"
        try:
            self.go_on_from(changed)
        except ValueError as error:
            message = str(error)
        assert "last.pth.tar" in message, (place, value, message)
        assert "\n" not in message.rstrip(), (place, value, message)


@pytest.fixture(scope="module", params=["between epochs", "inside an epoch"])
def resumption(request, images, finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("resumption")
    path = finished / "last.pth.tar"
    if request.param == "inside an epoch":
        folder = train(images, out, "--model-ema", "--recovery-interval", "3", name="inside")
        path = folder / "recovery-1-3.pth.tar"
    return Resumption(plain_content(path), session_of(images, out, "--model-ema", "--epochs", "3"), out)


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.integers(0, 10**6), value=JSON)
def test_no_value_in_place_of_any_entry_is_a_traceback(place, value, resumption):
    resumption.try_with(resumption.places[place % len(resumption.places)], value)


@pytest.mark.slow
@settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.integers(0, 10**6), value=JSON)
def test_no_value_in_place_of_any_entry_is_a_traceback_at_length(place, value, resumption):
    resumption.try_with(resumption.places[place % len(resumption.places)], value)


def test_the_untouched_checkpoint_goes_on(resumption):
    resumption.go_on_from(resumption.content)
    assert resumption.trainer.cursor.epoch in (1, 2)
