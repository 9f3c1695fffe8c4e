"""Paired comparison against brute force and SciPy; reports that must not be compared."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from tweo_timm.evaluate.cli import main
from tweo_timm.evaluate.compare import compare, mcnemar_p, packed, paired_difference, unpacked
from tweo_timm.evaluate.record import Record
from tweo_timm.evaluate.stored import read_reports
from tweo_timm.schema import build


def record(name, correct, fingerprint="x", peak=10.0):
    correct = torch.tensor(correct)
    data = {"fingerprint": fingerprint, "split": "validation", "images": len(correct)}
    top1 = 100 * float(correct.float().mean())
    return (
        {"name": name, "arch": "vit", "top1": top1, "top5": top1, "loss": 1.0, "peak_abs": peak, "peak_block": "b"}
        | {
            "data": data,
            "correct": packed(correct),
            "blocks": [],
            "quantized": [],
            "param_count_m": 1.0,
            "img_size": 32,
        }
        | {"crop_pct": 1.0, "interpolation": "bicubic"}
    )


@settings(derandomize=True, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_packing_keeps_every_image(correct):
    assert unpacked(packed(torch.tensor(correct)), len(correct)).tolist() == correct


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_equals_scipys_binomial_test(only_a, only_b):
    total = only_a + only_b
    expected = binomtest(only_a, total).pvalue if total else 1.0
    assert mcnemar_p(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_many_images_is_close_to_exact():
    assert mcnemar_p(600, 520) == pytest.approx(binomtest(600, 1120).pvalue, rel=0.02)


def test_interval_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        a = torch.rand(500, generator=generator) < 0.7
        b = torch.where(torch.rand(500, generator=generator) < 0.1, torch.rand(500, generator=generator) < 0.5, a)
        # b copies a in 90 % of the images and guesses in the others: its expected accuracy is .9 * .7 + .1 * .5
        _, low, high, _ = paired_difference(a, b)
        covered += low <= -2.0 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_difference_is_that_of_the_accuracies():
    a, b = record("a", [True, False, False, True]), record("b", [True, True, True, False], peak=5.0)
    (entry,) = compare(build(list[Record], [a, b]))
    assert entry.top1_difference == pytest.approx(b["top1"] - a["top1"])
    assert entry.peak_ratio == 0.5
    assert entry.ci95[0] <= entry.top1_difference <= entry.ci95[1]


def test_different_data_is_refused_by_name():
    with pytest.raises(ValueError, match=r"a and b were validated on different data"):
        compare(build(list[Record], [record("a", [True]), record("b", [True], fingerprint="y")]))


def test_a_split_by_two_names_is_one():
    a, b = record("a", [True]), record("b", [True])
    a["data"]["split"], b["data"]["split"] = "val", "validation"
    assert compare(build(list[Record], [a, b]))[0].top1_difference == 0


def write(path, records, schema=1):
    path.write_text(json.dumps({"schema": schema, "checkpoints": records}))
    return str(path)


def test_reports_of_several_runs_are_compared_without_a_model(tmp_path, capsys):
    files = [write(tmp_path / f"{name}.json", [record(name, [True, False])]) for name in ("a", "b")]
    assert main(["--compare-reports", *files, "--report", str(tmp_path / "both")]) == 0
    report = json.loads((tmp_path / "both" / "report.json").read_text())
    assert [entry["name"] for entry in report["checkpoints"]] == ["a", "b"]
    assert report["comparison"][0]["mcnemar_p"] == 1.0


def test_equal_names_of_several_reports_are_told_apart_by_the_report(tmp_path):
    files = []
    for folder, names in (("plain", ["a", "b"]), ("tweo", ["a", "c"])):
        (tmp_path / folder).mkdir()
        files.append(write(tmp_path / folder / "report.json", [record(name, [True]) for name in names]))
    assert [entry.name for entry in read_reports(files)] == ["plain/a", "b", "tweo/a", "c"]


@pytest.mark.parametrize(("content", "message"), [("{}", "schema"), ("no json", "no report"), (None, "No such file")])
def test_file_that_is_no_report_is_named(tmp_path, content, message):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_reports([str(path)])


def test_newer_schema_is_refused(tmp_path):
    with pytest.raises(ValueError, match="schema 9"):
        read_reports([write(tmp_path / "r.json", [], schema=9)])


def test_comparing_different_data_ends_with_one_line(tmp_path, capsys):
    files = [write(tmp_path / f"{x}.json", [record(x, [True], fingerprint=x)]) for x in "ab"]
    assert main(["--compare-reports", *files, "--report", str(tmp_path / "r")]) == 1
    assert "different data" in capsys.readouterr().err
