"""Several records side by side: differences on the same images, with what chance alone could do.

Two models that are scored on the same N images differ in Top-1 by (n01 - n10) / N, where n10 and n01 count the images
only one of them gets right. The interval is Wald's for paired proportions after half an image was added to each of the
four cells (Agresti and Min, Statistics in Medicine 2005): without that, two models that agree on 20 images would differ
by 0 exactly. The p-value is McNemar's exact test. Both are about these two files and other images, not about another
training. Records of different data are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tweo_timm.evaluate.record import Record, Scored
from tweo_timm.schema import Declared, entry, written

SCHEMA = 1


@dataclass(kw_only=True)
class Difference(Declared):
    """A checkpoint against the first, on the same images; null where one of the two has no finite logits."""

    name: str = entry("of the checkpoint")
    against: str = entry("the first")
    top1_difference: float | None = entry("Top-1 minus the first's, in points", default=None)
    ci95: list[float] | None = entry(
        "its 95 % interval over images, that of Agresti and Min for paired proportions", default=None
    )
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
    other = next((record for record in records if not record.data.same_as(first.data)), None)
    if other is not None:
        raise ValueError(
            f"{first.name} and {other.name} were validated on different data ({written(first.data)} and "
            f"{written(other.data)}): validate both on the same split"
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
    elif paired := paired_records(first, other, first.data.images):
        found.top1_difference, found.mcnemar_p = paired.difference, paired.p
        found.ci95 = [paired.low, paired.high]
    return found


class Paired(NamedTuple):
    """Two models on the same images: Top-1 of the second minus the first's, points; its 95 % interval; McNemar's p."""

    difference: float
    low: float
    high: float
    p: float


def paired_records(first: Scored, other: Scored, images: int) -> Paired | None:
    """Compare two passes over the same images; None where one has no finite logits."""
    if first.correct is None or other.correct is None:
        return None
    return paired_difference(unpacked(first.correct, images), unpacked(other.correct, images))


def paired_difference(a: Tensor, b: Tensor) -> Paired:
    """Compare two models image by image.

    Args:
        a: whether the first model is right, bool (N,).
        b: the same of the second, on the same images.

    """
    count = len(a)
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    centre = (only_b - only_a) / (count + 2)
    spread = math.sqrt(only_a + only_b + 1 - centre**2 * (count + 2)) / (count + 2)
    reach = NormalDist().inv_cdf(0.975) * spread
    return Paired(
        100 * (only_b - only_a) / count,
        100 * max(centre - reach, -1.0),
        100 * min(centre + reach, 1.0),
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
