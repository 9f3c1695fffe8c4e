"""tweo-survey --merge: surveys of several reports in one table, kept by the fingerprints of weights and images."""

import json

import pytest
import torch

from tests.evaluate.conftest import make_model, save_checkpoint
from tweo_timm.evaluate.cli import main as validate
from tweo_timm.evaluate.zoo_cli import main


@pytest.fixture
def reports(tmp_path, common, monkeypatch):
    """Reports of two models, the second of them surveyed twice."""
    monkeypatch.setattr("tweo_timm.survey.survey.survey.__defaults__", (("bf16",),))
    checkpoint = save_checkpoint(tmp_path / "one" / "last.pth.tar", make_model(0))
    words = ["--checkpoint", checkpoint, *common, "--survey", "--max-drop", "100", "--report", tmp_path / "one"]
    assert validate([str(word) for word in words]) == 0
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    row = report["checkpoints"][0]
    for name in ("two", "again"):
        row["name"], row["survey"]["weights"] = name, "0123456789abcdef"
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    return [str(tmp_path / path) for path in ("one/report.json", "two.json", "again.json")]


def test_rows_of_the_same_weights_and_images_are_one_and_the_zoo_grows(reports, tmp_path, capsys):
    for path in reports:
        assert main(["--merge", path, "--output", str(tmp_path / "zoo")]) == 0
    zoo = json.loads((tmp_path / "zoo" / "zoo.json").read_text())["models"]
    assert sorted(row["name"] for row in zoo) == ["again", "one"]
    assert len({row["survey"]["weights"] for row in zoo}) == 2
    assert zoo[0]["survey"]["versions"]["torch"] == torch.__version__
    page = (tmp_path / "zoo" / "README.md").read_text()
    assert "| again |" in page
    assert "not run" in page
    assert "deit\\_small\\_patch16\\_224" in page or "deit_small_patch16_224" in page


def test_a_report_without_a_survey_and_a_broken_zoo_are_refused(checkpoints, common, tmp_path, capsys):
    assert validate([str(w) for w in ["--checkpoint", checkpoints[0], *common, "--report", tmp_path / "r"]]) == 0
    assert main(["--merge", str(tmp_path / "r" / "report.json"), "--output", str(tmp_path)]) == 1
    assert "has no survey" in capsys.readouterr().err
    assert main(["--output", str(tmp_path)]) == 1
    assert "--merge is missing" in capsys.readouterr().err
    (tmp_path / "zoo.json").write_text("{")
    assert main(["--merge", str(tmp_path / "r" / "report.json"), "--output", str(tmp_path)]) == 1
    assert "is no JSON" in capsys.readouterr().err
