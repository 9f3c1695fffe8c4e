"""The report of a validation: report.json for programs, report.md for people, report.csv for sheets, and pictures.

Names of models, folders, blocks and files are strangers' words: each medium escapes them, see tweo_timm.media.
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tweo_timm import machine
from tweo_timm.evaluate.columns import columns_of, formatted
from tweo_timm.evaluate.compare import SCHEMA, Difference, compare, schemes_of
from tweo_timm.evaluate.groups import Group, describe_groups, group_runs
from tweo_timm.evaluate.markdown import fields_table, markdown_table, number
from tweo_timm.evaluate.plots import Drawn, draw_all
from tweo_timm.evaluate.probe import described, tables
from tweo_timm.evaluate.record import Exported, Latency, Quantized, Record, Scored
from tweo_timm.evaluate.scheme_tables import describe_schemes
from tweo_timm.evaluate.verdict import Verdict, verdict
from tweo_timm.media import cell, code, markdown, one_line, terminal
from tweo_timm.outputs import Outputs
from tweo_timm.records import plain
from tweo_timm.schema import Declared, entry, written
from tweo_timm.version import __version__


@dataclass(kw_only=True)
class Report(Declared):
    """report.json."""

    schema: int = entry(f"{SCHEMA}")
    command: str = entry("what was run")
    made: str = entry("when")
    versions: dict[str, str] = entry("of tweo_timm, timm and torch, and the git revision")
    machine: dict[str, Any] = entry("the processor that it was made on")
    checkpoints: list[Record] = entry("a record per checkpoint", some=True)
    verdict: Verdict = entry("what to do, on these images")
    comparison: list[Difference] = entry("of every checkpoint with the first: two files on these images")
    groups: list[Group] = entry("with `--group`: what runs of one recipe have in common", default=[])

    def as_json(self) -> dict[str, Any]:
        """Return what report.json holds."""
        found: dict[str, Any] = written(self, {"checkpoints", "comparison"})
        found["checkpoints"] = [record.as_json() for record in self.checkpoints]
        found["comparison"] = [entry.as_json(self.checkpoints[0].headline) for entry in self.comparison]
        return found


def make_report(records: Sequence[Record], command: str, groups: Mapping[str, Sequence[str]]) -> Report:
    """Compare records, and judge them.

    Args:
        records: as `measure` returns them; those of the same data are compared with the first.
        command: what was run, for the record.
        groups: see `read_groups`.

    Raises:
        ValueError: if the records are of different data.
    """
    comparison = compare(records)
    return Report(
        schema=SCHEMA,
        command=command,
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=versions(),
        machine=machine.describe(),
        checkpoints=list(records),
        verdict=verdict(records),
        comparison=comparison,
        groups=group_runs(groups, records),
    )


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md, report.csv and the pictures into a folder, which is made if it is not there."""
    records = report.checkpoints
    outputs = Outputs(folder)
    outputs.write("report.json", json.dumps(plain(report.as_json()), indent=1))
    outputs.write("report.csv", csv_text(_csv_rows(records)))
    pictures = draw_all(records, outputs)
    outputs.write("report.md", _markdown(report, pictures))


def versions() -> dict[str, str]:
    """Return what the numbers were made with, the git revision included where there is one."""
    found = {"tweo_timm": __version__, "timm": timm.__version__, "torch": torch.__version__}
    here = Path(__file__).parent
    revision = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found | ({"git": revision.stdout.strip()} if revision.returncode == 0 else {})


def table_of(records: Sequence[Record]) -> list[dict[str, str]]:
    """Return the rows of the comparison table: column title -> formatted value, '-' where not measured."""
    schemes = schemes_of(records)
    rows = []
    for record in records:
        row = {column.title: column.cell(record) for column in columns_of(record) if column.title}
        found = record.by_scheme()
        rows.append(row | {scheme: formatted(found.get(scheme), "{:.2f}") for scheme in schemes})
    return rows


def print_verdict(report: Report) -> None:
    """Print what to do, and what groups of runs have in common."""
    print("\n".join(map(terminal, report.verdict.lines)))
    for paragraph in describe_groups(report.groups, report.checkpoints[0].title):
        print(f"\n{paragraph}")
    print()


def print_table(records: Sequence[Record]) -> None:
    """Print the comparison table, then those of exported files: drawn on a terminal, Markdown elsewhere."""
    print_rows(table_of(records))
    for record in records:
        for heading, caption, rows in _export_tables(record):
            line = f"{record.name}: {heading}. {caption}".rstrip()
            print(f"\n{terminal(line)}")
            print_rows(rows)
        for sentence, rows in tables(record):
            print(f"\n{terminal(f'{record.name}: {sentence}')}")
            print_rows(rows)


def print_rows(rows: Sequence[dict[str, str]]) -> None:
    """Print rows as a table on a terminal, else as Markdown."""
    console = Console()
    if not console.is_terminal:
        print(markdown_table(rows))
        return
    table = Table()
    for title in rows[0]:
        table.add_column(Text(terminal(title)))  # a plain string would be markup
    for row in rows:
        table.add_row(*(Text(terminal(value)) for value in row.values()))
    console.print(table)


def _markdown(report: Report, pictures: Sequence[Drawn]) -> str:
    records = report.checkpoints
    data = records[0].data
    precisions = ", ".join(dict.fromkeys(record.precision for record in records))
    made = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    parts = [
        "# Validation report",
        "\n".join(f"- {markdown(line)}" for line in report.verdict.lines),
        code(report.command),
        f"{data.images} images of split {code(data.split)}, fingerprint {code(data.fingerprint)}. "
        f"In {markdown(precisions)} on {markdown(report.machine['processor'])}, "
        f"{report.machine['cores']} cores; {made}; {report.made}.",
        markdown_table(table_of(records)),
        "Peaks are max |A| over all outputs of transformer blocks: `training peak` over all steps of the training, "
        "`peak` over the images above."
        if any(record.blocks for record in records)
        else "",
    ]
    parts += describe_schemes(records)
    parts += describe_groups(report.groups, records[0].title) or _differences(report)
    for drawn in pictures:
        parts += [f"![{drawn.path.stem.replace('_', ' ')}]({drawn.path.name})", f"*{markdown(drawn.caption)}*"]
    parts += [_details(record) for record in records]
    return "\n\n".join(part for part in parts if part) + "\n"


def _differences(report: Report) -> list[str]:
    """Each file against the first, which says nothing about the recipes behind them."""
    if not report.comparison:
        return []
    title, lines = report.checkpoints[0].title, []
    for found in report.comparison:
        ratio = f", peak x {found.peak_ratio:.3g}" if found.peak_ratio is not None else ""
        points = found.map_difference if found.top1_difference is None else found.top1_difference
        lines.append(
            f"- **{markdown(found.name)}** against {markdown(found.against)}: "
            f"{title} {formatted(points, '{:+.2f} points')}{_interval(found)}{ratio}."
        )
    return [
        "These files on these images, two at a time. The same recipe trained with another seed moves too, by more than "
        "these intervals may say: for a word about trainings give several runs of each to `--group`.",
        "\n".join(lines),
    ]


def _interval(found: Difference) -> str:
    if found.ci95 is None:
        return ""
    low, high = found.ci95
    interval = f"95 % interval over images {low:+.2f} to {high:+.2f}"
    return f" ({interval}; for these two files McNemar's p is {found.mcnemar_p:.2g})"


def _details(record: Record) -> str:
    parts = [f"## {markdown(record.name)}"]
    if record.blocks:
        keys = ("name", "peak_abs", "p9999_abs", "mean_abs", "kurtosis", "max_to_median", "peak_token", "peak_channel")
        parts.append(fields_table(record.blocks, keys))
    parts += [
        f"- {markdown(found.scheme)}: {record.title} {formatted(found.value(record.headline), '{:.2f} %')}, relative "
        f"error of the {'features' if found.unscored else 'logits'} {number(found.fidelity.relative_error)}"
        f"{_agreement(found)}"
        for found in record.quantized
    ]
    parts += [f"- not measured: {markdown(one_line(reason))}" for reason in failures(record)]
    parts += [f"- **wrong:** {markdown(one_line(fault))}" for fault in faults(record)]
    for heading, caption, rows in _export_tables(record):
        parts += [f"### {heading}", *([markdown(caption)] if caption else []), markdown_table(rows)]
    parts += described(record)
    return "\n\n".join(parts)


def _agreement(found: Quantized) -> str:
    share = found.fidelity.top1_agreement
    if share is None:
        return ""
    return f", same first guess as in float for {100 * share:.1f} % of {found.fidelity.num_images} images"


def failures(record: Record) -> list[str]:
    """Return why metrics, schemes and exported files that were asked for are not in a record."""
    passes = (record, *record.quantized)
    exports = [scored.not_exported for scored in passes if scored.not_exported is not None]
    unsound = [_not_finite(record, scored) for scored in passes if scored.not_finite]
    return [*unsound, *record.not_quantized.values(), *exports]


def _not_finite(record: Record, scored: Scored) -> str:
    which = f"{record.name} {scored.scheme}" if isinstance(scored, Quantized) else record.name
    return f"{which}: the logits of {scored.not_finite} images are not finite, so that nothing can be scored"


def faults(record: Record) -> list[str]:
    """Return what is wrong with the exported files of a record: those that do not compute what the model does."""
    files = [file for export in record.exports() for file in export.files]
    return [f"--export onnx, {record.name}: {file.fault}" for file in files if file.fault]


def _export_tables(record: Record) -> list[tuple[str, str, list[dict[str, str]]]]:
    """Heading, caption and rows of what is known about the exported files of a checkpoint."""
    exports = record.exports()
    tables = []
    if exports:
        caption = (
            "Error ratio: how far the file's logits are from the quantized PyTorch model's, over how far quantization "
            "moved them; and the same for that model against itself, with inputs of layers multiplied by 1.000001."
        )
        tables.append(("Exported files, run in onnxruntime", caption, _file_rows(exports)))
    timed = [(export, batch) for export in exports for batch in export.latency]
    if timed:
        first = timed[0][1]
        caption = (
            f"{first.cpu}, threads: {first.threads}, onnxruntime {first.onnxruntime}. The files of a "
            "scheme and batch take turns in every round; speed is the median over rounds."
        )
        tables.append(("Latency of exported files in onnxruntime", caption, _latency_rows(timed)))
    return tables


def _file_rows(exports: Sequence[Exported]) -> list[dict[str, str]]:
    rows = []
    for export in exports:
        for file in export.files:
            row = {"file": Path(file.path).name, "MB": number(file.size_mb), "Top-1 %": f"{file.top1:.2f}"}
            row |= {"PyTorch Top-1 %": f"{export.top1:.2f}", "same first class": number(file.top1_agreement)}
            row |= {"error ratio": number(file.error_ratio), "itself": number(export.self_error_ratio)}
            row |= {"verdict": "-" if file.fault == "" else "wrong" if file.fault else "as the model"}
            row |= {"int8 products": str(sum(file.nodes.int8.values())), "float islands": str(file.nodes.float_islands)}
            rows.append(row)
    return rows


def _latency_rows(timed: Sequence[tuple[Exported, Latency]]) -> list[dict[str, str]]:
    return [
        {
            "scheme": str(export.scheme),
            "batch": str(times.batch),
            "threads": str(times.threads),
            "rounds": str(times.rounds),
            "file": row.file + (" (wrong)" if row.file in export.wrong_targets() else ""),
            "median ms": f"{row.median_ms:.2f}",
            "min ms": f"{row.min_ms:.2f}",
            "p99 ms": formatted(row.p99_ms, "{:.2f}"),
            "MB": formatted(row.size_mb, "{:.3g}"),
            "images/s": f"{row.images_per_s:.1f}",
            "speed, float32 = 1": f"{row.ratio:.2f}",
        }
        for export, times in timed
        for row in times.rows
    ]


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV under all their keys, at full precision, with nothing in it that a sheet would calculate."""
    out = io.StringIO()
    writer = csv.writer(out)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer.writerow(map(cell, keys))
    writer.writerows([cell(row.get(key)) for key in keys] for row in rows)
    return out.getvalue()


def _csv_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per checkpoint, at full precision."""
    schemes = schemes_of(records)
    rows = []
    for record in records:
        row = {column.key: column.value(record) for column in columns_of(record) if column.csv}
        found = record.by_scheme()
        rows.append(row | {f"{record.headline}_{scheme}": found.get(scheme) for scheme in schemes})
    return rows
