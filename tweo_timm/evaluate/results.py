"""Results as timm's validate.py prints them and writes its --results-file: names, order and nesting.

One model is an object. What may be several models, of a folder or of a pattern, is a list, the best first. Further
fields of ours come after timm's.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from typing import Any

from tweo_timm.evaluate.compare import headline
from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.evaluate.subject import stands_for_several
from tweo_timm.records import plain


def write_results(records: Sequence[dict[str, Any]], options: ValidateOptions) -> None:
    """Print results after timm's mark, and write --results-file, which also holds the names of classes.

    Args:
        records: as `measure` returns them, at least one.
        options: what was asked for.

    Raises:
        OSError: if the file cannot be written.
    """
    several = stands_for_several(options)
    ranked = sorted(records, key=_rank, reverse=True) if several else records
    results = [plain(timm_result(record, options.metrics_avg)) for record in ranked]
    if options.results_file:
        named = [
            {**result, "class_names": record.get("class_names")} for result, record in zip(results, ranked, strict=True)
        ]
        with open(options.results_file, "w", newline="", encoding="utf-8") as file:
            _write(file, options.results_format, _object_or_list(named, several))
    print(f"--result\n{json.dumps(_object_or_list(results, several), indent=4)}")


def _rank(record: dict[str, Any]) -> float:
    value: float | None = record[headline(record)[0]]
    return -1.0 if value is None else value


def _object_or_list(results: list[dict[str, Any]], several: bool) -> Any:
    return results if several or len(results) > 1 else results[0]


def timm_result(record: dict[str, Any], average: str | None = None) -> dict[str, Any]:
    """Return the fields that timm's validate.py prints, then name, peak and file."""
    averaged = ("precision", "recall", "f1_score") if average else ()
    file = {"checkpoint": record["checkpoint"]} if record.get("checkpoint") else {}
    return {
        "model": record["arch"],
        **_timm_metrics(record),
        **{f"{average}_{name}": _rounded(record[name]) for name in averaged if name in record},
        "param_count": record["param_count_m"],
        "img_size": record["img_size"],
        "crop_pct": record["crop_pct"],
        "interpolation": record["interpolation"],
        "name": record["name"],
        "peak_abs": record["peak_abs"],
        **file,
    }


def _timm_metrics(record: dict[str, Any]) -> dict[str, float | None]:
    """Accuracy and error for one label an image, mAP and F1 for several; percent."""
    if headline(record)[0] == "map":
        return {name: _rounded(record[name]) for name in ("map", "micro_f1", "macro_f1", "sample_f1")}
    values: dict[str, float | None] = {}
    for name in ("top1", "top5"):
        value = _rounded(record[name])
        values |= {name: value, f"{name}_err": None if value is None else _rounded(100 - value)}
    return values


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _write(file: Any, form: str, results: Any) -> None:
    if form == "json":
        json.dump(results, file, indent=4, ensure_ascii=False)
        return
    rows = results if isinstance(results, list) else [results]
    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows({**row, "class_names": json.dumps(row["class_names"], ensure_ascii=False)} for row in rows)
