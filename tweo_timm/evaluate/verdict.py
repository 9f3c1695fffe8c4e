"""What a person should do after a validation: which checkpoint, which scheme, and what next, in three lines.

A scheme is compared with its own float model on the same images. It is safe where the interval of the difference ends
above minus `TOLERANCE`; it costs where the interval ends below zero; else these images cannot tell, and how many could
is said. Nothing here is about another training with another seed: see groups.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tweo_timm.config import TweoConfig
from tweo_timm.evaluate.compare import Paired, paired_records
from tweo_timm.evaluate.record import Exported, LatencyRow, Quantized, Record
from tweo_timm.quant.scheme import refuse_not_exportable
from tweo_timm.schema import Declared, entry

TOLERANCE = 1.0
"""Points of Top-1 that a scheme may lose and be called safe."""
TAU = TweoConfig().tau
_RARE = 0.05


@dataclass(kw_only=True)
class SchemeVerdict(Declared):
    """A scheme of one checkpoint against the float model, on the same images."""

    name: str = entry("of the checkpoint")
    scheme: str = entry("as `--quantize` names it")
    difference: float | None = entry("Top-1 (or mAP) minus the float model's, in points", default=None)
    ci95: list[float] | None = entry("its 95 % interval over images; null where there is none", default=None)
    judged: str = entry(f"`safe` (loses at most {TOLERANCE:g} point within the interval), `costs`, `open` or `unknown`")
    images: int | None = entry("if `open`: about how many images would tell", default=None, optional=True)


@dataclass(kw_only=True)
class Verdict(Declared):
    """What to do."""

    checkpoint: str | None = entry("which one to take; null if none can be scored", default=None)
    lines: list[str] = entry("for people")
    schemes: list[SchemeVerdict] = entry("every scheme of every checkpoint")


def verdict(records: Sequence[Record]) -> Verdict:
    """Judge checkpoints of the same data and their schemes.

    Args:
        records: as `measure` returns them.
    """
    schemes = [judge(record, quantized) for record in records for quantized in record.quantized]
    best = _best(records)
    if best is None:
        reasons = [record.unscored for record in records if record.unscored]
        why = reasons[0] if len(reasons) == len(records) else "the logits of all of them are not finite"
        line = f"No checkpoint can be scored: {why}."
        surveyed = any("survey" in record.answers for record in records)
        more = ["What formats of few bits cost is in the survey below, judged without classes."] if surveyed else []
        return Verdict(lines=[line, *more], schemes=schemes)
    own = [scheme for scheme in schemes if scheme.name == best.name]
    lines = [_which(best, records), _precision(best, own), f"Next: {_next(best, own)}"]
    return Verdict(checkpoint=best.name, lines=lines, schemes=schemes)


def judge(record: Record, quantized: Quantized) -> SchemeVerdict:
    """Compare a scheme with the float model that it was made of."""
    found = SchemeVerdict(name=record.name, scheme=quantized.scheme, judged="unknown")
    values = (record.headline_value, quantized.value(record.headline))
    if values[0] is None or values[1] is None:
        return found
    found.difference = values[1] - values[0]
    paired = paired_records(record, quantized, record.data.images) if record.headline == "top1" else None
    if paired is None:
        return found
    found.ci95 = [paired.low, paired.high]
    found.judged = "safe" if paired.low >= -TOLERANCE else "costs" if paired.high < 0 else "open"
    if found.judged == "open":
        found.images = _enough(paired, record.data.images)
    return found


def _enough(paired: Paired, images: int) -> int:
    """About how many images bring the interval's half width down to the tolerance, to two digits."""
    wanted = images * ((paired.high - paired.low) / 2 / TOLERANCE) ** 2
    digits: int = 10 ** max(math.floor(math.log10(max(wanted, 1))) - 1, 0)
    return max(math.ceil(wanted / digits) * digits, 2 * images)


def _best(records: Sequence[Record]) -> Record | None:
    """The most accurate one; of those that these images cannot tell from it, the one with the smallest peak."""
    scored = [record for record in records if record.headline_value is not None]
    if not scored:
        return None
    best = max(scored, key=lambda record: record.headline_value or 0.0)
    equal = [record for record in scored if record is best or _not_told_apart(record, best)]
    return min(equal, key=lambda record: (_peak(record), record is not best))


def _not_told_apart(record: Record, best: Record) -> bool:
    paired = paired_records(record, best, record.data.images) if record.headline == "top1" else None
    return record.headline_value == best.headline_value if paired is None else not _told_apart(paired)


def _told_apart(paired: Paired) -> bool:
    """Whether images say that the second is better: by its interval and by McNemar's test, which the report has too."""
    return paired.low > 0 and paired.p < _RARE


def _peak(record: Record) -> float:
    return math.inf if record.peak_abs is None else record.peak_abs


def _which(best: Record, records: Sequence[Record]) -> str:
    """The checkpoint, and why it and no other."""
    about = f"{best.title} {best.headline_value:.2f} %" + _largest(best)
    others = [record for record in records if record is not best and record.headline_value is not None]
    if not others:
        return f"{best.name}: {about}."
    rival = max(others, key=lambda record: record.headline_value or 0.0)
    paired = paired_records(rival, best, best.data.images) if best.headline == "top1" else None
    if paired is None:
        return f"Take {best.name}: {about}; the next is {rival.name} with {rival.headline_value:.2f} %."
    points = f"{paired.difference:+.2f} points against {rival.name} (interval over images {_interval(paired)})"
    if _told_apart(paired):
        return f"Take {best.name}: {about}. {points}: these two files differ on these images."
    return f"Take {best.name}: {about}. {points}: these images do not tell the two files apart{_by_peak(best, rival)}."


def _largest(record: Record) -> str:
    return "" if record.peak_abs is None else f", largest activation {record.peak_abs:.4g} in {record.peak_block}"


def _by_peak(best: Record, rival: Record) -> str:
    if rival.peak_abs is None or _peak(best) >= rival.peak_abs:
        return ""
    return f", and its largest activation is smaller ({best.peak_abs:.4g}, there {rival.peak_abs:.4g})"


def _precision(best: Record, schemes: Sequence[SchemeVerdict]) -> str:
    """What each scheme does to it; how fast it is where that was measured."""
    if not schemes and _is_file(best):
        return f"The file is scored as it is: {best.precision}."
    if not schemes and "survey" in best.answers:
        return "What formats of few bits cost is in the survey below."
    if not schemes:
        return "Quantization was not measured."
    count = f"{best.data.images} images"
    return (
        f"Quantized, on the same {count}: "
        + "; ".join(f"{found.scheme} {_judged(found)}{_speed(best, found.scheme)}" for found in schemes)
        + "."
    )


def _is_file(record: Record) -> bool:
    """Whether it is of --onnx: a file that is what it is."""
    return str(record.checkpoint).endswith(".onnx")


def _judged(found: SchemeVerdict) -> str:
    if found.difference is None:
        return "cannot be scored"
    if found.ci95 is None:
        return f"moves the score by {found.difference:+.2f} points (without an interval)"
    low, high = found.ci95
    words = {"safe": "is safe", "costs": "costs accuracy", "open": "is not decided"}[found.judged]
    return f"{words} ({found.difference:+.2f} points, interval {low:+.2f} to {high:+.2f})"


def _export_of(record: Record, scheme: str) -> Exported | None:
    return next((found.exported for found in record.quantized if found.scheme == scheme), None)


def _fastest(exported: Exported | None) -> tuple[str, float, str] | None:
    """Target, speed where float32 is 1, and conditions of the fastest file that computes what the model does."""
    if exported is None:
        return None
    sound = exported.sound_targets()
    rows = [
        (
            row.file,
            row.ratio,
            f"{_of_rounds(row, times.rounds)}; its {row.file} file on {times.cpu}, batch {times.batch}, threads "
            f"{times.threads}",
        )
        for times in exported.latency
        for row in times.rows
    ]
    return max((row for row in rows if row[0] in sound), key=lambda row: row[1], default=None)


def _of_rounds(row: LatencyRow, rounds: int) -> str:
    """How far the rounds of a measurement are apart, which is not what another machine or day would give."""
    if rounds == 1:
        return "of one round, which gives no spread"
    if row.ratio_low is None or row.ratio_high is None:
        return f"the median of {rounds} rounds, whose spread the report does not have"
    return f"{row.ratio_low:.2f} to {row.ratio_high:.2f} over {rounds} rounds"


def _speed(record: Record, scheme: str) -> str:
    fastest = _fastest(_export_of(record, scheme))
    if fastest is None:
        return ""
    _, ratio, conditions = fastest
    return f", {ratio:.2f} times the speed of float32 ({conditions})"


def _next(best: Record, schemes: Sequence[SchemeVerdict]) -> str:
    """The one thing to do."""
    safe = [found for found in schemes if found.judged == "safe"]
    small = max(_peak(best), best.training_peak_abs or 0.0) <= TAU
    gain = f"nothing to gain from TWEO or a rotation, since peaks are below tau ({TAU:g})"
    if not schemes and _is_file(best):
        step = f"deploy {best.checkpoint}, whose images are prepared as it was scored"
    elif not schemes and "survey" in best.answers:
        step = "do what the survey says"
    elif not schemes:
        step = "add --quantize w8a8-tt w8a8-tt+res to see what 8 bits cost"
    elif safe:
        step = _deploy(best, max(safe, key=lambda found: _gain(best, found.scheme)).scheme)
    elif undecided := [found for found in schemes if found.judged == "open" and found.images]:
        step = f"score about {min(found.images or 0 for found in undecided):,} images: {best.data.images} cannot tell"
    elif all(found.judged == "unknown" for found in schemes):
        step = "no scheme has an interval here; judge the differences by what they cost you"
    elif small:
        step = "stay in float or try more bits"
    else:
        step = (
            "remove the outliers, by tweo-repair or a training with --tweo-weight, or try +rot, +smooth and more bits"
        )
    return f"{gain}; {step}." if small else f"{step}."


def _gain(record: Record, scheme: str) -> tuple[float, bool]:
    """What safe schemes are chosen by: speed where it was measured, and whether there can be a file; then order."""
    fastest = _fastest(_export_of(record, scheme))
    return fastest[1] if fastest else 0.0, _has_file(scheme)


def _has_file(scheme: str) -> bool:
    """Whether --export onnx can write the scheme, which a report of another version may not name as this one does."""
    try:
        refuse_not_exportable(scheme)
    except ValueError:
        return False
    return True


def _deploy(record: Record, scheme: str) -> str:
    exported = _export_of(record, scheme)
    fastest = _fastest(exported)
    if exported is None and not _has_file(scheme):
        return f"use {scheme} in an engine that computes it: there is no ONNX file of it"
    if exported is None or fastest is None:
        return f"write the file and time it here: --quantize {scheme} --export onnx"
    path = next(file.path for file in exported.files if file.target == fastest[0])
    if fastest[1] <= 1:
        return f"stay in float32 on this processor: no file of {scheme} is faster here"
    return f"deploy {path}"


def _interval(paired: Paired) -> str:
    return f"{paired.low:+.2f} to {paired.high:+.2f}"
