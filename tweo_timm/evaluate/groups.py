"""Groups of runs that differ by chance alone, their seeds say: what one training more would give.

One file against another on the same images says nothing about the recipes behind them: the same recipe with another
seed moves too. With several runs each, a group has a mean, a range and Student's interval of its mean; the difference
of two groups has Welch's, which assumes no common spread. All are about trainings, on these images.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tweo_timm.evaluate.compare import schemes_of
from tweo_timm.evaluate.markdown import markdown_table, number
from tweo_timm.evaluate.record import Record
from tweo_timm.media import markdown
from tweo_timm.schema import Declared, entry
from tweo_timm.suggestion import suggest

CONFIDENCE = 0.95
PEAKS = ("training_peak_abs", "peak_abs")
_PEAK_TITLES = {"training_peak_abs": "training peak", "peak_abs": "peak"}


@dataclass(kw_only=True)
class Spread(Declared):
    """One number over the runs of a group."""

    runs: int = entry("in how many it was measured")
    mean: float = entry("over them")
    low: float = entry("the least")
    high: float = entry("the largest")
    ci95: list[float] | None = entry(
        "95 % interval of the mean, Student's; null for one run, for runs that do not differ, and for peaks",
        default=None,
    )


@dataclass(kw_only=True)
class Apart(Declared):
    """How far a group's mean is from the first group's."""

    difference: float = entry("its mean minus the first's, in points")
    ci95: list[float] | None = entry("95 % interval between runs, Welch's; null with one run in either", default=None)


@dataclass(kw_only=True)
class Group(Declared):
    """Runs of one recipe."""

    name: str = entry("as `--group` names it")
    runs: list[str] = entry("names of its records")
    spreads: dict[str, Spread] = entry("top1 (or map), each scheme, `training_peak_abs` and `peak_abs` over its runs")
    against_first: dict[str, Apart] = entry("the same, without peaks, against the first group", default={})


def read_groups(words: Sequence[str], runs: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Read --group.

    Args:
        words: NAME=RUN,RUN...
        runs: name -> file of what is compared; either says which run is meant.

    Returns:
        The name of each group -> names of its runs.

    Raises:
        ValueError: a word that is no group, a run that is not there, or one that is in two places.
    """
    names = {str(file): name for name, file in runs.items() if file} | {name: name for name in runs}
    groups: dict[str, list[str]] = {}
    for word in words:
        group, sign, members = word.partition("=")
        listed = [member for member in members.split(",") if member]
        if not (group and sign and listed):
            raise ValueError(f"--group {word}: it is no group; write NAME=RUN,RUN... with the names of the runs")
        for run in listed:
            if run not in names:
                known = f"the runs are {', '.join(runs)}{suggest(run, list(runs))}"
                raise ValueError(f"--group {word}: there is no run {run!r}; {known}")
        groups.setdefault(group, []).extend(names[run] for run in listed)
    everyone = [run for members in groups.values() for run in members]
    for run in everyone:
        if everyone.count(run) > 1:
            raise ValueError(f"--group: run {run} is given twice; one run is one training")
    return groups


def group_runs(groups: Mapping[str, Sequence[str]], records: Sequence[Record]) -> list[Group]:
    """Sum up the runs of each group, and compare every group with the first.

    Args:
        groups: see `read_groups`; runs without a record are left out, as are groups without any.
        records: of the same data.
    """
    found: list[Group] = []
    values: list[dict[str, list[float]]] = []
    for name, runs in groups.items():
        members = [record for record in records if record.name in runs]
        if not members:
            continue
        values.append(_values(members, schemes_of(records)))
        spreads = {key: spread(sample, key not in PEAKS) for key, sample in values[-1].items()}
        found.append(Group(name=name, runs=[record.name for record in members], spreads=spreads))
    for group, sample in zip(found[1:], values[1:], strict=True):
        shared = [key for key in sample if key in values[0] and key not in PEAKS]
        group.against_first = {key: apart(values[0][key], sample[key]) for key in shared}
    return found


def _values(members: Sequence[Record], schemes: Sequence[str]) -> dict[str, list[float]]:
    """Metric -> its values in the runs that have one."""
    columns = {members[0].headline: [record.headline_value for record in members]}
    columns |= {scheme: [record.by_scheme().get(scheme) for record in members] for scheme in schemes}
    columns |= {key: [getattr(record, key) for record in members] for key in PEAKS}
    known = {key: [value for value in column if value is not None] for key, column in columns.items()}
    return {key: column for key, column in known.items() if column}


def spread(sample: Sequence[float], bounded: bool = True) -> Spread:
    """Sum up one number over runs; `bounded`: percentages, with an interval, which means little for peaks."""
    found = Spread(runs=len(sample), mean=statistics.fmean(sample), low=min(sample), high=max(sample))
    if bounded and len(sample) > 1 and found.low < found.high:
        reach = _student(len(sample) - 1) * statistics.stdev(sample) / len(sample) ** 0.5
        found.ci95 = [max(found.mean - reach, 0.0), min(found.mean + reach, 100.0)]  # no percentage is beyond
    return found


def apart(first: Sequence[float], other: Sequence[float]) -> Apart:
    """Compare the means of two groups of runs; no interval where either has one run, or nothing differs."""
    found = Apart(difference=statistics.fmean(other) - statistics.fmean(first))
    if min(len(first), len(other)) < 2:
        return found
    parts = [(statistics.variance(sample) / len(sample), len(sample) - 1) for sample in (first, other)]
    variance = sum(part for part, _ in parts)
    if variance > 0:
        freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)  # Welch and Satterthwaite
        reach = _student(freedom) * variance**0.5
        found.ci95 = [found.difference - reach, found.difference + reach]
    return found


def _student(freedom: float) -> float:
    """How many standard errors the interval reaches."""
    from scipy.stats import t  # seconds to load, for which no other report waits

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


def describe_groups(groups: Sequence[Group], title: str) -> list[str]:
    """Return paragraphs of Markdown.

    Args:
        groups: what `group_runs` found.
        title: how tables call what models are judged by.
    """
    if not groups:
        return []
    keys = list(dict.fromkeys(key for group in groups for key in group.spreads))
    schemes = [key for key in keys[1:] if key not in PEAKS]
    heads = {keys[0]: f"{title} %"} | dict(zip(schemes, schemes, strict=True)) | _PEAK_TITLES
    rows = [
        {"group": group.name, "runs": str(len(group.runs))}
        | {heads[key]: _shown(group.spreads.get(key), key in PEAKS) for key in keys}
        for group in groups
    ]
    lines = [
        f"- **{markdown(group.name)}** against {markdown(groups[0].name)}, {markdown(heads[key])}: "
        f"{found.difference:+.2f} points{_between(found, group, groups[0])}."
        for group in groups[1:]
        for key, found in group.against_first.items()
    ]
    alone = [markdown(group.name) for group in groups if len(group.runs) == 1]
    return [
        "## Groups of runs",
        "Each cell is the mean over runs, and the least to the largest. Intervals are between runs, at 95 %: what "
        "another training of the same recipe would give on these images.",
        *(
            [f"One run gives no interval: {', '.join(alone)}. Train with another seed, and add that run."]
            if alone
            else []
        ),
        markdown_table(rows),
        "\n".join(lines),
    ]


def _shown(found: Spread | None, peak: bool) -> str:
    if found is None:
        return "-"
    if peak:
        return f"{number(found.mean)} ({number(found.low)} to {number(found.high)})"
    interval = f", interval {found.ci95[0]:.1f} to {found.ci95[1]:.1f}" if found.ci95 else ""
    return f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f}{interval})"


def _between(found: Apart, group: Group, first: Group) -> str:
    runs = f"{len(group.runs)} and {len(first.runs)} runs"
    if found.ci95 is None and min(len(group.runs), len(first.runs)) > 1:
        return f" ({runs}, which do not differ in it: no interval)"
    if found.ci95 is None:
        return f" ({runs}: one run of a recipe gives no interval, so that the difference may be that of two seeds)"
    return f" (interval between runs {found.ci95[0]:+.2f} to {found.ci95[1]:+.2f}, {runs})"
