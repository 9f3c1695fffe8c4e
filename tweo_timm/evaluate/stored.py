"""Reports read back from report.json, to be compared.

A report is a file from a stranger. Every field that the table, the report and the pictures use is taken out by name and
type before any of them is made, so that a damaged file is refused in one line that names the field. Fields that nothing
here knows are kept. docs/report.md says what each holds.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tweo_timm.evaluate.compare import HEADLINES, SCHEMA, check_same_task
from tweo_timm.records import Fields
from tweo_timm.settings import AT_LEAST_0, AT_LEAST_1, Bounds

MAX_BYTES = 256 * 2**20
"""A record of a large model, with everything measured on ImageNet, takes one or two MB."""

_MAX_NAME = 1000
# A little more than float32 holds: what is drawn and divided stays finite.
_SIZE = Bounds(0, 1e39)
_REAL = Bounds(-1e39, 1e39)
_PERCENT = Bounds(0, 100)


def read_reports(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Collect the records of several report.json files; names that occur in several get their report's before.

    Raises:
        ValueError: if a file is no report of this schema, a field of it is not what it must be, or they are of
            different tasks.
    """
    records: list[dict[str, Any]] = []
    origins: list[str] = []
    for path in paths:
        found = _read(path)
        records += found
        file = Path(path).resolve()
        origins += [file.parent.name if file.name == "report.json" else file.stem] * len(found)
    check_same_task(records)
    names = Counter(record["name"] for record in records)
    return [
        record | {"name": f"{origin}/{record['name']}"} if names[record["name"]] > 1 else record
        for record, origin in zip(records, origins, strict=True)
    ]


def _read(path: str) -> list[dict[str, Any]]:
    where = f"--compare-reports {path}"
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("it is no regular file")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
        report = Fields(json.loads(content.decode("utf-8")), where)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no report.json: {error}") from error
    schema = report.integer("schema")
    if schema != SCHEMA:
        raise ValueError(f"{where} has schema {schema}, this version reads {SCHEMA}")
    records = _some(report, "checkpoints")
    for record in records:
        _check_record(record)
    return [dict(record.mapping) for record in records]


def _check_record(record: Fields) -> None:
    _texts(record, "name", "arch", "interpolation")
    _numbers(record, _SIZE, "param_count_m", "img_size", "crop_pct")
    task = "classification"
    if "task" in record.mapping:
        task = _name(record, "task")
        if task not in HEADLINES:
            record.refuse("task", task, f"one of {', '.join(HEADLINES)}")
    _check_metrics(record, _metrics(task))
    if record.has("class_names"):
        names = record.items("class_names")
        if not all(isinstance(name, str | None) for name in names):
            record.refuse("class_names", names, "a list of strings and nulls")
    averaged = itertools.product(("micro", "macro", "weighted"), ("precision", "recall", "f1_score"))
    _numbers_if_there(record, "loss", "training_peak_abs", *map("_".join, averaged))
    if "precision" in record.mapping:
        _texts(record, "precision")
    _numbers_or_null(record, _SIZE, "peak_abs")
    if record.has("peak_abs"):
        _texts(record, "peak_block")
    _check_data(record.fields("data"), record, task)
    _check_measured(record, task)
    _check_probes(record)


def _check_data(data: Fields, record: Fields, task: str) -> None:
    _texts(data, "fingerprint", "split")
    images = data.integer("images", Bounds(1, 2**40))
    if task != "classification" or record.has("not_finite"):
        return
    correct, digits = record.text("correct"), 2 * -(-images // 8)
    if len(correct) != digits or not set(correct) <= set("0123456789abcdefABCDEF"):
        record.refuse("correct", correct, f"{digits} hexadecimal digits, a bit for each of {images} images")


def _check_measured(record: Fields, task: str) -> None:
    for block in record.each("blocks"):
        _check_statistics(block)
        if "histogram" in block.mapping:
            _check_histogram(block.fields("histogram"))
    for point in _optional(record, "training"):
        point.integer("epoch", AT_LEAST_0)
        _numbers_or_null(point, _SIZE, "peak_abs")
    for entry in _optional(record, "quantized"):
        _texts(entry, "scheme")
        _check_metrics(entry, _metrics(task)[:1])
        fidelity = entry.fields("fidelity")
        _numbers_or_null(fidelity, _SIZE, "relative_error")
        fidelity.number("top1_agreement", Bounds(0, 1))
        fidelity.integer("num_images", AT_LEAST_1)
        _check_exported(entry)
    _check_exported(record)
    if "not_quantized" in record.mapping:
        reasons = record.fields("not_quantized")
        _texts(reasons, *reasons.mapping)


def _check_metrics(entry: Fields, names: Sequence[str]) -> None:
    """Percentages; null, and so is `correct`, where logits were not finite."""
    if not entry.has("not_finite"):
        _numbers(entry, _PERCENT, *names)
        return
    entry.integer("not_finite", AT_LEAST_1)
    for name in (*names, "correct"):
        if entry.has(name):
            entry.refuse(name, entry.mapping[name], "null, since not_finite is there")


def _check_statistics(place: Fields) -> None:
    """A block or a site."""
    _texts(place, "name")
    _numbers_or_null(place, _SIZE, "peak_abs", "mean_abs")
    _numbers_if_there(place, "p9999_abs", "kurtosis", "max_to_median", "peak_token", "peak_channel")


def _check_histogram(histogram: Fields) -> None:
    edges, counts = (histogram.items(name) for name in ("edges", "counts"))
    if len(edges) != len(counts):
        histogram.refuse("counts", counts, f"as long as edges, {len(edges)}")
    _each_number(histogram, "edges", Bounds(1e-45, 1e39))
    _each_number(histogram, "counts", Bounds(0, 2**62))


def _check_exported(found: Fields) -> None:
    """What is known of exported files, or why there are none."""
    if "not_exported" in found.mapping:
        found.text("not_exported")
    if not found.has("exported"):
        return
    export = found.fields("exported")
    if export.has("scheme") or "scheme" not in export.mapping:  # null for a float model
        _texts(export, "scheme")
    _numbers(export, _PERCENT, "top1")
    _numbers_if_there(export, "self_error_ratio")
    for file in _some(export, "files"):
        _texts(file, "path", "target")
        _numbers(file, _SIZE, "size_mb", "top1", "top1_agreement")
        _numbers_or_null(file, _SIZE, "error_ratio")
        if file.has("fault"):
            file.text("fault")
        nodes = file.fields("nodes")
        nodes.integer("float_islands")
        int8 = nodes.fields("int8")
        _numbers(int8, _SIZE, *int8.mapping)
    for batch in _optional(export, "latency"):
        _texts(batch, "cpu", "onnxruntime")
        _numbers(batch, _SIZE, "batch", "rounds", "threads")
        for row in _some(batch, "rows"):
            _texts(row, "file")
            _numbers(row, _SIZE, "median_ms", "min_ms", "images_per_s", "ratio")


def _check_probes(record: Fields) -> None:
    """What the probes found, or why one found nothing."""
    for name, check in PROBE_CHECKS.items():
        found = record.mapping.get(name)
        if isinstance(found, Mapping) and "refused" in found:
            record.fields(name).text("refused")
        elif name in record.mapping:
            check(record, name)


def _check_stethoscope(record: Fields, name: str) -> None:
    found = record.fields(name)
    for block in _some(found, "verdicts"):
        _texts(block, "name", "verdict")
        keys = ("random_pixel_ratio", "random_weight_ratio", "shuffled_ratio", "constant_ratio")
        _numbers_if_there(block, *keys)
    counts = found.fields("counts")
    _numbers(counts, _SIZE, *counts.mapping)
    _flag(found, "degenerate")
    found.text("rule")


def _check_colinearity(record: Fields, name: str) -> None:
    found = record.fields(name)
    _texts(found, "block", "mlp")
    _numbers(found, _SIZE, "channel", "token")
    keys = ("mlp_measured", "measured", "sum_of_terms", "with_biases", "with_activation")
    _numbers_or_null(found, _REAL, *keys)
    for term in _some(found, "terms"):
        term.integer("index", AT_LEAST_0)
        _numbers_or_null(term, _REAL, "singular_value", "w_dot_u", "v_dot_x", "value")
    length = len(found.items("singular_values"))
    for name in ("singular_values", "w_dot_u", "v_dot_x"):
        _each_number(found, name, _REAL)
        if len(found.items(name)) != length:
            found.refuse(name, found.items(name), f"as long as singular_values, {length}")
    _flag(found, "linear_valid")
    found.text("rule")
    found.text("note")


def _check_readiness(record: Fields, name: str) -> None:
    found = record.fields(name)
    found.text("verdict")
    for index, action in enumerate(found.items("actions")):
        if not isinstance(action, str):
            found.refuse(f"actions[{index}]", action, "a string")


def _check_sites(record: Fields, name: str) -> None:
    for site in record.each(name):
        _check_statistics(site)
        _texts(site, "kind")


PROBE_CHECKS = {
    "stethoscope": _check_stethoscope,
    "colinearity": _check_colinearity,
    "fp8_readiness": _check_readiness,
    "sites": _check_sites,
}
"""For each probe (tweo_timm.evaluate.probe), how the fields are checked that its `describe` and the pictures use."""


def _metrics(task: str) -> tuple[str, ...]:
    return ("top1", "top5") if task == "classification" else ("map", "micro_f1", "macro_f1", "sample_f1")


def _name(fields: Fields, name: str) -> str:
    text = fields.text(name)
    return text if len(text) <= _MAX_NAME else fields.refuse(name, text, f"at most {_MAX_NAME} characters")


def _texts(fields: Fields, *names: str) -> None:
    for name in names:
        _name(fields, name)


def _numbers(fields: Fields, bounds: Bounds, *names: str) -> None:
    for name in names:
        fields.number(name, bounds)


def _numbers_or_null(fields: Fields, bounds: Bounds, *names: str) -> None:
    """Null stands for a number that was not finite."""
    _numbers(fields, bounds, *(name for name in names if fields.has(name) or name not in fields.mapping))


def _numbers_if_there(fields: Fields, *names: str) -> None:
    _numbers(fields, _REAL, *(name for name in names if fields.has(name)))


def _each_number(fields: Fields, name: str, bounds: Bounds) -> None:
    values = fields.items(name)
    inside = Fields({f"{name}[{index}]": value for index, value in enumerate(values)}, fields.where, fields.path)
    _numbers(inside, bounds, *inside.mapping)


def _flag(fields: Fields, name: str) -> None:
    value = fields.mapping.get(name)
    if not isinstance(value, bool):
        fields.refuse(name, value, "true or false")


def _some(fields: Fields, name: str) -> list[Fields]:
    """The entries of a list of mappings that holds one at least."""
    entries = fields.each(name)
    if not entries:
        raise ValueError(f"{fields.where}: its list of {name} is empty, so there is nothing to read from it")
    return entries


def _optional(fields: Fields, name: str) -> Iterable[Fields]:
    """The entries of a list of mappings that a record may leave out."""
    return fields.each(name) if name in fields.mapping else ()
