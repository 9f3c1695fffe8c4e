"""Runs of one recipe as a group: intervals that cover what another training would give, and none without several."""

import json

import pytest
import torch
from scipy.stats import ttest_ind

from tests.evaluate.conftest import make_model, run, save_checkpoint
from tests.evaluate.test_compare import record as stored
from tweo_timm.evaluate.groups import apart, describe_groups, group_runs, read_groups, spread
from tweo_timm.evaluate.record import Record
from tweo_timm.schema import build


@pytest.mark.parametrize("runs", [2, 3, 6])
@pytest.mark.parametrize("other_spread", [0.5, 2.0])
def test_intervals_between_runs_cover_the_truth_as_often_as_they_say(runs, other_spread):
    # Top-1 of a training is 80 +- 2 with the first recipe, 83 +- other_spread with the second.
    generator = torch.Generator().manual_seed(runs)
    samples = torch.randn(3000, 2, runs, generator=generator, dtype=torch.float64)
    means, differences = 0, 0
    for first, other in samples:
        a, b = (80 + 2 * first).tolist(), (83 + other_spread * other).tolist()
        low, high = spread(a).ci95
        means += low <= 80 <= high
        low, high = apart(a, b).ci95
        differences += low <= 3 <= high
    assert 0.94 <= means / 3000 <= 0.96
    assert 0.935 <= differences / 3000 <= 0.985  # Welch's is careful with two or three runs


def test_the_interval_between_groups_is_scipys():
    a, b = [77.0, 78.5, 76.2], [81.0, 83.0, 82.5, 80.1]
    interval = ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    assert apart(a, b).ci95 == pytest.approx([interval.low, interval.high])


def test_one_run_has_no_interval_and_equal_runs_have_none():
    assert apart([80.0], [81.0, 82.0]).ci95 is None
    assert spread([80.0]).ci95 is None
    assert spread([80.0, 80.0]).ci95 is None
    assert apart([80.0, 80.0], [81.0, 81.0]).ci95 is None


def test_a_group_of_one_run_is_said_to_give_no_interval_and_equal_runs_are_said_to_be_equal():
    records = build(list[Record], [stored(name, [name == "c", True]) for name in "abcde"])
    page = "\n".join(describe_groups(group_runs({"x": ["a"], "y": ["b", "c"], "z": ["d"]}, records), "Top-1"))
    assert "One run gives no interval: x, z. Train with another seed, and add that run." in page
    assert "(1 and 1 runs: one run of a recipe gives no interval, so that the difference may be that of two" in page
    page = "\n".join(describe_groups(group_runs({"x": ["a", "b"], "y": ["d", "e"]}, records), "Top-1"))
    assert "One run" not in page
    assert "(2 and 2 runs, which do not differ in it: no interval)" in page


RUNS = {"a": "runs/a/last.pth.tar", "b": "runs/b/last.pth.tar", "c": None}


def test_runs_are_named_by_name_or_file():
    assert read_groups(["x=a,runs/b/last.pth.tar", "y=c"], RUNS) == {"x": ["a", "b"], "y": ["c"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x"], "--group x: it is no group; write NAME=RUN,RUN"),
        (["x="], "it is no group"),
        (["x=d"], "there is no run 'd'; the runs are a, b, c"),
        (["x=a,b", "y=a"], "run a is given twice"),
        (["x=a,runs/a/last.pth.tar"], "run a is given twice"),
    ],
)
def test_what_is_no_group_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        read_groups(words, RUNS)


def test_groups_hold_metrics_schemes_and_peaks_of_those_runs_that_were_measured():
    records = build(list[Record], [stored(name, [name != "c", True], peak=9.0) for name in "abc"])
    first, other = group_runs({"x": ["a"], "y": ["b", "c", "failed"], "z": ["failed"]}, records)
    assert (first.name, other.runs) == ("x", ["b", "c"])
    assert (other.spreads["top1"].low, other.spreads["top1"].mean, other.spreads["top1"].high) == (50, 75, 100)
    assert other.spreads["peak_abs"].ci95 is None
    assert other.against_first.keys() == {"top1"}


def test_a_report_of_groups_speaks_of_runs_and_one_without_only_of_files(capsys, common, tmp_path):
    names = ("p0", "p1", "t0", "t1")
    paths = [save_checkpoint(tmp_path / name / "last.pth.tar", make_model(seed)) for seed, name in enumerate(names)]
    words = ["--checkpoint", *paths, *common, "--report", tmp_path / "r"]
    assert run(capsys, *words, "--group", "plain=p0,p1", f"tweo={paths[2]},t1")[0] == 0
    page, report = (tmp_path / "r" / "report.md").read_text(), json.loads((tmp_path / "r" / "report.json").read_text())
    assert [group["runs"] for group in report["groups"]] == [["p0", "p1"], ["t0", "t1"]]
    assert "- **tweo** against plain, Top-1 %:" in page
    assert "McNemar" not in page
    words = ["--compare-reports", tmp_path / "r" / "report.json", "--report", tmp_path / "again"]
    assert run(capsys, *words, "--group", "plain=p0,p1", "tweo=t0,t1")[0] == 0
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert again["groups"] == report["groups"]
    assert run(capsys, *words)[0] == 0
    page = (tmp_path / "again" / "report.md").read_text()
    assert "between runs" not in page
    assert "These files on these images" in page


def test_a_group_of_a_run_that_is_not_there_is_refused_before_anything_is_measured(capsys, checkpoints, common):
    status, result, err = run(capsys, "--checkpoint", *checkpoints, *common, "--group", "x=bose,tweo")
    assert (status, result) == (1, None)
    assert "there is no run 'bose'" in err
