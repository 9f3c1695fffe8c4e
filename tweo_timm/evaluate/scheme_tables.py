"""Schemes of several checkpoints side by side, where they differ in one choice: how scales are kept, what compensates.

weights T or C, activations T or K    the grid of arXiv:2511.23225, per number of bits and suffixes
+qwt, +qwtblock or +qwtlinear         QwT-v2 beside the first QwT: Top-1, parameters added, milliseconds
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tweo_timm.evaluate.columns import formatted
from tweo_timm.evaluate.compare import schemes_of
from tweo_timm.evaluate.markdown import markdown_table, number
from tweo_timm.evaluate.record import Quantized, Record

_GRID = re.compile(r"(?P<bits>w\d+a\d+)-(?P<weights>[tc])(?P<activations>[tk])(?P<suffixes>(\+\w+)*)")
_CELLS = [(weights, activations) for weights in "tc" for activations in "tk"]
_COMPENSATED = re.compile(r"(?P<plain>[\w-]+(\+(?!qwt)\w+)*)\+qwt(block|linear)?")


def describe_schemes(records: Sequence[Record]) -> list[str]:
    """Return paragraphs of Markdown; none where no two schemes differ in one of these choices."""
    return [*_grids(records), *_compensations(records)]


def _grids(records: Sequence[Record]) -> list[str]:
    found: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for scheme in schemes_of(records):
        if match := _GRID.fullmatch(scheme):
            found.setdefault((match["bits"], match["suffixes"]), set()).add((match["weights"], match["activations"]))
    wanted = {key: cells for key, cells in found.items() if len(cells) > 1}
    if not wanted:
        return []
    rows = [
        {"model": record.name, "scheme": f"{bits}-..{suffixes}", "float": formatted(record.headline_value, "{:.2f}")}
        | {_title(cell): formatted(record.by_scheme().get(_scheme(bits, cell, suffixes)), "{:.2f}") for cell in _CELLS}
        for bits, suffixes in wanted
        for record in records
    ]
    return [
        "## Scales of weights and activations",
        f"{records[0].title} in percent. Weights have one scale per tensor (T) or per channel (C), activations one per "
        "tensor, fixed by calibration (T), or one per token, found at run time (K).",
        markdown_table(rows),
    ]


def _title(cell: tuple[str, str]) -> str:
    return f"weights {cell[0].upper()}, activations {cell[1].upper()}"


def _scheme(bits: str, cell: tuple[str, str], suffixes: str) -> str:
    return f"{bits}-{''.join(cell)}{suffixes}"


def _compensations(records: Sequence[Record]) -> list[str]:
    rows = []
    for record in records:
        by_name = {quantized.scheme: quantized for quantized in record.quantized}
        compensated = {name: match["plain"] for name in by_name if (match := _COMPENSATED.fullmatch(name))}
        shown = dict.fromkeys(name for pair in compensated.items() for name in reversed(pair) if name in by_name)
        rows += [_row(record, by_name[name]) for name in shown]
    if not rows:
        return []
    return [
        "## What compensations cost",
        "QwT-v2 (`+qwt`) has a gain and a shift per channel after each layer, which an exported file folds into scales "
        "and bias; `+qwtblock` has them after each block; the first QwT (`+qwtlinear`) has a linear layer beside each "
        "block. Milliseconds are the median for one image of the fastest exported file (`--export onnx`).",
        markdown_table(rows),
    ]


def _row(record: Record, quantized: Quantized) -> dict[str, str]:
    kept = quantized.compensation
    return {
        "model": record.name,
        "scheme": quantized.scheme,
        f"{record.title} %": formatted(quantized.value(record.headline), "{:.2f}"),
        "parameters added": "0" if kept is None else f"{kept.parameters:,}",
        "left after export": "0" if kept is None else f"{kept.left_after_folding:,}",
        "ms": number(_milliseconds(quantized)),
    }


def _milliseconds(quantized: Quantized) -> float | None:
    """The median of one image in the fastest file that computes what the model does."""
    if quantized.exported is None:
        return None
    sound = quantized.exported.sound_targets()
    return min(
        (row.median_ms for t in quantized.exported.latency if t.batch == 1 for row in t.rows if row.file in sound),
        default=None,
    )
