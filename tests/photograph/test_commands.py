"""What the two commands print: -h, --print-config, and the message and status of every refusal of a setting.

golden/train_config.txt holds the settings without any flag in full, then, for every recipe and every args.yaml in
tests/golden, its messages and the lines that differ. golden/*_refusals.json holds the wrong inputs themselves: words
after those of a run that is possible, the text of recipe.yaml where one is read, then the outcome; "at" says whether
--print-config refuses too (settings) or only the command that runs (run). A new case is an entry with its "words", and
--update-golden.

Not here, since tests/train/test_watch.py, test_readers.py and tests/evaluate/test_refusals.py hold status and message:
what is wrong with a file, an image, a checkpoint or a machine. Left out by name, because torch, Python or timm words
them: --opt-betas, unknown names and values of --model-kwargs, backends of --torchcompile, --target-key; and of a choice
that there is none of, the list of choices, which releases of Python quote in two ways.
"""

import json
import logging
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from tests.photograph.runs import take, words_of

ROOT = Path(__file__).parents[2]
FILES = [*sorted(ROOT.glob("tests/golden/args_yaml/*.yaml")), *sorted(ROOT.glob("recipes/*.yaml"))]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="Python 3.13 prints flags of several names in another way")
@pytest.mark.parametrize("program", ["train.py", "validate.py"])
def test_help(program, golden):
    shown = take(program, ["-h"])
    assert (shown.status, shown.err) == (0, "")
    golden.text(f"{program.removesuffix('.py')}_help.txt", shown.out)


def settings_by_name(text):
    """The lines of each setting, as they were printed."""
    return re.findall(r"^\S.*\n(?:[ -].*\n)*", text, re.MULTILINE)


def test_configuration_of_every_recipe_and_every_args_yaml(golden, caplog, monkeypatch):
    monkeypatch.chdir(ROOT)
    caplog.set_level(logging.INFO)
    default = take("train.py", ["--print-config"])
    assert (default.status, default.err) == (0, "")
    assert "".join(settings_by_name(default.out)) == default.out
    parts = [default.out]
    for path in (path.relative_to(ROOT) for path in FILES):
        caplog.clear()
        shown = take("train.py", ["-c", str(path), "--print-config"])
        said = [f"# {record.levelname}: {record.getMessage()}\n" for record in caplog.records]
        usual = set(settings_by_name(default.out))
        own = [lines for lines in settings_by_name(shown.out) if lines not in usual]
        assert yaml.safe_load(shown.out).keys() == yaml.safe_load(default.out).keys()
        parts.append(f"\n--- {path}: {shown.status}\n{shown.err}{''.join(said)}{''.join(own)}")
    golden.text("train_config.txt", "".join(parts))


def test_configuration_of_a_validation(golden):
    shown = take("validate.py", ["--print-config"])
    assert (shown.status, shown.err) == (0, "")
    golden.text("validate_config.txt", shown.out)


class Outcome:
    """Runs a command with wrong words, in a folder of its own, and describes how it ended."""

    def __init__(self, program, possible, **places):
        self.program, self.possible = program, possible
        self.places = {f"{{{name}}}": str(place) for name, place in places.items()}
        self.recipe = places["here"] / "recipe.yaml"

    def of(self, case):
        self.recipe.write_text(case.get("recipe", ""))
        words = case["words"]
        for name, place in self.places.items():
            words = words.replace(name, place)
        words = [*self.possible, *shlex.split(words)]
        at, ended = "settings", take(self.program, [*words, "--print-config"])
        if ended.status == 0:
            at, ended = "run", take(self.program, words)
        return {**case, "at": at, "status": ended.status, "message": self._message(ended.err)}

    def _message(self, err):
        """The first line of the error. (torch or timm may have said something before it, PyYAML goes on after it.)"""
        message = next((line for line in err.splitlines() if line.startswith(f"{self.program}: error:")), err)
        for name, place in self.places.items():
            message = message.replace(place, name)
        # Releases of Python quote the choices of a flag in two ways.
        return re.sub(r"\(choose from.*", "(choose from ...", message)


def only_the_input(case):
    return {key: case[key] for key in ("words", "recipe") if key in case}


def test_refusals_of_training(golden, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = json.loads(golden.read("train_refusals.json"))
    outcome = Outcome("train.py", words_of("vit", images, tmp_path / "out"), images=images, here=tmp_path)
    golden.json("train_refusals.json", [outcome.of(only_the_input(case)) for case in cases])
    assert not (tmp_path / "out").exists()


def test_refusals_of_validation(golden, run, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = json.loads(golden.read("validate_refusals.json"))
    possible = ["--checkpoint", str(run / "last.pth.tar"), "--data-dir", str(images)]
    possible += ["--device", "cpu", "-j", "0", "-b", "4"]
    outcome = Outcome("validate.py", possible, images=images, run=run, here=tmp_path)
    golden.json("validate_refusals.json", [outcome.of(only_the_input(case)) for case in cases])
