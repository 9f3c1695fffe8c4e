"""The survey: every format on one checkpoint, as it is and rotated; where it breaks, and the smallest fix.

One table, one sentence, one fix applied. Every number in it is measured: Top-1 of the whole model in the format over
the split, with its interval; float16's readings on a few images; fixes by applying them. The order of layers is from
one backward pass (sensitivity.py) and is verified by Top-1 before it is believed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tweo_timm.diagnose.float16 import LOGITS, READINGS, VALUES, Float16Readings
from tweo_timm.quant.scheme import BASES, Scheme
from tweo_timm.survey.bench import Bench, Variant
from tweo_timm.survey.decide import FAILS, SURVIVES, top1_of
from tweo_timm.survey.findings import SurveyFindings, SurveyFix, SurveyRow, SurveySite
from tweo_timm.survey.fixes import Problem, listing, named, smallest_fix
from tweo_timm.survey.sensitivity import Sensitivity, share_of

FORMATS = ("fp16", "bf16", "fp8", "fp8-unit", "w8a8-tt", "w8a8-tt+res")
"""What is tried: half precision, FP8 with and without scales, INT8 with and without the residual stream."""
LISTED = 10
"""Sites that a row lists."""
CONCENTRATED_SHARE, CONCENTRATED_SITES = 0.8, 0.1
"""Damage is concentrated if a tenth of the sites (two at least) does this share of it."""


@dataclass(kw_only=True)
class Survey(SurveyFindings):
    """What was found, and the fixed models.

    Attributes:
        variants: format -> the fixed variant, where one was measured; in no file.
    """

    variants: dict[str, Variant] = field(default_factory=dict)


def survey(bench: Bench, formats: Sequence[str] = FORMATS) -> Survey:
    """Say what a model survives, where it breaks, and what the smallest fix is.

    Args:
        bench: the model, the images and the limit.
        formats: schemes of `quantize_static`.

    Raises:
        ValueError: the float model's own outputs are not finite, so that nothing can be lost.
    """
    outcome = bench.float_outcome
    if outcome.not_finite:
        raise ValueError(f"the float model's outputs of {outcome.not_finite} images are not finite: mend that first")
    found = Survey(
        verdict="", images=len(outcome.correct), max_drop=bench.max_drop, float_top1=top1_of(outcome), rows=[]
    )
    problems = _rows_of(bench, bench.model, formats, found, rotated=False)
    try:
        _rows_of(bench, bench.rotated("random"), formats, found, rotated=True)
    except ValueError as error:
        found.not_rotated = str(error)
    for problem in problems:
        bench.say(f"looking for the smallest fix of {problem.reading}")
        fix, variant = smallest_fix(problem)
        found.fix.append(fix)
        found.variants |= {problem.reading: variant} if variant is not None else {}
    found.verdict = sentence(found)
    return found


def _rows_of(bench: Bench, model: nn.Module, formats: Sequence[str], found: Survey, rotated: bool) -> list[Problem]:
    """Add the rows of one model; the problems among them."""
    readings, problems = bench.readings(model), []
    for scheme in formats:
        variant = Variant(model, scheme)
        try:
            row, sites = _measured(bench, variant, readings, rotated)
        except (ValueError, RuntimeError, TypeError) as error:
            found.not_possible[scheme] = str(error)
            continue
        found.rows.append(row)
        if not row.survives:
            problems.append(Problem(scheme, variant, bench, readings, sites))
        for reading in READINGS[1:] if scheme == VALUES else ():
            row = _reading_row(reading, readings, rotated)
            found.rows.append(row)
            if not row.survives:
                problems.append(Problem(reading, variant, bench, readings))
    return problems


def _measured(
    bench: Bench, variant: Variant, readings: Float16Readings, rotated: bool
) -> tuple[SurveyRow, Sequence[Sensitivity]]:
    """One scheme: its score, and where it breaks."""
    decision = bench.decide(variant)
    row = SurveyRow(format=variant.scheme, rotated=rotated, **vars(decision))
    if variant.scheme == VALUES:
        reading = _reading_row(VALUES, readings, rotated)
        row.headroom, row.sites, row.spread = reading.headroom, reading.sites, reading.spread
        if not reading.survives:
            row.survives, row.verdict = False, FAILS
        elif row.drop is None and readings.overflowing(LOGITS):  # of an attention that is not fused
            logits = _reading_row(LOGITS, readings, rotated)
            row.sites, row.spread = logits.sites, logits.spread
        return row, ()
    if row.survives or rotated or not BASES[Scheme.parse(variant.scheme).base].calibrated:
        return row, ()
    bench.say(f"which layers {variant.scheme} hurts")
    sites = bench.sensitivities(variant)
    few = max(2, round(CONCENTRATED_SITES * len(sites)))
    row.spread = "concentrated" if share_of(sites, few) >= CONCENTRATED_SHARE else "diffuse"
    row.sites = [_listed(site, sites) for site in sites[:LISTED]]
    return row, sites


def _listed(site: Sensitivity, sites: Sequence[Sensitivity]) -> SurveySite:
    share = 1.0 if math.isinf(site.score) else site.score / max(sum(s.score for s in sites), 1e-300)
    return SurveySite(name=site.name, peak_abs=site.peak_abs, share=share)


def _reading_row(reading: str, readings: Float16Readings, rotated: bool) -> SurveyRow:
    """One reading of float16: arithmetic, so that its verdict is certain on these images."""
    overflowing, headroom = readings.overflowing(reading), readings.headroom(reading)
    closest = sorted(readings.sites[reading], key=lambda site: site.factor)
    listed = [*overflowing, *(site for site in closest if site not in overflowing)][:LISTED]
    few = max(2, round(CONCENTRATED_SITES * len(closest)))
    spread = ("concentrated" if len(overflowing) <= few else "diffuse") if overflowing else None
    sites = [SurveySite(name=site.name, peak_abs=site.peak_abs, factor=site.factor) for site in listed]
    verdict, survives = FAILS if overflowing else SURVIVES, not overflowing
    words: dict[str, Any] = {"format": reading, "rotated": rotated, "survives": survives, "verdict": verdict}
    return SurveyRow(**words, headroom=headroom, spread=spread, sites=sites)


def sentence(found: Survey) -> str:
    """Say in one sentence what a person can act on."""
    plain_rows = [row for row in found.rows if not row.rotated]
    failed = [row for row in plain_rows if not row.survives]
    undecided = [row.format for row in plain_rows if row.survives and row.verdict != SURVIVES]
    on = f"on these {found.images} images"
    untried = _untried(found, plain_rows)
    if not plain_rows:
        return f"Nothing is known{untried}."
    if not failed:
        measured = [row.format for row in plain_rows if row.top1 is not None]
        few = f", which are too few to decide that for {listing(undecided)}" if undecided else ""
        lose = "loses" if len(measured) == 1 else "each lose"
        return f"Sound: {listing(measured)} {lose} at most {_points(found.max_drop)} of Top-1 {on}{few}{untried}."
    groups: dict[str, list[SurveyRow]] = {}
    for row in failed:
        groups.setdefault(_fix_of(row, found).words, []).append(row)
    return f"{'; '.join(_clause(rows, found) for rows in groups.values())}; {_rest(plain_rows)}{untried}."


def _untried(found: Survey, rows: Sequence[SurveyRow]) -> str:
    """Which formats the model does not allow, so that nothing is said of them."""
    names = [name for name in found.not_possible if name not in {row.format for row in rows}]
    return f"; {listing(names)} cannot be tried, for the reason below" if names else ""


def _fix_of(row: SurveyRow, found: Survey) -> SurveyFix:
    return next(fix for fix in found.fix if fix.format == row.format)


def _clause(rows: Sequence[SurveyRow], found: Survey) -> str:
    """What does not survive, how it breaks, and the fix, of the rows that one fix mends."""
    certain = any(row.verdict == FAILS for row in rows)
    verb = ("does not" if len(rows) == 1 else "do not") if certain else "may not"
    top1 = [_fix_of(row, found).top1 for row in rows]
    then = "" if None in top1 else f", then {listing([f'{value:.2f} %' for value in top1])}"
    words = f"{listing([row.format for row in rows])} {verb} survive ({_breaks(rows[0])})"
    return f"{words}: {_fix_of(rows[0], found).words}{then}"


def _breaks(row: SurveyRow) -> str:
    spread = f", {row.spread}" if row.spread else ""
    factor = row.sites[0].factor if row.sites else None
    if factor is not None and factor < 1:
        return f"first at {row.sites[0].name}, {1 / max(factor, 1e-30):.3g} times too large{spread}"
    worst = f", most at {named(_worst(row))}" if row.sites and row.sites[0].share is not None else ""
    if row.drop is None:
        return f"outputs are not finite{worst}"
    return f"{row.drop:.2f} points lost{worst}{spread}"


def _worst(row: SurveyRow) -> list[str]:
    """The sites that do most of the damage together; only the first where it is diffuse."""
    names: list[str] = []
    done = 0.0
    for site in row.sites:
        names.append(site.name)
        done += site.share or 0.0
        if row.spread != "concentrated" or done >= CONCENTRATED_SHARE:
            break
    return names


def _rest(rows: Sequence[SurveyRow]) -> str:
    sound = [row.format for row in rows if row.survives and row.verdict == SURVIVES]
    open_ = [row.format for row in rows if row.survives and row.verdict != SURVIVES]
    parts = [f"{listing(sound)} {'survives' if len(sound) == 1 else 'survive'}"] if sound else []
    parts += [f"{listing(open_)} may survive, {row.verdict}" for row in rows if row.format in open_[:1]]
    return "; ".join(parts) or "nothing else survives"


def _points(count: float) -> str:
    return f"{count:g} point{'' if count == 1 else 's'}"
