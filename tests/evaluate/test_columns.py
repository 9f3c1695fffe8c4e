"""A column is one line of a table: in the printed table, in report.csv and after timm's --result."""

import csv

from tests.evaluate.conftest import run
from tweo_timm.evaluate.columns import COLUMNS, Column
from tweo_timm.tables import register


def test_a_registered_column_is_in_every_row_that_it_asks_for(capsys, checkpoints, common, tmp_path):
    with (
        register(COLUMNS, "data.images", Column("data.images", "images", "{:05d}", result=True)),
        register(COLUMNS, "not.there", Column("not.there", "nothing")),
        register(COLUMNS, "crop_pct", Column("crop_pct", csv=False)),
    ):
        status, result, err = run(capsys, "--checkpoint", checkpoints[0], *common, "--report", tmp_path)
    assert status == 0, err
    assert result["data.images"] == 21
    assert list(result)[:3] == ["model", "top1", "top1_err"]  # timm's come first
    heading, _, row = [line for line in (tmp_path / "report.md").read_text().splitlines() if line[:1] == "|"][:3]
    cells = dict(zip(heading.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert (cells["images"], cells["nothing"]) == ("00021", "-")
    (written,) = csv.DictReader((tmp_path / "report.csv").read_text().splitlines())
    assert (written["data.images"], written["not.there"]) == ("21", "")
    assert "crop_pct" not in written


def test_columns_of_another_task_are_left_out(capsys, checkpoints, common, tmp_path):
    assert run(capsys, "--checkpoint", checkpoints[0], *common, "--report", tmp_path)[0] == 0
    (written,) = csv.DictReader((tmp_path / "report.csv").read_text().splitlines())
    first = ["name", "arch", "top1", "top5", "loss", "training_peak_abs", "peak_abs", "peak_block", "param_count_m"]
    assert list(written) == [*first, "img_size"]
