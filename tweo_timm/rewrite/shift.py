"""Shifting norms: their outputs centred on their range, channel by channel, for quantizers without zero points.

A constant may leave a norm's output where the biases of all its readers can take what they made of it. By itself this
gains little in INT8 after a rotation; it is a part for those who build further rewritings.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tweo_timm.batches import image_batches
from tweo_timm.families import describe_stream
from tweo_timm.rewrite.change import observed
from tweo_timm.rewrite.edit import Edit
from tweo_timm.rewrite.fold import shift_stays, take_constant


def shift_norms(model: nn.Module, calibration_batches: Iterable[Tensor]) -> list[str]:
    """Centre the norms of the described streams on the range that they have over images, in place and exactly.

    Args:
        model: a timm model.
        calibration_batches: preprocessed image batches (B, C, H, W).

    Returns:
        Names of the norms that were shifted; left are those behind which a reader has no bias that could take it.

    Raises:
        ValueError: for a model that `describe_stream` refuses.
    """
    edit = Edit(model)
    norms = {norm: ports for stage in describe_stream(model).stages for norm, ports in stage.norms.items() if ports}
    movable = {n: ports for n, ports in norms.items() if edit.has(f"{n}.bias") and not shift_stays(edit, n, ports)}
    for norm, middle in _middles(model, movable, image_batches(calibration_batches)).items():
        edit.then(f"{norm}.bias", (-middle).add)
        take_constant(edit, movable[norm], middle)
    edit.apply()
    return list(movable)


def _middles(model: nn.Module, norms: Iterable[str], batches: list[Tensor]) -> dict[str, Tensor]:
    """The middle of each channel's range at the output of each norm, float64."""
    ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def collect(norm: str, entered: Tensor, output: Tensor) -> None:
        tokens = output.reshape(-1, output.shape[-1]).cpu().double()
        least, most = tokens.amin(0), tokens.amax(0)
        if norm in ranges:
            least, most = torch.minimum(ranges[norm][0], least), torch.maximum(ranges[norm][1], most)
        ranges[norm] = least, most

    observed(model, norms, batches, collect)
    return {norm: (least + most) / 2 for norm, (least, most) in ranges.items()}
