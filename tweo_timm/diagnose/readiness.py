"""FP8 readiness: what each Linear layer of a model would meet in FP8, and what to do about it.

Two kinds of obstacles exist. Shapes: FP8 matrix units want input and output widths, and the number of tokens in the
weight gradient, to be multiples of 16; everything else is padded. Values: per-tensor scaling divides by amax, so being
above E4M3's 448 matters only unscaled; what hurts is an amax that jumps between batches, because delayed scaling still
uses the old one and clips what exceeds it, and an amax so far above the rest that the rest becomes zero. All are
measured on the inputs of the layers; the jump on the batches as they are given, in their order, so pass training-size
batches of the training split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from tweo_timm.fp8.cast import E4M3
from tweo_timm.layers import projections_called, sees_images
from tweo_timm.modes import evaluating
from tweo_timm.records import plain

MULTIPLE = 16
JUMP_RISK = 2.0
"""Delayed scaling is called at risk where amax grows by more than this ratio from one batch to the next."""
CLIPPED_SHARE_RISK, CLIPPED_JUMP_RISK = 1e-3, 1.25
"""It is also at risk where more than this share is clipped by at least this ratio: every new maximum clips a little."""
FLUSHED_SHARE_RISK = 0.5
"""Resolution is called at risk when more than this share of a layer's inputs rounds to zero."""
_HALF_SMALLEST = 2.0**-10
"""E4M3's smallest positive value is 2^-9: half of it and less rounds to zero."""


def fp8_readiness(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Any]:
    """Say what FP8 would cost and risk at every Linear layer, and what to do.

    Args:
        model: a float timm model; it is run in evaluation mode, and every module keeps its own.
        batches: preprocessed images (B, C, H, W), batch after batch as in training; at least one.

    Returns:
        verdict (one line), actions (list of lines), num_layers, num_aligned, num_at_risk, num_batches, padding_cost
        (extra multiplications, as a share of the model's Linear ones), batch_multiple (the batch size must be a
        multiple of this for the token counts to be), and layers: one dict each with name, in_features, out_features,
        tokens_per_image, aligned, padding_cost, batch_multiple, amax, weight_amax, share_above_448 (of the input
        elements), worst_jump (of amax from batch to batch; null with one batch), clipped_share (worst share of a batch
        beyond the previous amax), flushed_share (of non-zero elements that current scaling rounds to zero, worst
        batch), at_risk.

    Raises:
        ValueError: without batches, or without Linear layers.
    """
    model = unwrap_model(model)
    layers = {
        name: _Layer(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and sees_images(name)
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Linear layer: there is nothing for FP8 to do")
    handles = [model.get_submodule(name).register_forward_pre_hook(layer.hook()) for name, layer in layers.items()]
    device, num_batches = next(model.parameters()).device, 0
    try:
        with evaluating(model), torch.no_grad(), projections_called(model):
            for images in batches:
                for layer in layers.values():
                    layer.begin(len(images))
                model(images.to(device))
                num_batches += 1
    finally:
        for handle in handles:
            handle.remove()
    if not num_batches:
        raise ValueError("FP8 readiness is measured on at least one batch of images; several show jumps of amax")
    rows = [{"name": name, **layer.row()} for name, layer in layers.items() if layer.amax]
    record: dict[str, Any] = plain({**_summary(rows, num_batches), "layers": rows})
    return record


class _Layer:
    """What is counted at the input of one Linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._num_images = 0
        self.amax: list[float] = []
        self._tokens = 0
        self._above = 0
        self._elements = 0
        self._clipped: list[float] = []
        self._flushed: list[float] = []

    def begin(self, num_images: int) -> None:
        """A batch starts."""
        self._num_images = num_images

    def hook(self) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def count(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            magnitude = args[0].detach().abs().float()
            amax = float(magnitude.max())
            if self.amax:
                self._clipped.append(int((magnitude > self.amax[-1]).sum()) / magnitude.numel())
            nonzero = int((magnitude > 0).sum())
            flushed = int(((magnitude > 0) & (magnitude <= amax / E4M3.max * _HALF_SMALLEST)).sum())
            self._flushed.append(flushed / max(nonzero, 1))
            self._above += int((magnitude > E4M3.max).sum())
            self._elements += magnitude.numel()
            self._tokens = magnitude.numel() // magnitude.shape[-1] // max(self._num_images, 1)
            self.amax.append(amax)

        return count

    def row(self) -> dict[str, Any]:
        width_in, width_out = self._layer.in_features, self._layer.out_features
        padded = _padded(width_in) * _padded(width_out)
        jumps = [new / old for old, new in zip(self.amax, self.amax[1:], strict=False) if old > 0]
        worst_jump = max(jumps, default=float("nan"))
        clipped, flushed = max(self._clipped, default=0.0), max(self._flushed)
        finite = all(math.isfinite(value) for value in self.amax)
        return {
            "in_features": width_in,
            "out_features": width_out,
            "tokens_per_image": self._tokens,
            "aligned": padded == width_in * width_out,
            "padding_cost": padded / (width_in * width_out) - 1,
            "batch_multiple": MULTIPLE // math.gcd(max(self._tokens, 1), MULTIPLE),
            "amax": max(self.amax) if finite else float("nan"),
            "weight_amax": float(self._layer.weight.detach().abs().max()),
            "share_above_448": self._above / self._elements,
            "worst_jump": worst_jump,
            "clipped_share": clipped,
            "flushed_share": flushed,
            "at_risk": not finite
            or worst_jump > JUMP_RISK
            or (clipped > CLIPPED_SHARE_RISK and worst_jump > CLIPPED_JUMP_RISK)
            or flushed > FLUSHED_SHARE_RISK,
        }


def _padded(width: int) -> int:
    return math.ceil(width / MULTIPLE) * MULTIPLE


def _summary(rows: list[dict[str, Any]], num_batches: int) -> dict[str, Any]:
    work = [row["in_features"] * row["out_features"] * max(row["tokens_per_image"], 1) for row in rows]
    cost = sum(w * row["padding_cost"] for w, row in zip(work, rows, strict=True)) / sum(work)
    odd = [row for row in rows if not row["aligned"]]
    risky = [row for row in rows if row["at_risk"]]
    above = [row for row in rows if row["share_above_448"] > 0]
    state = "at risk" if risky else "ready with padding" if odd else "ready"
    verdict = (
        f"{state}: {len(rows) - len(odd)} of {len(rows)} Linear layers fit FP8 shapes (padding the others costs "
        f"{100 * cost:.2f} %), {len(above)} exceed 448 unscaled, {len(risky)} are at risk under delayed scaling"
    )
    actions = []
    if odd:
        actions.append(f"none for shapes: FP8 layers pad {_names(odd)} to multiples of {MULTIPLE} by themselves")
    if above:
        actions.append(f"use scaled FP8 (delayed or current scaling): {_names(above)} overflow unscaled E4M3")
    if risky:
        actions.append(
            f"train with TWEO, use current scaling, or exclude {_names(risky)}: their amax jumps, or leaves the rest "
            "of the tensor without resolution"
        )
    if num_batches == 1:
        actions.append("pass several batches: one shows no jump of amax")
    return {
        "verdict": verdict,
        "actions": actions,
        "num_layers": len(rows),
        "num_aligned": len(rows) - len(odd),
        "num_at_risk": len(risky),
        "num_batches": num_batches,
        "padding_cost": cost,
        "batch_multiple": max(row["batch_multiple"] for row in rows if row["tokens_per_image"] > 1 or len(rows) == 1),
    }


def _names(rows: list[dict[str, Any]]) -> str:
    names = [str(row["name"]) for row in rows]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
