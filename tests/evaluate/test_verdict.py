"""The lines above a report: which checkpoint, which scheme is safe on these images, and what to do."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluate.conftest import run
from tests.evaluate.test_compare import record as stored
from tests.evaluate.test_stored import EXPORTED
from tweo_timm.evaluate.compare import paired_difference
from tweo_timm.evaluate.record import Record
from tweo_timm.evaluate.verdict import TOLERANCE, judge, verdict
from tweo_timm.schema import build

FIDELITY = {"relative_error": 0.1, "top1_agreement": 1.0, "num_images": 64}


def right(count, wrong):
    return [index >= wrong for index in range(count)]


def record(name, bits, schemes=(), **more):
    quantized = [
        {key: stored("", of_scheme)[key] for key in ("top1", "correct")} | {"scheme": scheme, "fidelity": FIDELITY}
        for scheme, of_scheme in dict(schemes).items()
    ]
    return build(Record, stored(name, bits) | {"quantized": quantized} | more)


def test_two_images_of_150_are_not_called_a_loss_and_not_called_safe():
    subject = record("a", right(150, 8), {"w8a8-tt": right(150, 10)})
    (found,) = verdict([subject]).schemes
    assert found.difference == pytest.approx(-100 * 2 / 150)
    assert found.judged == "open"
    assert found.images > 300
    assert f"score about {found.images:,} images: 150 cannot tell" in verdict([subject]).lines[2]


def test_no_difference_on_few_images_is_no_certainty():
    assert judge(*pair(20, 0)).judged == "open"
    assert judge(*pair(5000, 0)).judged == "safe"
    assert judge(*pair(5000, 500)).judged == "costs"


def pair(count, lost):
    subject = record("a", right(count, 0), {"w8a8-tt": right(count, lost)})
    return subject, subject.quantized[0]


@pytest.mark.parametrize("share", [0.005, 0.02, 0.1])
@pytest.mark.parametrize("count", [150, 1000])
def test_the_interval_of_few_differing_images_covers_the_truth(share, count):
    # Each of two models alone is right on `share` and half of it of the images: the truth is half of `share`.
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(1500):
        drawn = torch.rand(count, generator=generator)
        only_a, only_b = drawn < share, (drawn >= share) & (drawn < 1.5 * share)
        _, low, high, _ = paired_difference(only_a, only_b)
        covered += low <= -50 * share <= high
    assert covered / 1500 >= 0.93


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_safe_means_that_the_interval_ends_above_the_tolerance(pairs):
    a, b = (list(bits) for bits in zip(*pairs, strict=True))
    found = judge(subject := record("a", a, {"w8a8-tt": b}), subject.quantized[0])
    low, high = found.ci95
    assert -100 <= low <= found.difference <= high <= 100
    assert (found.judged == "safe") == (low >= -TOLERANCE)


def test_of_checkpoints_that_images_cannot_tell_apart_the_one_with_the_smaller_peak_is_taken():
    a, b = record("a", right(150, 8), peak_abs=90.0), record("b", right(150, 10), peak_abs=9.0)
    found = verdict([a, b])
    assert found.checkpoint == "b"
    assert "do not tell the two files apart, and its largest activation is smaller (9, there 90)" in found.lines[0]
    assert verdict([record("a", right(150, 8)), record("b", right(150, 80))]).checkpoint == "a"


def test_two_files_differ_where_interval_and_mcnemars_test_say_so():
    a, b = record("a", right(60, 0)), record("b", right(60, 5))
    paired = paired_difference(torch.tensor(right(60, 5)), torch.tensor(right(60, 0)))
    assert paired.low > 0
    assert paired.p > 0.05
    assert "do not tell the two files apart" in verdict([a, b]).lines[0]
    assert "these two files differ" in verdict([a, record("b", right(60, 9))]).lines[0]


def test_a_model_without_outliers_has_nothing_to_gain():
    assert (
        "nothing to gain from TWEO or a rotation, since peaks are below tau (3)"
        in verdict([record("a", right(9, 1), peak_abs=2.9)]).lines[2]
    )
    for more in ({"peak_abs": 3.1}, {"peak_abs": 2.9, "training_peak_abs": 50.0}):
        assert "nothing to gain" not in verdict([record("a", right(9, 1), **more)]).lines[2]


def test_a_file_is_deployed_as_it_was_scored_and_a_survey_is_what_eight_bits_cost():
    file = verdict([record("a", right(9, 1), checkpoint="a.onnx", precision="w8a8-tt")])
    assert "scored as it is: w8a8-tt" in file.lines[1]
    assert "deploy a.onnx" in file.lines[2]
    surveyed = record("a", right(9, 1))
    surveyed.answers["survey"] = object()
    assert "in the survey below" in verdict([surveyed]).lines[1]
    assert "--quantize" not in verdict([surveyed]).lines[2]


def test_what_a_scheme_gains_in_time_is_said_only_where_it_was_measured():
    subject = record("a", right(5000, 0), {"w8a8-tt": right(5000, 0), "w4a4-tt": right(5000, 900)})
    assert "speed" not in verdict([subject]).lines[1]
    assert "--quantize w8a8-tt --export onnx" in verdict([subject]).lines[2]
    mapping = subject.as_json()
    mapping["quantized"][0]["exported"] = EXPORTED
    found = verdict([build(Record, mapping)])
    assert "w8a8-tt is safe" in found.lines[1]
    assert (
        "2.00 times the speed of float32 (the median of 3 rounds, whose spread the report does not have; its qdq file "
        "on some, batch 1, threads 2); w4a4-tt costs accuracy" in found.lines[1]
    )
    assert found.lines[2] == "Next: deploy a/b.onnx."
    exported = json.loads(json.dumps(EXPORTED))
    exported["files"][0]["fault"] = "b.onnx is off"
    mapping["quantized"][0]["exported"] = exported
    assert "deploy" not in verdict([build(Record, mapping)]).lines[2]


def test_a_speed_is_said_with_the_spread_of_its_rounds():
    mapping = record("a", right(5000, 0), {"w8a8-tt": right(5000, 0)}).as_json()
    exported = mapping["quantized"][0]["exported"] = json.loads(json.dumps(EXPORTED))
    for row in exported["latency"][0]["rows"]:
        row |= {"ratio_low": 1.5, "ratio_high": 2.25}
    assert "float32 (1.50 to 2.25 over 3 rounds; its qdq file" in verdict([build(Record, mapping)]).lines[1]
    exported["latency"][0]["rounds"] = 1
    assert "float32 (of one round, which gives no spread; its qdq" in verdict([build(Record, mapping)]).lines[1]


def test_a_scheme_that_has_no_file_is_not_sent_to_be_exported():
    schemes = {"w8a8-tk": right(5000, 0), "fp16": right(5000, 0), "w8a8-ct": right(5000, 0)}
    assert "--quantize w8a8-ct --export onnx" in verdict([record("a", right(5000, 0), schemes)]).lines[2]
    del schemes["w8a8-ct"]
    assert "use w8a8-tk in an engine" in verdict([record("a", right(5000, 0), schemes)]).lines[2]


def test_models_that_cannot_be_scored_are_not_taken():
    broken = record("a", right(9, 1), top1=None, top5=None, correct=None, not_finite=9)
    assert verdict([broken]).checkpoint is None
    assert verdict([broken, record("b", right(9, 1))]).checkpoint == "b"


def test_the_lines_stand_above_the_report_and_in_the_terminal(capsys, checkpoints, common, tmp_path):
    from tweo_timm.evaluate.cli import main

    words = ["--checkpoint", *checkpoints, *common, "--quantize", "w8a8-tt", "--calibration-images", 8]
    assert main([str(word) for word in [*words, "--report", tmp_path]]) == 0
    lines = json.loads((tmp_path / "report.json").read_text())["verdict"]["lines"]
    assert len(lines) == 3
    assert capsys.readouterr().out.splitlines()[:3] == lines
    page = (tmp_path / "report.md").read_text()
    assert [line[2:] for line in page.splitlines()[2:5]] == lines
    assert "These files on these images" in page
    assert run(capsys, "--compare-reports", tmp_path / "report.json")[0] == 0
