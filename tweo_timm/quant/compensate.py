"""Fitting compensations in a quantized model: what `compensation` describes, layer after layer, block after block.

Fits run in the order of execution, each on what the compensated layers before it deliver. Both models advance together
(twins.py), so that memory is bounded by what enters one block, for all calibration images; within the block a layer's
outputs are computed a few images at a time, again for each of its layers. `fold_compensation` merges into the layers
what costs nothing there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from tweo_timm.blocks import find_blocks
from tweo_timm.quant.compensation import Compensation, Fit, Pair
from tweo_timm.quant.quantizer import QuantizedLayer
from tweo_timm.quant.scheme import suffixes_of
from tweo_timm.quant.stream import StreamQuantizer
from tweo_timm.quant.twins import Unit, visit_units

_HELD_OUT = 4
"""Every fourth image decides whether a fit is kept, and takes no part in it."""


def compensate(
    reference: nn.Module,
    quantized: nn.Module,
    batches: Sequence[Tensor],
    kind: str,
    blocks: str | None = None,
) -> list[dict[str, Any]]:
    """Fit and install compensations in a quantized model, in place.

    Args:
        reference: the float model in evaluation mode, with every layer called as a module.
        quantized: its quantized copy; for the block kinds, one whose blocks have StreamQuantizers.
        batches: calibration images; at least two images, a few hundred are usual.
        kind: a suffix that names one, "qwt" say.
        blocks: regular expression naming the blocks by hand; None finds them by structure.

    Returns:
        One dict a layer or block, in the order of execution: name, explained (the share of the squared error on
        held-out images that the kept fit removes), channels_kept, channels, and skipped (a reason, or "").

    Raises:
        ValueError: for another kind, or with fewer than two images.
        RuntimeError: if the two do not run the same layers.
    """
    compensation = compensation_named(kind)
    device = next(reference.parameters()).device
    images = torch.cat([batch.to(device) for batch in (*batches, *batches)])
    num_images = len(images) // 2
    if num_images < 2:
        raise ValueError("compensation needs at least 2 calibration images: some are held out")
    held = torch.arange(num_images) % _HELD_OUT == _HELD_OUT - 1
    held[-1] |= not held.any()
    places = _PLACES[compensation.place](quantized)
    rows: dict[str, Fit] = {}

    def visit(unit: Unit) -> None:
        for name in _inside(unit, quantized, places):
            if not unit.takes_images:
                rows[name] = Fit(0.0, 0, 0, "no image enters it")
            elif name not in rows:  # a layer that runs twice keeps its first fit, which its forward applies
                pair = _pair(unit, reference, quantized, name, places[name], held)
                fitted, rows[name] = compensation.fit(pair)  # on the CPU, where the device has no float64
                places[name].compensation = fitted and fitted.to(next(quantized.buffers()).device)

    visit_units(reference, quantized, find_blocks(reference, blocks), images, visit)
    return [{"name": name, **asdict(fit)} for name, fit in rows.items()]


def _inside(unit: Unit, quantized: nn.Module, places: dict[str, Any]) -> list[str]:
    """The names of the places in a unit, in the order of execution."""
    names = [name for name in places if name == unit.name or name.startswith(f"{unit.name}.")]
    return unit.order({quantized.get_submodule(name): name for name in names}) if names else []


def _pair(unit: Unit, reference: nn.Module, quantized: nn.Module, name: str, place: Any, held: Tensor) -> Pair:
    """What a layer gives in both models, computed as it is asked for."""

    def read(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        got = unit.passing(quantized.get_submodule(name), place.stream, True, images)
        target = unit.passing(reference.get_submodule(name), place.stream, False, images)
        if got is None or target is None:
            raise RuntimeError(f"the quantized model runs {name!r}, and the float model does not")
        return got[0], target[1], got[1]

    return Pair(read, held, place.channel_axis)


def compensation_named(kind: str) -> type[Compensation]:
    """Return the class behind a suffix.

    Raises:
        ValueError: the suffix is none of a compensation.
    """
    known = suffixes_of("compensation")
    if kind not in known:
        raise ValueError(f"compensation {kind!r} is not known; accepted are {', '.join(known)}")
    found: type[Compensation] = known[kind].by.load()
    return found


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def _blocks(model: nn.Module) -> dict[str, Any]:
    """The blocks' names, and the StreamQuantizers that stand for them."""
    return {module.block_name: module for module in model.modules() if isinstance(module, StreamQuantizer)}


_PLACES = {"layer": _layers, "block": _blocks}


def fold_compensation(model: nn.Module) -> dict[str, list[str]]:
    """Merge every layer's compensation into its weight scales and bias, in place; logits stay within 1e-4.

    Returns:
        {"folded": layers, "kept": layers and blocks whose compensation stays an operation of its own: that of a block
        follows a sum}.
    """
    folded, kept = [], []
    for name, layer in _layers(model).items():
        if layer.compensation is not None and layer.compensation.fold(layer):
            layer.compensation = None
            folded.append(name)
        elif layer.compensation is not None:
            kept.append(name)
    kept += [name for name, block in _blocks(model).items() if block.compensation is not None]
    return {"folded": folded, "kept": kept}
