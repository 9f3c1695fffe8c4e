"""What a survey finds, declared once: what it fills in, what report.json holds, and what the report reads back."""

from __future__ import annotations

from dataclasses import dataclass

from tweo_timm.records import Fields
from tweo_timm.schema import LONG, PERCENT, SIZE, Declared, entry
from tweo_timm.settings import AT_LEAST_0, Bounds


@dataclass(kw_only=True)
class SurveySite(Declared):
    """One place where a format breaks, or comes nearest to it."""

    name: str = entry("the module, or the block and its site")
    peak_abs: float | None = entry(
        "the largest value; of squares the largest \\|x - mean\\|, of sums the largest rms of a token", SIZE
    )
    factor: float | None = entry(
        "by how much everything there may grow; below 1 it overflows (float16)", SIZE, default=None
    )
    share: float | None = entry(
        "of the damage that all layers and sites would do (INT8, FP8)", Bounds(0, 1.001), default=None
    )


@dataclass(kw_only=True)
class SurveyRow(Declared):
    """One format."""

    format: str = entry("a scheme, or `fp16-logits`, `fp16-squares`, `fp16-sums`")
    rotated: bool = entry("the stream was rotated first, by a random matrix")
    survives: bool = entry("finite, at most `max_drop` lost, and nothing overflows in float16")
    verdict: str = entry("`survives`, `does not`, or `not decided by N images`")
    top1: float | None = entry("percent; null where it is not measured or not finite", PERCENT, default=None)
    drop: float | None = entry("points lost", Bounds(-100, 100), default=None)
    interval: list[float] | None = entry(
        "95 % of them, Bonett and Price's for paired proportions", Bounds(-100, 100), default=None
    )
    headroom: float | None = entry("the smallest `factor`, of float16", SIZE, default=None)
    spread: str | None = entry("`concentrated` in a tenth of the sites, or `diffuse`", default=None)
    sites: list[SurveySite] = entry("where it breaks first, or what it hurts most", default=[])

    def check(self, source: Fields) -> None:
        """Refuse an interval that has not two ends."""
        if self.interval is not None and len(self.interval) != 2:
            source.refuse("interval", self.interval, "two numbers")


@dataclass(kw_only=True)
class SurveyFix(Declared):
    """The smallest fix of one format that does not survive."""

    format: str = entry("the row")
    fix: str = entry("norm, logits, scales, channel, token, stream, pairs, rotation, sites or training")
    words: str = entry("what to do", LONG)
    sites: list[str] = entry("what it is about", default=[])
    scheme: str | None = entry("what was measured; null where nothing can be", default=None)
    top1: float | None = entry("percent, with the fix", PERCENT, default=None)
    verdict: str | None = entry("as in a row", default=None)
    tried: int = entry("cheaper fixes that were measured and did not hold", AT_LEAST_0, default=0)


@dataclass(kw_only=True)
class SurveyFindings(Declared):
    """What the model survives, where it breaks, and the smallest fix."""

    verdict: str = entry("one sentence", LONG)
    images: int = entry("scored", AT_LEAST_0)
    max_drop: float = entry("points that may be lost", PERCENT)
    float_top1: float | None = entry("percent", PERCENT)
    rows: list[SurveyRow] = entry("a row per format, of the model as it is and rotated", some=True)
    fix: list[SurveyFix] = entry("the smallest fix of each row that does not survive", default=[])
    not_rotated: str = entry("why there are no rotated rows", LONG, default="", optional=True)
    not_possible: dict[str, str] = entry("format -> why the model does not allow it", LONG, default={})
