"""Streaming statistics of the activations at one site: what makes an outlier visible without keeping a single batch.

Moments follow Pebay, "Formulas for Robust, One-Pass Parallel Computation of Covariances and Arbitrary-Order Statistical
Moments" (SAND2008-6212): centred on each token's own mean in float32, then merged in float64, so that the result
depends neither on the batch size nor on how many processes shared the data. Quantiles come from a histogram of |x|
whose bins are the top 15 bits below the sign of a float32: 128 bins to a factor of two. Nothing here waits for the
device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Site = TypeVar("Site", bound=Hashable)

NUM_BINS = 1 << 15
"""Bins of the histogram of |x|: 8 bits of exponent and 7 of mantissa, as in bfloat16."""


class ActivationStats:
    """Peak, mean |x|, kurtosis and high quantiles of a stream of activations, and where the peak sits.

    Args:
        channel_axis: the axis of the activations that holds channels: -1 for (B, N, C) and (B, H, W, C), 1 for (B, C,
            H, W). The first axis holds images; all others, flattened in order, are tokens.
    """

    def __init__(self, channel_axis: int = -1) -> None:
        self.channel_axis = channel_axis
        self._sums: dict[str, Tensor] = {}

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
        self._merge(_batch_sums(x.reshape(-1, x.shape[-1]), x.shape[0]))

    def merge(self, other: ActivationStats) -> None:
        """Count in what another instance has seen of the same site; order matters only for equal peaks."""
        if other._sums:
            self._merge({name: value.clone() for name, value in other._sums.items()})

    def _merge(self, new: dict[str, Tensor]) -> None:
        if not self._sums:
            self._sums = new
            return
        old = self._sums
        new = {name: value.to(old["peak"].device) for name, value in new.items()}
        larger = (new["peak"][0] > old["peak"][0]) | new["peak"][0].isnan()  # a NaN peak wins, and is seen
        moments, mean = (torch.stack([old[name], new[name]], -1) for name in ("moments", "mean"))
        self._sums = {
            "peak": torch.where(larger, new["peak"], old["peak"]),
            "totals": old["totals"] + new["totals"],
            "histogram": old["histogram"] + new["histogram"],
            **_pool(moments, mean),
        }

    def state(self) -> dict[str, Any]:
        """Return everything counted so far as plain CPU tensors, to be stored or sent to another process."""
        sums = {name: value.cpu() for name, value in self._sums.items()}
        return {"channel_axis": self.channel_axis, "sums": sums}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ActivationStats:
        """Rebuild an instance from `state()`."""
        stats = cls(state["channel_axis"])
        stats._sums = dict(state["sums"])
        return stats

    def histogram(self) -> tuple[list[float], list[int]]:
        """Return the left edges of the non-empty bins of |x| and the counts in them."""
        if not self._sums:
            return [], []
        counts = self._sums["histogram"].cpu()
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
        if not self._sums:
            raise ValueError("no activation has been counted: run the model on at least one batch first")
        sums = {name: value.cpu() for name, value in self._sums.items() if name != "histogram"}
        count, _, variance_sum, _, fourth_sum = sums["moments"].tolist()
        peak, token, channel = sums["peak"].tolist()
        abs_sum, images, images_above_448, image_peak_sum = sums["totals"].tolist()
        median, p999, p9999 = self._quantiles(0.5, 0.999, 0.9999)
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

    def _quantiles(self, *shares: float) -> list[float]:
        """Return the given quantiles of |x|, linear within a bin."""
        counts = self._sums["histogram"].cpu().double()
        cumulative, edges = counts.cumsum(0), _bin_edges()
        values = []
        for share in shares:
            rank = share * float(cumulative[-1])
            index = int(torch.searchsorted(cumulative, rank).clamp(max=NUM_BINS - 1))
            inside = (rank - float(cumulative[index] - counts[index])) / max(float(counts[index]), 1.0)
            low, high = float(edges[index]), float(edges[min(index + 1, NUM_BINS - 1)])
            values.append(low + inside * (high - low))
        return [min(value, float(self._sums["peak"][0])) for value in values]


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


def _batch_sums(x_TC: Tensor, num_images: int) -> dict[str, Tensor]:
    """Reduce one batch, as (tokens of all images, channels) in float32, to the sums that merge, in float64.

    Returns:
        peak (3,): max |x|, its token and its channel; totals (4,): sum of |x|, images, images above 448, sum of the
        images' peaks; histogram (NUM_BINS,), int64; moments and mean as `_pool` returns them.
    """
    magnitude_TC = x_TC.abs()
    peak_T = magnitude_TC.amax(-1)
    row = peak_T.argmax()
    image_peak_B = peak_T.view(num_images, -1).amax(-1).double()
    images = image_peak_B.new_full((), num_images)
    totals = [magnitude_TC.sum(-1).double().sum(), images, (image_peak_B > 448).sum(), image_peak_B.sum()]
    return {
        "peak": torch.stack([peak_T[row].double(), row % (len(x_TC) // num_images), magnitude_TC[row].argmax()]),
        "totals": torch.stack(totals),
        "histogram": _histogram(magnitude_TC),
        **_moments(x_TC),
    }


def _moments(x_TC: Tensor) -> dict[str, Tensor]:
    """The moments of a batch, pooled from those of its tokens; centred on each token's own mean, float32 is enough."""
    mean_T1 = x_TC.mean(-1, keepdim=True)
    d_TC = x_TC - mean_T1
    sq_TC = d_TC.square()
    first_T = d_TC.sum(-1)  # what rounding left of the mean
    second_T, third_T, fourth_T = sq_TC.sum(-1), d_TC.mul_(sq_TC).sum(-1), sq_TC.square_().sum(-1)
    count_T = torch.full_like(first_T, x_TC.shape[1])
    return _pool(torch.stack([count_T, first_T, second_T, third_T, fourth_T]).double(), mean_T1.flatten().double())


def _pool(moments_5P: Tensor, center_P: Tensor) -> dict[str, Tensor]:
    """Pool the moments of P parts (Pebay 2008, in binomial form): each is shifted to the mean of all, and added.

    Args:
        moments_5P: of each part the sums of (x - center)^k for k = 0 to 4, float64.
        center_P: what each part is centred on, float64.

    Returns:
        moments (5,) of all, centred on their mean; mean ().
    """
    count_P, first_P = moments_5P[0], moments_5P[1]
    mean = (count_P * center_P + first_P).sum() / count_P.sum()
    powers_5P = torch.linalg.vander(center_P - mean, N=5).T
    # (x - mean)^k = ((x - center) + (center - mean))^k = sum_i C(k, i) (center - mean)^i (x - center)^(k - i)
    products_55 = powers_5P @ moments_5P.T
    k, i, coefficients = _binomial_terms(mean.device)
    terms = products_55[i, k - i] * coefficients
    return {"moments": terms.new_zeros(5).index_add_(0, k, terms), "mean": mean}


@functools.cache  # a copy to the device at every use would wait for it
def _binomial_terms(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The terms of (a + b)^k for k = 0 to 4: the power k, the power i of a, and C(k, i), which is float64."""
    terms = [(k, i, math.comb(k, i)) for k in range(5) for i in range(k + 1)]
    k, i, coefficients = torch.tensor(terms, device=device).unbind(1)
    return k, i, coefficients.double()


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
