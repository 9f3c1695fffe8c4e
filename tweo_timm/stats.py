"""Streaming statistics of the activations at one site: what makes an outlier visible without keeping a single batch.

Moments follow Pebay, "Formulas for Robust, One-Pass Parallel Computation of Covariances and Arbitrary-Order Statistical
Moments" (SAND2008-6212): centred on each token's own mean in float32, then merged in float64, so that the result
depends neither on the batch size nor on how many processes shared the data. Quantiles come from a histogram of |x|
whose bins are the top 15 bits below the sign of a float32: 128 bins to a factor of two. Nothing here waits for the
device.
"""

from __future__ import annotations

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
        new = {name: value.to(old["count"].device) for name, value in new.items()}
        larger = (new["peak"] > old["peak"]) | new["peak"].isnan()  # a NaN peak wins, and is seen
        merged = {name: torch.where(larger, new[name], old[name]) for name in ("peak", "token", "channel")}
        merged |= {name: old[name] + new[name] for name in ("abs_sum", "images", "images_above_448", "histogram")}
        merged["image_peak_sum"] = old["image_peak_sum"] + new["image_peak_sum"]
        self._sums = merged | _merge_moments(old, new)

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
        count, variance_sum = float(sums["count"]), float(sums["m2"])
        median, p999, p9999 = self._quantiles(0.5, 0.999, 0.9999)
        peak = float(sums["peak"])
        return {
            "peak_abs": peak,
            "mean_abs": float(sums["abs_sum"]) / count,
            "kurtosis": count * float(sums["m4"]) / variance_sum**2 if variance_sum > 0 else float("nan"),
            "median_abs": median,
            "p999_abs": p999,
            "p9999_abs": p9999,
            "max_to_median": peak / median if median > 0 else float("inf"),
            "peak_token": int(sums["token"]),
            "peak_channel": int(sums["channel"]),
            "mean_image_peak": float(sums["image_peak_sum"]) / float(sums["images"]),
            "share_of_images_above_448": float(sums["images_above_448"]) / float(sums["images"]),
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
        return [min(value, float(self._sums["peak"])) for value in values]


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
    """Reduce one batch, as (tokens of all images, channels) in float32, to the sums that merge."""
    magnitude_TC = x_TC.abs()
    peak_T = magnitude_TC.amax(-1)
    row = peak_T.argmax()
    image_peak_B = peak_T.reshape(num_images, -1).amax(-1)
    sums = {
        "peak": peak_T[row],
        "token": row % (x_TC.shape[0] // num_images),
        "channel": magnitude_TC[row].argmax(),
        "abs_sum": magnitude_TC.sum(-1).double().sum(),
        "images": torch.tensor(num_images, device=x_TC.device),
        "images_above_448": (image_peak_B > 448).sum(),
        "image_peak_sum": image_peak_B.double().sum(),
        "histogram": _histogram(magnitude_TC),
    }
    return sums | _moments(x_TC)


def _moments(x_TC: Tensor) -> dict[str, Tensor]:
    """Count, mean and central sums of powers 2 to 4 (float64), by way of each token's own."""
    mean_T1 = x_TC.mean(-1, keepdim=True)
    d_TC = x_TC - mean_T1
    sq_TC = d_TC.square()
    m1_T = d_TC.sum(-1).double()  # what rounding left of the mean
    m2_T, m3_T = sq_TC.sum(-1).double(), d_TC.mul_(sq_TC).sum(-1).double()
    m4_T = sq_TC.square_().sum(-1).double()
    mean_T = mean_T1.flatten().double()
    channels = x_TC.shape[1]
    count = torch.tensor(float(x_TC.numel()), dtype=torch.float64, device=x_TC.device)
    mean = (mean_T + m1_T / channels).mean()
    # Binomial shift of every token's sums to the common mean.
    s = mean_T - mean
    m2 = m2_T + 2 * s * m1_T + channels * s**2
    m3 = m3_T + 3 * s * m2_T + 3 * s**2 * m1_T + channels * s**3
    m4 = m4_T + 4 * s * m3_T + 6 * s**2 * m2_T + 4 * s**3 * m1_T + channels * s**4
    return {"count": count, "mean": mean, "m2": m2.sum(), "m3": m3.sum(), "m4": m4.sum()}


def _merge_moments(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """Shift both sets of central sums to the mean of the union, and add (Pebay 2008, in binomial form)."""
    count = a["count"] + b["count"]
    mean = (a["count"] * a["mean"] + b["count"] * b["mean"]) / count
    merged = {"count": count, "mean": mean}
    shifted = []
    for part in (a, b):
        s, n = part["mean"] - mean, part["count"]
        m2, m3, m4 = part["m2"], part["m3"], part["m4"]
        shifted.append((m2 + n * s**2, m3 + 3 * s * m2 + n * s**3, m4 + 4 * s * m3 + 6 * s**2 * m2 + n * s**4))
    (a2, a3, a4), (b2, b3, b4) = shifted
    return merged | {"m2": a2 + b2, "m3": a3 + b3, "m4": a4 + b4}


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
