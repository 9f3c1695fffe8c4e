"""Reports read back from report.json, to be compared.

A report is a file from a stranger. Every field that the table, the report and the pictures use is taken out by name and
type before any of them is made (record.py and answers.py declare them), so that a damaged file is refused in one line
that names the field. Fields that nothing here knows are kept.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tweo_timm.evaluate.compare import SCHEMA, check_same_task
from tweo_timm.evaluate.probe import PROBES, Probe
from tweo_timm.evaluate.record import Record, Refused, is_refused
from tweo_timm.records import Fields
from tweo_timm.schema import read, read_value

MAX_BYTES = 256 * 2**20
"""A record of a large model, with everything measured on ImageNet, takes one or two MB."""


def read_reports(paths: Sequence[str], flag: str = "--compare-reports") -> list[Record]:
    """Collect the records of several report.json files; names that occur in several get their report's before.

    Args:
        paths: the files.
        flag: that names them, for messages.

    Raises:
        ValueError: if a file is no report of this schema, a field of it is not what it must be, or they are of
            different tasks.
    """
    records: list[Record] = []
    origins: list[str] = []
    for path in paths:
        found = _read(path, flag)
        records += found
        file = Path(path).resolve()
        origins += [file.parent.name if file.name == "report.json" else file.stem] * len(found)
    check_same_task(records)
    names = Counter(record.name for record in records)
    return [
        replace(record, name=f"{origin}/{record.name}") if names[record.name] > 1 else record
        for record, origin in zip(records, origins, strict=True)
    ]


def _read(path: str, flag: str) -> list[Record]:
    where = f"{flag} {path}"
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
    checkpoints = report.each("checkpoints") or report.refuse("checkpoints", [], "a list with one entry or more")
    return [_record(checkpoint) for checkpoint in checkpoints]


def _record(source: Fields) -> Record:
    """A record, with what the probes found in it by name."""
    record = read(Record, source)
    for name in PROBES.keys() & record.rest.keys():
        del record.rest[name]
    record.answers = {name: _answer(source, name) for name in PROBES if name in source.mapping}
    return record


def _answer(source: Fields, name: str) -> Any:
    """What a probe found, or why it found nothing."""
    if is_refused(source.mapping[name]):
        return read(Refused, source.fields(name))
    probe: type[Probe] = PROBES[name].load()
    return read_value(probe.ANSWER, source, name)
