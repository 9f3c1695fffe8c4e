"""How calibration fixes the step of a layer's input: by its largest value, or, for comparison, by a percentile.

    absmax             nothing that calibration saw is cut off: what every number of this package was made with
    percentile:99.99   |x| above that percentile is cut off, as many tools do by default

Cutting off is the wrong thing where outliers carry the model, and no measurement shows this better than the comparison.
The percentile is that of all values of all calibration images, from a histogram, within 1/128. Weights keep their
largest value. Refused with +res and +attn, whose sites are not looked at here, and where steps are none of calibration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tweo_timm.quant.convert import Observation
from tweo_timm.quant.scheme import INTEGERS, Scheme
from tweo_timm.stats import ActivationStats

ABSMAX = "absmax"
_PERCENTILE = re.compile(r"percentile:(\d+(?:\.\d+)?)")


def percentile_of(calibration: str) -> float | None:
    """Read "absmax" (None) or "percentile:99.99" (99.99).

    Raises:
        ValueError: for anything else.
    """
    found = _PERCENTILE.fullmatch(calibration)
    if calibration != ABSMAX and (found is None or not 50 < float(found[1]) < 100):
        raise ValueError(
            f"--calibration {calibration!r} is not understood: give {ABSMAX}, or percentile:P with P between 50 and "
            "100, 99.99 say"
        )
    return None if found is None else float(found[1])


def refuse_percentile(scheme: Scheme) -> None:
    """Refuse a scheme whose activations are not rounded at static steps of layers' inputs alone.

    Raises:
        ValueError: with the reason.
    """
    if scheme.base != INTEGERS or scheme.per_token or scheme.residual or scheme.attention:
        raise ValueError(
            f"{scheme} is not calibrated by a percentile, which is of layers' inputs at static int8 steps alone: use a "
            f"scheme such as w8a8-ct, or calibration {ABSMAX}"
        )


@torch.no_grad()
def cut_off(model: nn.Module, batches: Iterable[Tensor], observation: Observation, percent: float) -> None:
    """Let what calibration saw of every layer's input end at a percentile of its |x|, in place.

    Args:
        model: the float model that was observed, in evaluation mode.
        batches: the calibration images.
        observation: what calibration saw; its ranges are narrowed.
        percent: of the values of |x|.
    """
    stats = {name: ActivationStats() for name in observation.layers}
    handles = [model.get_submodule(name).register_forward_pre_hook(_watching(seen)) for name, seen in stats.items()]
    try:
        device = next(model.parameters()).device
        for images in batches:
            model(images.to(device))
    finally:
        for handle in handles:
            handle.remove()
    for name, seen in stats.items():
        least, most = observation.ranges[name]
        limit = most.new_tensor(_percentile(*seen.histogram(), percent))
        observation.ranges[name] = torch.maximum(least, -limit), torch.minimum(most, limit)
        observation.layers[name] = torch.maximum(-observation.ranges[name][0], observation.ranges[name][1])


def _watching(stats: ActivationStats) -> Callable[[nn.Module, Any], None]:
    return lambda _, args: stats.update(args[0].detach().reshape(1, 1, -1))


def _percentile(edges: list[float], counts: list[int], percent: float) -> float:
    """The left edge of the bin in which a share of the counts is reached."""
    cumulative = torch.tensor(counts, dtype=torch.float64).cumsum(0)
    index = int(torch.searchsorted(cumulative, cumulative[-1] * percent / 100))
    return edges[min(index, len(edges) - 1)]
