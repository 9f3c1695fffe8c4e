"""Streaming statistics of the activations at one site: what makes an outlier visible without keeping a single batch.

Moments follow Pebay, "Formulas for Robust, One-Pass Parallel Computation of Covariances and Arbitrary-Order Statistical
Moments" (SAND2008-6212): centred on each batch's own mean in float32, then merged in float64, so that the result
depends neither on the batch size nor on how many processes shared the data. Quantiles come from a histogram of |x|
whose bins are the top 15 bits below the sign of a float32: 128 bins to a factor of two. Nothing here waits for the
device: what a batch adds stays there until somebody asks, and is then merged in plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tweo_timm.fp8.cast import E4M3

Site = TypeVar("Site", bound=Hashable)

NUM_BINS = 1 << 15
"""Bins of the histogram of |x|: 8 bits of exponent and 7 of mantissa, as in bfloat16."""
_MAX_PENDING = 256


class _Sums(NamedTuple):
    """What is known of some activations, in a form that merges.

    Attributes:
        peak: max |x|, its token and its channel.
        totals: sum of |x|, images, images above 448, sum of the images' peaks.
        moments: sums of (x - mean)^k for k = 0 to 4.
        mean: the mean, on which the moments are centred.
    """

    peak: tuple[float, ...]
    totals: tuple[float, ...]
    moments: tuple[float, ...]
    mean: float


class _Batch(NamedTuple):
    """What one batch adds: its size, and what `_batch_sums` found, still on the device."""

    images: int
    elements: int
    sums: Tensor


class ActivationStats:
    """Peak, mean |x|, kurtosis and high quantiles of a stream of activations, and where the peak sits.

    Args:
        channel_axis: the axis of the activations that holds channels: -1 for (B, N, C) and (B, H, W, C), 1 for (B, C,
            H, W). The first axis holds images; all others, flattened in order, are tokens.
    """

    def __init__(self, channel_axis: int = -1) -> None:
        self.channel_axis = channel_axis
        self._sums: _Sums | None = None
        self._pending: list[_Batch] = []
        self._histogram: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Count a batch in.

        Args:
            x: floating activations with images on the first axis, at least two axes; read as float32.

        Raises:
            ValueError: if `x` has fewer than two axes or no elements.
        """
        if x.ndim < 2 or x.numel() == 0:
            raise ValueError(f"activations are (images, ..., channels) with at least one element, not {tuple(x.shape)}")
        x = x.detach().movedim(self.channel_axis, -1).to(torch.float32)
        magnitude = x.abs()
        self._pending.append(_Batch(len(x), x.numel(), _batch_sums(x, magnitude)))
        self._add_histogram(_histogram(magnitude))
        if len(self._pending) == _MAX_PENDING:
            self._known()

    def merge(self, other: ActivationStats) -> None:
        """Count in what another instance has seen of the same site; order matters only for equal peaks."""
        mine, theirs = self._known(), other._known()
        if theirs is not None and other._histogram is not None:
            self._sums = theirs if mine is None else _merged(mine, theirs)
            self._add_histogram(other._histogram)

    def _add_histogram(self, counts: Tensor) -> None:
        known = self._histogram
        self._histogram = counts if known is None else known + counts.to(known.device)

    def _known(self) -> _Sums | None:
        """Merge what is pending and return all. Batches go one after the other: when this is called changes nothing."""
        pending, self._pending = self._pending, []
        sums = torch.cat([batch.sums for batch in pending]).cpu().double() if pending else torch.empty(0)
        for batch, found in zip(pending, torch.split(sums, [len(batch.sums) for batch in pending]), strict=True):
            new = _as_sums(batch, found)
            self._sums = new if self._sums is None else _merged(self._sums, new)
        return self._sums

    def state(self) -> dict[str, Any]:
        """Return everything counted so far as plain CPU tensors, to be stored or sent to another process."""
        sums: dict[str, Tensor] = {}
        known = self._known()
        if known is not None and self._histogram is not None:
            sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in known._asdict().items()}
            sums["histogram"] = self._histogram.cpu()
        return {"channel_axis": self.channel_axis, "sums": sums}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ActivationStats:
        """Rebuild an instance from `state()`."""
        stats = cls(state["channel_axis"])
        sums = dict(state["sums"])
        if sums:
            stats._histogram = sums.pop("histogram")
            peak, totals, moments = (tuple(sums[name].tolist()) for name in ("peak", "totals", "moments"))
            stats._sums = _Sums(peak, totals, moments, sums["mean"].item())
        return stats

    def histogram(self) -> tuple[list[float], list[int]]:
        """Return the left edges of the non-empty bins of |x| and the counts in them."""
        if self._histogram is None:
            return [], []
        counts = self._histogram.cpu()
        filled = counts.nonzero().flatten()
        return _bin_edges()[filled].tolist(), counts[filled].tolist()

    def summary(self) -> dict[str, Any]:
        """Return the statistics as plain numbers.

        Returns:
            peak_abs (max |x|), mean_abs, kurtosis (the fourth standardized moment, 3 for a Gaussian; NaN without
            spread), median_abs, p999_abs and p9999_abs (from the histogram: within 1/128 of the value), max_to_median,
            peak_token and peak_channel (indices within the image's flattened tokens and the channels), mean_image_peak
            (the mean over images of max |x|), share_of_images_above_448 (E4M3's largest value), count (elements).

        Raises:
            ValueError: if nothing has been counted.
        """
        known = self._known()
        if known is None or self._histogram is None:
            raise ValueError("no activation has been counted: run the model on at least one batch first")
        count, _, variance_sum, _, fourth_sum = known.moments
        peak, token, channel = known.peak
        abs_sum, images, images_above_448, image_peak_sum = known.totals
        median, p999, p9999 = (min(value, peak) for value in _quantiles(self._histogram, 0.5, 0.999, 0.9999))
        return {
            "peak_abs": peak,
            "mean_abs": abs_sum / count,
            "kurtosis": count * fourth_sum / variance_sum**2 if variance_sum > 0 else float("nan"),
            "median_abs": median,
            "p999_abs": p999,
            "p9999_abs": p9999,
            "max_to_median": peak / median if median > 0 else float("inf"),
            "peak_token": int(token),
            "peak_channel": int(channel),
            "mean_image_peak": image_peak_sum / images,
            "share_of_images_above_448": images_above_448 / images,
            "count": int(count),
        }


def gather(stats: Mapping[Site, ActivationStats | None]) -> dict[Site, ActivationStats | None]:
    """Merge what all processes of the default group have counted, site by site. A collective where there is a group.

    Args:
        stats: site -> what this process has counted there; None for nothing.

    Returns:
        The same for all processes together, on every one of them; `stats` itself where there is no group.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return dict(stats)
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    mine = {site: None if counted is None else counted.state() for site, counted in stats.items()}
    torch.distributed.all_gather_object(everyone, mine)
    merged: dict[Site, ActivationStats | None] = {}
    for theirs in everyone:
        for site, state in theirs.items():
            counted = None if state is None else ActivationStats.from_state(state)
            known = merged.get(site)
            if known is None or counted is None:
                merged[site] = known or counted
            else:
                known.merge(counted)
    return merged


def _batch_sums(x: Tensor, magnitude: Tensor) -> Tensor:
    """Reduce one batch, as (images, ..., channels) in float32 with its |x|, to the sums that merge.

    Centred on the batch's own mean, float32 is enough for the powers, and for sums over one image.

    Returns:
        (3 + 6 * images,) float32: token and channel of max |x| in its image, the batch's mean; of each image max |x|;
        its sum of |x|; its sums of (x - mean)^k for k = 1 to 4.
    """
    magnitude_BN = magnitude.reshape(len(x), -1)
    peak_B = magnitude_BN.amax(1)
    place = magnitude_BN.index_select(0, peak_B.argmax(0, keepdim=True)).argmax()
    channels = x.shape[-1]  # a place may be beyond the integers that float32 counts, its token and channel are not
    mean = x.mean()
    d_BN = (x - mean).reshape(len(x), -1)
    sq_BN = d_BN.square()
    first_B = d_BN.sum(1)  # what rounding left of the mean
    second_B, third_B, fourth_B = sq_BN.sum(1), d_BN.mul_(sq_BN).sum(1), sq_BN.square_().sum(1)
    where = torch.stack([place // channels, place % channels]).float()
    return torch.cat([where, mean.view(1), peak_B, magnitude_BN.sum(1), first_B, second_B, third_B, fourth_B])


def _as_sums(batch: _Batch, found: Tensor) -> _Sums:
    """The sums of a batch from what `_batch_sums` found, as float64 on the CPU."""
    token, channel, rounded_mean = found[:3].tolist()
    table_6B = found[3:].view(6, batch.images)
    image_peak_sum, abs_sum, first, *higher = table_6B.sum(1).tolist()
    peak_B = table_6B[0]
    correction = first / batch.elements
    return _Sums(
        peak=(float(peak_B.amax()), token, channel),
        totals=(abs_sum, float(batch.images), float((peak_B > E4M3.max).sum()), image_peak_sum),
        moments=tuple(_shifted([float(batch.elements), first, *higher], -correction)),
        mean=rounded_mean + correction,
    )


def _merged(old: _Sums, new: _Sums) -> _Sums:
    """Both together; the moments shifted to the mean of all, then added (Pebay 2008, in binomial form)."""
    larger = new.peak[0] > old.peak[0] or math.isnan(new.peak[0])  # a NaN peak wins, and is seen
    count = old.moments[0] + new.moments[0]
    mean = sum(part.moments[0] * part.mean + part.moments[1] for part in (old, new)) / count
    shifted = [_shifted(part.moments, part.mean - mean) for part in (old, new)]
    return _Sums(
        peak=new.peak if larger else old.peak,
        totals=tuple(a + b for a, b in zip(old.totals, new.totals, strict=True)),
        moments=tuple(a + b for a, b in zip(*shifted, strict=True)),
        mean=mean,
    )


def _shifted(moments: Sequence[float], shift: float) -> list[float]:
    """Sums of (d + shift)^k from those of d^k: sum_i C(k, i) shift^i d^(k - i)."""
    return [sum(math.comb(k, i) * shift**i * moments[k - i] for i in range(k + 1)) for k in range(len(moments))]


def _quantiles(histogram: Tensor, *shares: float) -> list[float]:
    """Return the given quantiles of |x|, linear within a bin."""
    counts = histogram.cpu().double()
    cumulative, edges = counts.cumsum(0), _bin_edges()
    values = []
    for share in shares:
        rank = share * float(cumulative[-1])
        index = int(torch.searchsorted(cumulative, rank).clamp(max=NUM_BINS - 1))
        inside = (rank - float(cumulative[index] - counts[index])) / max(float(counts[index]), 1.0)
        low, high = float(edges[index]), float(edges[min(index + 1, NUM_BINS - 1)])
        values.append(low + inside * (high - low))
    return values


def _histogram(magnitude: Tensor) -> Tensor:
    """Count |x| by the 15 bits that follow the sign of its float32 pattern."""
    bins = magnitude.contiguous().view(torch.int32).bitwise_right_shift(16).flatten()
    if bins.device.type == "cpu":
        return torch.bincount(bins, minlength=NUM_BINS)
    counts = torch.zeros(NUM_BINS, dtype=torch.int64, device=bins.device)  # bincount would wait for the device
    return counts.scatter_add_(0, bins.long(), torch.ones_like(bins, dtype=torch.int64))


def _bin_edges() -> Tensor:
    """The smallest |x| of every bin, float64; the bins of infinity and NaN count as the largest float32."""
    edges = (torch.arange(NUM_BINS, dtype=torch.int32) << 16).view(torch.float32).double()
    largest = torch.finfo(torch.float32).max
    return edges.nan_to_num(nan=largest, posinf=largest)


def nan_largest(value: float) -> tuple[bool, float]:
    """As a sort key, make what is not a number larger than every number: the worst of some peaks is then found."""
    return value != value, value


def decibels(signal: Tensor | float, noise: Tensor | float) -> float | None:
    """Return the signal-to-noise ratio of two energies in dB; None where there is no signal, no noise or no number."""
    energies = float(signal), float(noise)
    if not all(0 < energy < math.inf for energy in energies):
        return None
    return 10 * math.log10(energies[0] / energies[1])
