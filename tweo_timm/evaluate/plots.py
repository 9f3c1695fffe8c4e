"""The pictures of a report, each with the sentence that explains its symbols, in the picture and beside it.

Curves that are equal stay apart: those drawn first are wider, and each has its own line and mark. Numbers on axes are
written out.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from tweo_timm.evaluate.answers import ColinearityAnswer, StethoscopeAnswer
from tweo_timm.evaluate.compare import schemes_of
from tweo_timm.evaluate.record import Record
from tweo_timm.evaluate.survey_plot import draw_survey
from tweo_timm.evaluate.verdict import judge
from tweo_timm.fp8.cast import E4M3
from tweo_timm.media import picture
from tweo_timm.outputs import Outputs

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_COLOURS = ("#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000")


_LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
_MARKS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Drawn:
    """A picture that was written.

    Attributes:
        path: the PNG file.
        caption: what its symbols mean.
    """

    path: Path
    caption: str


def draw_all(records: Sequence[Record], outputs: Outputs) -> list[Drawn]:
    """Draw every picture that the records hold numbers for.

    Args:
        records: as `measure` returns them.
        outputs: where the PNG files go.
    """
    drawn = []
    for name, (draw, caption) in PICTURES.items():
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        if draw(figure, records):
            figure.supxlabel(textwrap.fill(caption, 118), fontsize=7.5, color="dimgrey", x=0.01, ha="left")
            save = functools.partial(figure.savefig, format="png", dpi=150)
            drawn.append(Drawn(outputs.picture(f"{name}.png", save), caption))
    return drawn


def _peak_per_block(figure: Figure, records: Sequence[Record]) -> bool:
    axes = figure.add_subplot()
    shown = [(i, record) for i, record in enumerate(records) if record.blocks]
    for index, record in shown:
        peaks = _drawable(block.peak_abs for block in record.blocks)
        means = _drawable(block.mean_abs for block in record.blocks)
        axes.plot(peaks, label=picture(record.name), **_style(index, len(records)))
        axes.plot(means, **_mean_style(index, len(records)))
    _finish(axes, "Largest activation of each block", "block", "max |A|")
    _plain_log(axes, "y")
    _name_blocks(axes, [[block.name for block in record.blocks] for _, record in shown])
    return bool(shown)


def _name_blocks(axes: Axes, of_each: Sequence[Sequence[str]]) -> None:
    """Write the names of blocks below them, where all curves have the same."""
    names = of_each[0] if of_each and all(names == of_each[0] for names in of_each) else ()
    step = -(-len(names) // 16)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if names:
        labels = [picture(name) for name in names[::step]]
        axes.set_xticks(range(0, len(names), step), labels, rotation=30, ha="right", fontsize=8)


def _training_loss(figure: Figure, records: Sequence[Record]) -> bool:
    axes = figure.add_subplot()
    shown = [(i, record) for i, record in enumerate(records) if record.training_losses]
    for index, record in shown:
        updates = [step.update for step in record.training_losses]
        losses = _drawable(step.task_loss for step in record.training_losses)
        style = _style(index, len(records)) | {"markevery": max(len(updates) // 12, 1)}
        axes.plot(updates, losses, label=picture(record.name), **style)
    _finish(axes, "Loss while training", "optimizer updates", "loss of the task")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_plain_number))
    return bool(shown)


def _training_peak(figure: Figure, records: Sequence[Record]) -> bool:
    axes = figure.add_subplot()
    shown = [(i, record) for i, record in enumerate(records) if record.training]
    for index, record in shown:
        peaks = _drawable(point.peak_abs for point in record.training)
        epochs = [point.epoch for point in record.training]
        axes.plot(epochs, peaks, label=picture(record.name), **_style(index, len(records)))
    axes.axhline(E4M3.max, color="grey", linewidth=0.8, linestyle="--")
    note: dict[str, Any] = {"va": "bottom", "ha": "right", "fontsize": 8, "color": "grey"}
    axes.text(0.995, E4M3.max, f"{E4M3.max:g}: largest E4M3 value", transform=axes.get_yaxis_transform(), **note)
    _finish(axes, "Largest activation while training", "epoch", "max |A| over all blocks")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain_log(axes, "y")
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
        style = _style(index, len(records)) | {"marker": ""}
        label = picture(f"{record.name}, {block.name}")
        axes.step([*edges, ends[-1]], [*density, 0], where="post", label=label, **style)
    peaks = [record.peak_abs for _, record in shown if record.peak_abs]  # one that is no number has no place
    if peaks:
        axes.set_xlim(max(peaks) * 1e-6, max(peaks) * 2)
    _finish(axes, "Activations of the block with the largest one", "|A|", "elements per octave")
    _plain_log(axes, "x")
    _plain_log(axes, "y")
    return bool(shown)


def _quantized(figure: Figure, records: Sequence[Record]) -> bool:
    axes = figure.add_subplot()
    shown = [(i, record) for i, record in enumerate(records) if record.quantized and record.headline_value is not None]
    schemes, seen = schemes_of([record for _, record in shown]), [-2.0, 2.0]
    for place, (index, record) in enumerate(shown):
        style = _style(index, len(records)) | {"linestyle": "", "capsize": 3, "elinewidth": 1}
        judged = [
            found for found in (judge(record, entry) for entry in record.quantized) if found.difference is not None
        ]
        offset = (place - (len(shown) - 1) / 2) * 0.6 / max(len(shown), 1)
        places = [schemes.index(found.scheme) + offset for found in judged]
        values = [found.difference or 0.0 for found in judged]
        ends = [found.ci95 or [value, value] for found, value in zip(judged, values, strict=True)]
        seen += [end for pair in ends for end in pair]
        reach = [[value - low for value, (low, _) in zip(values, ends, strict=True)]]
        reach += [[high - value for value, (_, high) in zip(values, ends, strict=True)]]
        label = picture(f"{record.name} (float: {record.headline_value:.2f} %)")
        axes.errorbar(places, values, yerr=reach, label=label, **style)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=2)
    axes.set_yticks([-100, -50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    axes.minorticks_off()
    axes.set_xticks(range(len(schemes)), [picture(scheme) for scheme in schemes], rotation=20, ha="right")
    title = records[0].title
    _finish(axes, f"What quantization does to {title}", "", f"{title} minus that in float, points")
    axes.set_ylim(1.2 * min(seen), 1.2 * max(seen))
    return bool(shown)


def _colinearity(figure: Figure, records: Sequence[Record]) -> bool:
    """The singular spectrum of the MLP behind each model's peak, and how output channel and input align with it."""
    answers = [(i, record, record.answers.get("colinearity")) for i, record in enumerate(records)]
    shown = [(i, record, found) for i, record, found in answers if isinstance(found, ColinearityAnswer)][:4]
    panels: dict[int, Axes] = {}
    for place, (index, record, found) in enumerate(shown, start=1):
        axes = panels[place - 1] = figure.add_subplot(1, len(shown), place, sharey=panels.get(0))
        directions = range(1, len(found.singular_values) + 1)
        axes.plot(directions, found.singular_values, color=_colour(index), label="s")
        for values, mark, label in ((found.w_dot_u, ".", "|w·u|"), (found.v_dot_x, "x", "|v·x|")):
            axes.plot(directions, [abs(v) for v in values], mark, color="grey", markersize=4, label=label)
        title = "\n".join(picture(words) for words in (record.name, f"{found.block}, channel {found.channel}"))
        _finish(axes, title, "singular direction", "", beside=place == len(shown))
        axes.title.set_fontsize(8)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        _plain_log(axes, "y")
    return bool(shown)


def _stethoscope(figure: Figure, records: Sequence[Record]) -> bool:
    """Largest, smallest and mean magnitude of each block, one panel per checkpoint, one curve per arm."""
    answers = [(record, record.answers.get("stethoscope")) for record in records]
    shown = [(record, found) for record, found in answers if isinstance(found, StethoscopeAnswer) and found.arms][:3]
    panels: dict[int, Axes] = {}
    for place, (record, found) in enumerate(shown, start=1):
        axes = panels[place - 1] = figure.add_subplot(1, len(shown), place, sharey=panels.get(0))
        for index, (arm, blocks) in enumerate(found.arms.items()):
            style = _style(index, len(found.arms)) | {"markersize": 3}
            axes.plot(_drawable(block.avg_max for block in blocks), label=_ARMS.get(arm, picture(arm)), **style)
            axes.plot(_drawable(block.avg_min for block in blocks), **style)
            axes.plot(_drawable(block.mean_abs for block in blocks), **_mean_style(index, len(found.arms)))
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))
        _finish(axes, picture(record.name), "block", "A" if place == 1 else "", beside=place == len(shown))
        axes.title.set_fontsize(8)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return bool(shown)


_ARMS = {
    "trained_data": "trained, images",
    "trained_random_pixels": "trained, random pixels",
    "random_data": "random weights, images",
    "random_opened_data": "random weights, LayerScale 1",
    "shuffled_data": "shuffled weights, images",
    "trained_constant": "trained, one colour",
}

Draw = Callable[[Figure, Sequence[Record]], bool]
PICTURES: dict[str, tuple[Draw, str]] = {
    "peak_per_block": (
        _peak_per_block,
        "Marks: max |A| over all elements of a block's output, over the validated images. Dotted, without marks: mean "
        "|A| of the same. A is what a block hands to the next one.",
    ),
    "training_loss": (
        _training_loss,
        "Mean between one log line and the next, without the penalty of TWEO: what the runs have in common. A curve "
        "ends where its run did, or where the loss was not finite any more.",
    ),
    "training_peak": (
        _training_peak,
        "max |A| over all blocks and over every training step of an epoch, the steps of warm-up included.",
    ),
    "histogram": (
        _histogram,
        "How many elements of the block's output were how large, over the validated images; an octave is a factor of "
        "two. A tail far to the right of the hill is what scales per tensor must cover.",
    ),
    "quantized": (
        _quantized,
        "Each scheme against its own float model on the same images, with the 95 % interval over images. The axis is "
        "linear between -2 and 2 points and logarithmic beyond, so that one point shows beside fifty.",
    ),
    "stethoscope": (
        _stethoscope,
        "Above and below 0: means over images of the largest and of the smallest element of each block's output; "
        "dotted: mean |A|. Random pixels that keep a peak, and random weights that lose it, say that it comes from the "
        "trained weights and not from the data.",
    ),
    "survey": (
        draw_survey,
        "Above: points of Top-1 that each format loses, with the 95 % interval; green survives, red does not, orange "
        "is not decided by so many images. Below: by how much everything may grow in float16, in four readings.",
    ),
    "colinearity": (
        _colinearity,
        "The largest activation is a sum over singular directions of the MLP's first layer: s the singular value, u "
        "and v its output and input directions, w the row of the second layer that writes the channel, x what the MLP "
        "reads. A direction contributes s (w·u) (v·x).",
    ),
}
"""Every picture by its file's name: what draws it, and what explains its symbols."""


def _drawable(values: Iterable[float | None]) -> list[float]:
    """Numbers for a curve, which has a gap where one was not finite."""
    return [math.nan if value is None else value for value in values]


def _style(index: int, count: int) -> dict[str, Any]:
    """Colour, line and mark of a curve; a curve drawn earlier is wider, so that one on top of it hides no part."""
    wide = max(count - 1 - index, 0)
    return {
        "color": _colour(index),
        "linestyle": _LINES[index % len(_LINES)],
        "linewidth": 1.3 + min(1.1, 4 / count) * wide,
        "marker": _MARKS[index % len(_MARKS)],
        "markersize": 4 + min(2, 8 / count) * wide,
        "markerfacecolor": "none" if wide else _colour(index),
    }


def _mean_style(index: int, count: int) -> dict[str, Any]:
    """The same for a mean: dotted, without marks."""
    wide = max(count - 1 - index, 0)
    return {"color": _colour(index), "linestyle": ":", "linewidth": min(1 + 0.6 * wide, 3)}


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _plain_log(axes: Axes, name: str) -> None:
    """A logarithmic axis with its numbers written out, also between powers of ten where there are few of them."""
    getattr(axes, f"set_{name}scale")("log")
    axis = getattr(axes, f"{name}axis")
    low, high = axis.get_view_interval()
    few = low > 0 and math.isfinite(high) and high / low < 300
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(_plain_number))
    axis.set_minor_formatter(NullFormatter())


def _plain_number(value: float, _: object) -> str:
    """All digits of what is neither huge nor tiny, with commas from a thousand on."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:g}"


def _finish(axes: Axes, title: str, x_label: str, y_label: str, beside: bool = True) -> None:
    """Titles, grid and, `beside` the curves and on none of them, what they are."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, which="major", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if beside and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
