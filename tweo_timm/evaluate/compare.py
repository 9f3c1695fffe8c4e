"""Several records side by side: differences on the same images, with what chance alone could do.

Two models that are scored on the same N images differ in Top-1 by (n10 - n01) / N, where n10 and n01 count the images
only one of them gets right. The interval is Wald's for paired proportions, the p-value is McNemar's exact test.
Records of different data are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from tweo_timm.evaluate.record import Record
from tweo_timm.schema import Declared, entry, written

SCHEMA = 1


@dataclass(kw_only=True)
class Difference(Declared):
    """A checkpoint against the first, on the same images; null where one of the two has no finite logits."""

    name: str = entry("of the checkpoint")
    against: str = entry("the first")
    top1_difference: float | None = entry("Top-1 minus the first's, in points", default=None)
    ci95: list[float] | None = entry("its 95 % interval, Wald's for paired proportions", default=None)
    mcnemar_p: float | None = entry("McNemar's exact test", default=None)
    map_difference: float | None = entry(
        "in their place with `--task multilabel`: mAP is no mean over images", default=None
    )
    peak_ratio: float | None = entry("its `peak_abs` over the first's", default=None)

    def as_json(self, headline: str) -> dict[str, Any]:
        """Return what report.json holds, with the differences of one task alone."""
        paired = {"top1_difference", "ci95", "mcnemar_p"}
        found: dict[str, Any] = written(self, {"map_difference"} if headline == "top1" else paired)
        return found


def packed(correct: Tensor) -> str:
    """One bit per image, in hexadecimal: what a paired comparison of two reports needs."""
    bits = torch.nn.functional.pad(correct.to(torch.uint8), (0, -len(correct) % 8)).view(-1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    return bytes((bits * weights).sum(-1).tolist()).hex()


def unpacked(text: str, count: int) -> Tensor:
    """Undo the packing of `correct`: bool (count,)."""
    values = torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    return ((values[:, None] >> shifts) & 1).flatten()[:count].bool()


def schemes_of(records: Sequence[Record]) -> list[str]:
    """Return the quantization schemes that any record was measured at, in the order of first mention."""
    return list(dict.fromkeys(entry.scheme for record in records for entry in record.quantized))


def check_same_task(records: Sequence[Record]) -> None:
    """Refuse records that are judged by different metrics.

    Raises:
        ValueError: naming two of them.
    """
    for record in records[1:]:
        if record.task != records[0].task:
            raise ValueError(f"{records[0].name} and {record.name} are of different --task: compare those of one task")


def check_same_data(records: Sequence[Record]) -> None:
    """Refuse records that were not made on the same images.

    Raises:
        ValueError: naming two records and their data.
    """
    check_same_task(records)
    first = records[0]
    for record in records[1:]:
        if not record.data.same_as(first.data):
            raise ValueError(
                f"{first.name} and {record.name} were validated on different data ({written(first.data)} and "
                f"{written(record.data)}): validate both on the same split"
            )


def compare(records: Sequence[Record]) -> list[Difference]:
    """Compare every record with the first.

    Args:
        records: of the same data, as `measure` returns them.

    Returns:
        One for each record after the first.

    Raises:
        ValueError: if the records are of different data.
    """
    check_same_data(records)
    first = records[0]
    return [_difference(first, record) for record in records[1:]]


def _difference(first: Record, other: Record) -> Difference:
    before, after = (record.peak_abs or math.nan for record in (first, other))
    found = Difference(name=other.name, against=first.name)
    if math.isfinite(before) and math.isfinite(after):
        found.peak_ratio = after / before
    if first.headline == "map":
        if first.map is not None and other.map is not None:
            found.map_difference = other.map - first.map
    elif first.correct is not None and other.correct is not None:
        a, b = (unpacked(correct, first.data.images) for correct in (first.correct, other.correct))
        found.top1_difference, low, high, found.mcnemar_p = paired_difference(a, b)
        found.ci95 = [low, high]
    return found


def paired_difference(a: Tensor, b: Tensor) -> tuple[float, float, float, float]:
    """Compare two models image by image.

    Args:
        a: whether the first model is right, bool (N,).
        b: the same of the second, on the same images.

    Returns:
        Top-1 of b minus a in points, the ends of its 95 % interval, and the two-sided p-value of McNemar's exact test.
    """
    count = len(a)
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    difference = (only_b - only_a) / count
    spread = math.sqrt(max(only_a + only_b - (only_b - only_a) ** 2 / count, 0.0)) / count
    reach = NormalDist().inv_cdf(0.975) * spread
    return (
        100 * difference,
        100 * (difference - reach),
        100 * (difference + reach),
        mcnemar_p(only_a, only_b),
    )


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's test: exact for up to 1000 discordant images, by the normal law beyond."""
    discordant, fewer = only_a + only_b, min(only_a, only_b)
    if discordant == 0:
        return 1.0
    if discordant > 1000:
        z = max(abs(only_a - only_b) - 1, 0) / math.sqrt(discordant)
        return 2 * (1 - NormalDist().cdf(z))
    tail = sum(math.comb(discordant, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / float(2**discordant))
