"""Files are replaced whole, in UTF-8, through no link, and what cannot be written is refused before the work."""

import errno
import json
import os
import subprocess
import sys

import pytest

import tweo_timm.outputs
from tweo_timm.outputs import Outputs
from tweo_timm.records import append_rows


def test_a_file_is_written_in_utf_8_whatever_the_locale_and_leaves_nothing_beside_it(tmp_path):
    code = "from tweo_timm.outputs import Outputs\n"
    code += "Outputs('out').write('a', '\\u00f6\\n')\nOutputs('out').append('a', '\\udcf6\\n')"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=tmp_path, env=environment)
    assert (tmp_path / "out" / "a").read_bytes() == b"\xc3\xb6\n\\udcf6\n"
    assert os.listdir(tmp_path / "out") == ["a"]


def test_rights_are_those_that_open_would_give(tmp_path):
    Outputs(tmp_path).write("ours", "")
    (tmp_path / "theirs").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


class SomeError(Exception):
    """Stands for whatever may happen in the middle of a picture."""


def test_an_error_in_the_middle_leaves_the_old_file(tmp_path, monkeypatch):
    outputs = Outputs(tmp_path)
    outputs.write("results.csv", "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tweo_timm.outputs.os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/results.csv'"):
        outputs.write("results.csv", "new, and longer")
    with pytest.raises(SomeError):
        outputs.picture("results.csv", lambda file: (_ for _ in ()).throw(SomeError))
    assert (tmp_path / "results.csv").read_text() == "old"
    assert os.listdir(tmp_path) == ["results.csv"]


@pytest.mark.parametrize("name", ["args.yaml", ".args.yaml.tmp", "args.yaml.tmp"])
def test_no_link_is_followed(name, tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(precious)
    Outputs(tmp_path / "run").write("args.yaml", "lr: 1\n")
    Outputs(tmp_path / "run").picture("args.yaml", lambda file: file.write(b"lr: 2\n"))
    assert precious.read_text() == "precious"
    assert (tmp_path / "run" / "args.yaml").read_text() == "lr: 2\n"
    assert not (tmp_path / "run" / "args.yaml").is_symlink()


def test_rows_are_not_appended_through_a_link(tmp_path):
    (tmp_path / "precious.txt").write_text("precious")
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "precious.txt")
    with pytest.raises(OSError, match=r"rows.jsonl is a symbolic link"):
        append_rows(tmp_path / "rows.jsonl", [{"epoch": 0}])
    assert (tmp_path / "precious.txt").read_text() == "precious"


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_regular_file_is_neither_replaced_nor_waited_for(kind, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    for write in (Outputs(tmp_path).write, Outputs(tmp_path).append):
        with pytest.raises(OSError, match=r"rows.jsonl is no regular file"):
            write("rows.jsonl", "{}")
    with pytest.raises(ValueError, match=r"--results-file .*rows.jsonl: .*no regular file"):
        Outputs(tmp_path).check("--results-file", "rows.jsonl")


def test_a_folder_that_can_be_made_passes_and_is_not_made(tmp_path):
    Outputs(tmp_path / "a" / "b").check("--report")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere/run"])
def test_a_folder_that_cannot_be_written_is_refused_by_flag_and_path(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=rf"^--output {tmp_path / place}(:| is| lies).*name a"):
        Outputs(tmp_path / place).check("--output")


@pytest.mark.parametrize(
    "words",
    [
        ["--report", "/proc/nowhere"],
        ["--results-file", "/proc/results.csv"],
        ["--results-file", "/dev/null"],
    ],
)
def test_validation_refuses_an_unwritable_place_before_it_reads_anything(words, capsys):
    from tweo_timm.evaluate.cli import main

    for more in (["--checkpoint", "nowhere.pth", "--device", "cpu"], ["--compare-reports", "nowhere.json"]):
        assert main([*words, *more]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"validate.py: error: {words[0]} {words[1]}: ")
        assert len(err.splitlines()) == 1


def test_training_refuses_an_unwritable_place_before_it_builds_anything(capsys):
    from tweo_timm.train.cli import main

    assert main(["--output", "/proc/nowhere", "--model", "nosuchmodel", "--device", "cpu"]) == 1
    assert capsys.readouterr().err.startswith("train.py: error: --output /proc/nowhere: cannot write into /proc (")


def test_rows_are_plain_json(tmp_path):
    append_rows(tmp_path / "rows.jsonl", [{"epoch": 0, "peak": float("nan")}])
    append_rows(tmp_path / "rows.jsonl", [{"epoch": 1, "peak": 2.0}])
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["peak"] for line in lines] == [None, 2.0]


def test_a_file_is_not_said_to_be_the_file_that_stands_where_its_folder_should_be(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(ValueError, match=r"--output \S*taken/out.md lies under the file \S*taken: name another place"):
        Outputs(tmp_path / "taken").check("--output", "out.md")
