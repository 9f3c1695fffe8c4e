"""Schemes that differ in one choice stand side by side in the report."""

import torch

from tests.evaluate.conftest import make_model, run
from tests.evaluate.test_stored import EXPORTED
from tests.evaluate.test_verdict import record, right
from tweo_timm.evaluate.record import Record
from tweo_timm.evaluate.scheme_tables import describe_schemes
from tweo_timm.quant.compensation import added_parameters
from tweo_timm.quant.static import quantize_static
from tweo_timm.schema import build


def rows(parts):
    """The cells below the headings of the only table."""
    (table,) = [part for part in parts if part.startswith("|")]
    heads, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return [dict(zip(heads, line, strict=True)) for line in lines]


def test_the_grid_of_scales_is_one_table_for_all_checkpoints():
    schemes = {f"w8a8-{cell}+res": right(10, wrong) for wrong, cell in enumerate(("tt", "tk", "ct", "ck"), 1)}
    base, tweo = record("base", right(10, 0), schemes), record("tweo", right(10, 0), {"w8a8-tt+res": right(10, 5)})
    first, second = rows(describe_schemes([base, tweo]))
    assert (first["model"], first["scheme"], first["float"]) == ("base", "w8a8-..+res", "100.00")
    assert [first[f"weights {w}, activations {a}"] for w, a in ("TT", "TK", "CT", "CK")] == [
        "90.00",
        "80.00",
        "70.00",
        "60.00",
    ]
    assert [second[f"weights {w}, activations {a}"] for w, a in ("TT", "CK")] == ["50.00", "-"]


def test_schemes_that_share_nothing_make_no_table():
    assert describe_schemes([record("a", right(9, 0), {"w8a8-tt": right(9, 0), "w4a4-tt": right(9, 1)})]) == []


def test_compensations_stand_below_their_scheme_with_what_they_add():
    schemes = {name: right(10, 1) for name in ("w8a8-tt+qwtlinear", "w8a8-tt", "w8a8-tt+qwt", "fp16")}
    mapping = record("a", right(10, 0), schemes).as_json()
    mapping["quantized"][2] |= {"compensation": {"parameters": 1200, "left_after_folding": 0}, "exported": EXPORTED}
    found = rows(describe_schemes([build(Record, mapping)]))
    assert [row["scheme"] for row in found] == ["w8a8-tt", "w8a8-tt+qwtlinear", "w8a8-tt+qwt"]
    assert (found[2]["parameters added"], found[2]["left after export"], found[2]["ms"]) == ("1,200", "0", "1")
    assert found[0]["ms"] == "-"


def test_what_a_compensation_adds_is_counted_by_hand():
    model, images = make_model(0), torch.randn(48, 3, 32, 32)
    assert added_parameters(quantize_static(model, [images], "w4a4-tt")) == (0, 0)
    total, left = added_parameters(quantize_static(model, [images], "w4a4-tt+qwtlinear"))
    assert total == left
    assert total in (32 * 33, 2 * 32 * 33)  # a block whose fit does not help has none
    total, left = added_parameters(quantize_static(model, [images], "w4a4-tt+qwt"))
    assert (total > 0, left) == (True, 0)


def test_both_tables_are_in_a_report(capsys, checkpoints, common, tmp_path):
    words = ["--quantize", "w4a4-tt", "w4a4-ck", "w4a4-tt+qwt", "--calibration-images", 8, "--report", tmp_path]
    assert run(capsys, "--checkpoint", checkpoints[0], *common, *words)[0] == 0
    page = (tmp_path / "report.md").read_text()
    assert "## Scales of weights and activations" in page
    assert "## What compensations cost" in page
