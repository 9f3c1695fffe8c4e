"""Results as timm's validate.py prints them and writes its --results-file: names, order and nesting.

One model is an object. What may be several models, of a folder or of a pattern, is a list, the best first. Further
fields of ours come after timm's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tweo_timm.evaluate.columns import columns_of
from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.evaluate.record import METRICS, Record
from tweo_timm.evaluate.report import csv_text
from tweo_timm.evaluate.subject import stands_for_several
from tweo_timm.outputs import Outputs
from tweo_timm.records import plain


class Results:
    """The results of a validation; as text, what timm's validate.py prints after its mark.

    Args:
        records: as `measure` returns them, at least one.
        options: what was asked for.
    """

    def __init__(self, records: Sequence[Record], options: ValidateOptions) -> None:
        several = stands_for_several(options)
        ranked = sorted(records, key=_rank, reverse=True) if several else records
        self._rows = [plain(timm_result(record, options.metrics_avg)) for record in ranked]
        self._class_names = [record.class_names for record in ranked]
        self._list = several or len(records) > 1

    def __str__(self) -> str:
        return self._json(self._rows)

    def write(self, path: Path, form: str) -> None:
        """Write --results-file, which also holds the names of classes.

        Args:
            path: the file.
            form: 'json' or 'csv'; in a cell of which the names are JSON.

        Raises:
            OSError: the file cannot be written.
        """
        pairs = list(zip(self._rows, self._class_names, strict=True))
        if form == "json":
            text = self._json([{**row, "class_names": names} for row, names in pairs])
        else:
            text = csv_text([{**row, "class_names": json.dumps(names, ensure_ascii=False)} for row, names in pairs])
        Outputs(path.parent).write(path.name, text)

    def _json(self, rows: list[dict[str, Any]]) -> str:
        return json.dumps(rows if self._list else rows[0], indent=4, ensure_ascii=False)


def _rank(record: Record) -> float:
    value = record.headline_value
    return -1.0 if value is None else value


def timm_result(record: Record, average: str | None = None) -> dict[str, Any]:
    """Return the fields that timm's validate.py prints, then name, peak and file."""
    names = [f"{average}_{name}" for name in ("precision", "recall", "f1_score")] if average else []
    averaged = {name: record.value(name) for name in names}
    file = {"checkpoint": record.checkpoint} if record.checkpoint else {}
    return {
        "model": record.arch,
        **_timm_metrics(record),
        **{name: _rounded(value) for name, value in averaged.items() if value is not None or record.not_finite},
        "param_count": record.param_count_m,
        "img_size": record.img_size,
        "crop_pct": record.crop_pct,
        "interpolation": record.interpolation,
        **{column.key: column.value(record) for column in columns_of(record) if column.result},
        **file,
    }


def _timm_metrics(record: Record) -> dict[str, float | None]:
    """Accuracy and error for one label an image, mAP and F1 for several; percent."""
    values: dict[str, float | None] = {}
    for name in METRICS[record.task]:
        value = _rounded(record.value(name))
        error = None if value is None else _rounded(100 - value)
        values |= {name: value} if record.task == "multilabel" else {name: value, f"{name}_err": error}
    return values


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
