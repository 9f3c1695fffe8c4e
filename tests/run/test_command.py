"""What every command does around its work: statuses, one-line errors, closed pipes, the name it goes by."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tweo_timm.run import command as command_module
from tweo_timm.run.command import Call, Command, run
from tweo_timm.run.failure import Failure
from tweo_timm.run.recipe import RecipeError

ROOT = Path(__file__).parents[2]


def command_that(work, monkeypatch, parse=None):
    monkeypatch.setattr(command_module, "_found", lambda entry: lambda options, call: work())
    options = SimpleNamespace(print_config=False)
    return Command("some.py", "tweo-some", parse or (lambda words, prog: options), "nowhere:work")


def raising(error):
    def work(*_):
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("--lr 0: too low"), 1, "some.py: error: --lr 0: too low\n"),
        (
            OSError(28, "No space left on device", "a.csv"),
            1,
            "some.py: error: [Errno 28] No space left on device: 'a.csv'\n",
        ),
        (Failure("cannot read image a.png"), 1, "some.py: error: cannot read image a.png\n"),
        (ValueError("two\n\tlines \x1b[2J"), 1, "some.py: error: two lines \\x1b[2J\n"),
        (RecipeError("a.yaml: unknown key 'x'"), 2, "some.py: error: a.yaml: unknown key 'x'\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_of_the_users_is_one_line_and_a_status(error, status, said, monkeypatch, capsys):
    assert run(command_that(raising(error), monkeypatch), []) == status
    assert capsys.readouterr().err == said
    if not isinstance(error, KeyboardInterrupt):
        assert run(command_that(lambda: 0, monkeypatch, raising(error)), []) == status


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run(command_that(raising(ZeroDivisionError()), monkeypatch), [])


def test_the_status_of_the_work_is_the_commands(monkeypatch):
    assert run(command_that(lambda: 143, monkeypatch), []) == 143


def test_a_call_reads_as_it_was_typed():
    assert str(Call("validate.py", ("--checkpoint", "a b"))) == "validate.py --checkpoint 'a b'"


@pytest.mark.parametrize(
    ("started", "argv", "named"),
    [
        ("tweo-some", None, "tweo-some"),
        ("tweo-some.exe", None, "tweo-some"),
        ("pytest", None, "some.py"),
        ("tweo-some", [], "some.py"),
    ],
)
def test_a_command_goes_by_the_name_it_was_started_by(started, argv, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{started}"])
    assert run(command_that(raising(ValueError("x")), monkeypatch), argv) == 1
    assert capsys.readouterr().err == f"{named}: error: x\n"


@pytest.mark.parametrize(("program", "module"), [("tweo-train", "train"), ("tweo-validate", "evaluate")])
def test_help_names_the_command_and_loads_no_torch_timm_or_numpy(program, module):
    code = f"""
import sys
sys.argv = ["/bin/{program}", "-h"]
from tweo_timm.{module}.cli import main
try:
    main()
except SystemExit as end:
    heavy = sorted({{"torch", "timm", "numpy", "matplotlib", "rich"}} & sys.modules.keys())
    print(end.code, heavy, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == "0 []\n"
    assert done.stdout.startswith(f"usage: {program} ")


def shell(line):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = ["bash", "-c", f"set -o pipefail; {line}"]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, env=environment, cwd=ROOT)


@pytest.mark.parametrize("words", ["-h", "--print-config"])
@pytest.mark.parametrize("program", ["train.py", "validate.py"])
def test_a_reader_that_goes_away_is_no_error(program, words):
    done = shell(f"{sys.executable} {program} {words} | sleep 0")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_behind_the_output_is_one_line():
    done = shell(f"{sys.executable} train.py --print-config > /dev/full")
    assert done.returncode == 1
    assert done.stderr == "train.py: error: [Errno 28] No space left on device: 'standard output'\n"


def test_work_goes_on_after_its_reader_has_gone(monkeypatch):
    code = """
import sys, time
from tweo_timm.run.command import printing
sys.stdin.read()  # until the reader has gone
for word in ("one", "two"):
    with printing():
        print(word * 100_000)
print("done", file=sys.stderr)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b"done\n"
    assert process.wait(60) == 0
    process.stderr.close()
