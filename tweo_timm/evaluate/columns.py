"""What one row says about a checkpoint: in the table of a comparison, in report.csv and after timm's --result.

One line per column, in the order of the table and of report.csv. What timm's validate.py prints has timm's order
(results.py); what we add comes after it, from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tweo_timm.evaluate.record import Record
from tweo_timm.schema import Declared


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: the field of a `Record`, with dots where it stands inside another; empty where there is none.
        title: above it in the table; "" keeps it out of there.
        form: how a value is written there.
        csv: whether report.csv has it, under its key and at full precision.
        result: whether --result and --results-file have it.
        metric: the headline of the task that it belongs to, "top1" or "map"; "" for both.
    """

    key: str
    title: str = ""
    form: str = "{}"
    csv: bool = True
    result: bool = False
    metric: str = ""

    def value(self, record: Record) -> Any:
        """Return a record's value, None where it has none."""
        found: Any = record
        for part in self.key.split("."):
            found = getattr(found, part, None) if isinstance(found, Declared) else None
        return found

    def cell(self, record: Record) -> str:
        """Return the value as the table shows it, '-' for none."""
        return formatted(self.value(record), self.form)


COLUMNS = {
    column.key: column
    for column in (
        Column("name", "model", result=True),
        Column("arch"),
        Column("top1", "Top-1 %", "{:.2f}", metric="top1"),
        Column("top5", "Top-5 %", "{:.2f}", metric="top1"),
        Column("map", "mAP %", "{:.2f}", metric="map"),
        Column("micro_f1", metric="map"),
        Column("macro_f1", "macro F1 %", "{:.2f}", metric="map"),
        Column("sample_f1", metric="map"),
        Column("loss"),
        Column("training_peak_abs", "training peak", "{:.4g}"),
        Column("peak_abs", "peak", "{:.4g}", result=True),
        Column("peak_block", "in block"),
        Column("param_count_m"),
        Column("img_size"),
    )
}
"""Every column by its key."""


def columns_of(record: Record) -> list[Column]:
    """Return the columns of a record's task."""
    return [column for column in COLUMNS.values() if column.metric in ("", record.headline)]


def formatted(value: Any, form: str) -> str:
    """Return a value by its format, '-' for none."""
    return "-" if value is None else form.format(value)
