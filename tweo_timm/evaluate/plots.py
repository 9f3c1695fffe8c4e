"""The pictures of a report: peaks of the blocks, peaks while training, Top-1 by precision, histogram of |A|."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tweo_timm.evaluate.answers import ColinearityAnswer
from tweo_timm.evaluate.compare import schemes_of
from tweo_timm.evaluate.record import Record
from tweo_timm.evaluate.survey_plot import draw_survey
from tweo_timm.fp8.cast import E4M3
from tweo_timm.media import picture
from tweo_timm.outputs import Outputs

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_COLOURS = ("#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000")


def draw_all(records: Sequence[Record], outputs: Outputs) -> list[Path]:
    """Draw every picture that the records hold numbers for.

    Args:
        records: as `measure` returns them.
        outputs: where the PNG files go.

    Returns:
        The files written.
    """
    drawn = []
    for name, draw in (
        ("peak_per_block", _peak_per_block),
        ("training_peak", _training_peak),
        ("histogram", _histogram),
        ("quantized", _quantized),
        ("colinearity", _colinearity),
        ("survey", draw_survey),
    ):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        if draw(figure, records):
            save = functools.partial(figure.savefig, format="png", dpi=150)
            drawn.append(outputs.picture(f"{name}.png", save))
    return drawn


def _peak_per_block(figure: Figure, records: Sequence[Record]) -> bool:
    axes = figure.add_subplot()
    shown = [(i, record) for i, record in enumerate(records) if record.blocks]
    for index, record in shown:
        peaks = _drawable(block.peak_abs for block in record.blocks)
        means = _drawable(block.mean_abs for block in record.blocks)
        colour = _colour(index)
        axes.plot(peaks, marker="o", color=colour, label=picture(record.name))
        axes.plot(means, linestyle=":", linewidth=1, color=colour)
    _finish(axes, "Largest activation of each block (dotted: mean |A|)", "block", "max |A|")
    axes.set_yscale("log")
    of_each = [[block.name for block in record.blocks] for _, record in shown]
    if of_each and all(names == of_each[0] for names in of_each):
        names = of_each[0]
        step = -(-len(names) // 16)
        axes.set_xticks(
            range(0, len(names), step), [picture(name) for name in names[::step]], rotation=30, ha="right", fontsize=8
        )
    return bool(shown)


def _training_peak(figure: Figure, records: Sequence[Record]) -> bool:
    axes = figure.add_subplot()
    shown = [(i, record) for i, record in enumerate(records) if record.training]
    for index, record in shown:
        epochs = [point.epoch for point in record.training]
        peaks = _drawable(point.peak_abs for point in record.training)
        axes.plot(epochs, peaks, marker=".", color=_colour(index), label=picture(record.name))
    axes.axhline(E4M3.max, color="grey", linewidth=0.8, linestyle="--")
    note: dict[str, Any] = {"va": "bottom", "ha": "right", "fontsize": 8, "color": "grey"}
    axes.text(0.995, E4M3.max, f"{E4M3.max:g}: largest E4M3 value", transform=axes.get_yaxis_transform(), **note)
    _finish(axes, "Largest activation while training", "epoch", "max |A| over all blocks")
    axes.set_yscale("log")
    return bool(shown)


def _histogram(figure: Figure, records: Sequence[Record]) -> bool:
    axes = figure.add_subplot()
    shown = [(i, record) for i, record in enumerate(records) if record.blocks]
    for index, record in shown:
        block = next((block for block in record.blocks if block.name == record.peak_block), None)
        if block is None or block.histogram is None or not block.histogram.edges:
            continue
        edges, counts = block.histogram.edges, block.histogram.counts
        # A bin is a sixteenth of its power of two: the density per octave makes bins of unequal width comparable.
        ends = [edge + math.ldexp(1 / 16, math.frexp(edge)[1]) for edge in edges]
        density = [count / math.log2(end / edge) for edge, end, count in zip(edges, ends, counts, strict=True)]
        label = picture(f"{record.name}, {block.name}")
        axes.step([*edges, ends[-1]], [*density, 0], where="post", color=_colour(index), label=label)
    peaks = [record.peak_abs for _, record in shown if record.peak_abs]  # one that is no number has no place
    if peaks:
        axes.set_xlim(max(peaks) * 1e-6, max(peaks) * 2)
    _finish(axes, "Activations of the block with the largest one", "|A|", "elements per octave")
    axes.set_xscale("log")
    axes.set_yscale("log")
    return bool(shown)


def _quantized(figure: Figure, records: Sequence[Record]) -> bool:
    axes = figure.add_subplot()
    shown = [(i, record) for i, record in enumerate(records) if record.quantized]
    schemes = schemes_of(records)
    width = 0.8 / max(len(shown), 1)
    for position, (index, record) in enumerate(shown):
        found = record.by_scheme()
        whole = record.headline_value
        bars = {0: whole} | {i: found[scheme] for i, scheme in enumerate(schemes, 1) if scheme in found}
        values = {place: value for place, value in bars.items() if value is not None}
        places = [place + position * width for place in values]
        axes.bar(places, list(values.values()), width, color=_colour(index), label=picture(record.name))
    centre = width * (len(shown) - 1) / 2
    names = ["float", *map(picture, schemes)]
    axes.set_xticks([place + centre for place in range(len(names))], names, rotation=20, ha="right")
    metric = records[0].title
    _finish(axes, f"{metric} by precision", "", f"{metric}, %")
    axes.set_ylim(0, 100)
    return bool(shown)


def _colinearity(figure: Figure, records: Sequence[Record]) -> bool:
    """The singular spectrum of the MLP behind each model's peak, and how output channel and input align with it."""
    answers = [(i, record, record.answers.get("colinearity")) for i, record in enumerate(records)]
    shown = [(i, record, found) for i, record, found in answers if isinstance(found, ColinearityAnswer)][:4]
    for place, (index, record, found) in enumerate(shown, start=1):
        axes = figure.add_subplot(1, len(shown), place)
        directions = range(1, len(found.singular_values) + 1)
        axes.plot(directions, found.singular_values, color=_colour(index), label="s")
        for values, marker, label in ((found.w_dot_u, ".", "|w.u|"), (found.v_dot_x, "x", "|v.x|")):
            axes.plot(directions, [abs(v) for v in values], marker, color="grey", markersize=4, label=label)
        title = picture(f"{record.name}, {found.block}, channel {found.channel}")
        _finish(axes, title, "singular direction", "")
        axes.title.set_fontsize(8)
        axes.set_yscale("log")
    return bool(shown)


def _drawable(values: Iterable[float | None]) -> list[float]:
    """Numbers for a curve, which has a gap where one was not finite."""
    return [math.nan if value is None else value for value in values]


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _finish(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, which="major", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the lines, on none
