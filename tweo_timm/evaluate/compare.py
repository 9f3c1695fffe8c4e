"""Several records side by side: differences on the same images, with what chance alone could do.

Two models that are scored on the same N images differ in Top-1 by (n10 - n01) / N, where n10 and n01 count the images
only one of them gets right. The interval is Wald's for paired proportions, the p-value is McNemar's exact test.
Records of different data are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

SCHEMA = 1
HEADLINES = {"classification": ("top1", "Top-1"), "multilabel": ("map", "mAP")}


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


def schemes_of(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the quantization schemes that any record was measured at, in the order of first mention."""
    return list(dict.fromkeys(entry["scheme"] for record in records for entry in record.get("quantized", [])))


def headline(record: dict[str, Any]) -> tuple[str, str]:
    """Return the metric that a record is judged by: its field, and its name in tables."""
    return HEADLINES[record.get("task", "classification")]


def accuracy_by_scheme(record: dict[str, Any]) -> dict[str, float | None]:
    """Return scheme -> headline metric in percent of one record, None where its logits are not finite."""
    field, _ = headline(record)
    return {entry["scheme"]: entry[field] for entry in record.get("quantized", [])}


def check_same_task(records: Sequence[dict[str, Any]]) -> None:
    """Refuse records that are judged by different metrics.

    Raises:
        ValueError: naming two of them.
    """
    for record in records[1:]:
        if headline(record) != headline(records[0]):
            raise ValueError(
                f"{records[0]['name']} and {record['name']} are of different --task: compare those of one task"
            )


def check_same_data(records: Sequence[dict[str, Any]]) -> None:
    """Refuse records that were not made on the same images.

    Raises:
        ValueError: naming two records and their data.
    """
    check_same_task(records)
    first = records[0]
    for record in records[1:]:
        if _identity(record) != _identity(first):
            raise ValueError(
                f"{first['name']} and {record['name']} were validated on different data ({first['data']} and "
                f"{record['data']}): validate both on the same split"
            )


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    """What the data of a record is; a split has several names, val and validation say."""
    return {key: value for key, value in record["data"].items() if key != "split"}


def compare(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare every record with the first.

    Args:
        records: of the same data, as `measure` returns them.

    Returns:
        One dict for each record after the first: name, against, top1_difference (points), ci95 (low, high), mcnemar_p
        and peak_ratio (its peak over the first's; None without blocks). With several labels an image map_difference in
        place of the three: mAP is no mean over images. All are None where one of the two has no finite logits.

    Raises:
        ValueError: if the records are of different data.
    """
    check_same_data(records)
    first = records[0]
    return [_difference(first, record) for record in records[1:]]


def _difference(first: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    before, after = (record.get("peak_abs") or math.nan for record in (first, other))
    finite = math.isfinite(before) and math.isfinite(after)
    return {
        "name": other["name"],
        "against": first["name"],
        **_accuracy_difference(first, other),
        "peak_ratio": after / before if finite else None,
    }


def _accuracy_difference(first: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    field, _ = headline(first)
    if field != "top1":
        pair = (first[field], other[field])
        return {f"{field}_difference": None if None in pair else pair[1] - pair[0]}
    if first["correct"] is None or other["correct"] is None:
        return {"top1_difference": None, "ci95": None, "mcnemar_p": None}
    count = first["data"]["images"]
    a, b = (unpacked(record["correct"], count) for record in (first, other))
    difference, low, high, p = paired_difference(a, b)
    return {"top1_difference": difference, "ci95": [low, high], "mcnemar_p": p}


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
