"""The picture of a survey: what each format loses, as it is and rotated, and how far float16 is from its limits."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tweo_timm.evaluate.answers import SurveyAnswer
from tweo_timm.evaluate.record import Record
from tweo_timm.media import picture
from tweo_timm.survey.findings import SurveyRow

_COLOURS = {"survives": "#009E73", "does not": "#D55E00"}
_UNDECIDED = "#E69F00"
"""Okabe and Ito's colours."""


def draw_survey(figure: Figure, records: Sequence[Record]) -> bool:
    """Draw the surveys of at most three records side by side: losses above, headroom below."""
    found = [(r, r.answers["survey"]) for r in records if isinstance(r.answers.get("survey"), SurveyAnswer)][:3]
    if not found:
        return False
    figure.set_size_inches(7.2 * len(found), 6.4)
    axes = figure.subplots(2, len(found), squeeze=False, height_ratios=(2, 1))
    for column, (record, answer) in enumerate(found):
        _losses(axes[0, column], answer, f"{record.name}: points of Top-1 lost, 95 %, {answer.images} images")
        _headroom(axes[1, column], answer)
    return True


def _colour(row: SurveyRow) -> str:
    return _COLOURS.get(row.verdict, _UNDECIDED)


def _losses(axes: Axes, answer: SurveyAnswer, title: str) -> None:
    measured = [row for row in answer.rows if row.headroom is None or row.top1 is not None or row.format == "fp16"]
    names = list(dict.fromkeys(row.format for row in measured))
    for row in measured:
        place = names.index(row.format) + (0.18 if row.rotated else -0.18)
        marker = "D" if row.rotated else "o"
        if row.drop is None or row.interval is None:
            axes.annotate("not finite", (answer.max_drop, place), color=_colour(row), fontsize=8, va="center")
            continue
        reach = [[max(row.drop - row.interval[0], 0)], [max(row.interval[1] - row.drop, 0)]]
        axes.errorbar(row.drop, place, xerr=reach, fmt=marker, color=_colour(row), markersize=5, capsize=2)
    axes.axvline(answer.max_drop, color="grey", linewidth=0.8, linestyle="--")
    for marker, label in (("o", "as it is"), ("D", "rotated")):
        axes.plot([], [], marker, color="grey", label=label)
    _finish(axes, picture(title), names)


def _headroom(axes: Axes, answer: SurveyAnswer) -> None:
    read = [row for row in answer.rows if row.headroom]
    names = list(dict.fromkeys(row.format for row in read))
    for row in read:
        headroom = row.headroom or 0.0
        place = names.index(row.format) + (0.18 if row.rotated else -0.18)
        axes.plot(headroom, place, "D" if row.rotated else "o", color="#D55E00" if headroom < 1 else "#009E73")
    axes.axvline(1, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    _finish(axes, "float16: by how much everything may grow (left of 1 it overflows)", names)


def _finish(axes: Axes, title: str, names: Sequence[str]) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_yticks(range(len(names)), [picture(name) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.grid(True, axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
