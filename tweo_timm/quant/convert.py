"""Putting quantizers in place: layers by quantized ones, and sites of the stream, on one grid of numbers or another.

What a grid of numbers is, integers or E4M3, only its `Grid` knows. Layers and sites that are kept in float are left
out by their names; the rest of the model does not notice.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from tweo_timm.quant.compensate import compensation_named
from tweo_timm.quant.quantizer import QuantizedLayer, Quantizer
from tweo_timm.quant.scheme import Scheme
from tweo_timm.quant.stream import BlockSites, StreamQuantizer
from tweo_timm.suggestion import suggest

_logger = logging.getLogger(__name__)

STREAM = "quantized_stream"
"""Name of the ModuleDict of StreamQuantizers that a quantized model gains."""


@dataclass
class Observation:
    """What calibration saw.

    Attributes:
        layers: layer name -> max|X| of its input.
        ranges: layer name -> min X and max X of its input.
        blocks: block name -> its sites.
        num_images: images seen.
        unused: layers that no image reached.
    """

    layers: dict[str, Tensor] = field(default_factory=dict)
    ranges: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    blocks: dict[str, BlockSites] = field(default_factory=dict)
    num_images: int = 0
    unused: list[str] = field(default_factory=list)


class Grid(Protocol):
    """One grid of numbers, as a scheme wants it."""

    def quantizer(self, least: Tensor, most: Tensor, axes: tuple[int, ...]) -> Quantizer:
        """Return what rounds activations that calibration saw between `least` and `most`; `axes` as in `Quantizer`."""

    def layer(self, layer: nn.Module, quantizer: Quantizer) -> QuantizedLayer:
        """Return what stands in a layer's place, reading its input through `quantizer`."""


class Integers:
    """Symmetric integers, see quantizer.py.

    Args:
        scheme: bits, granularities and zero points.
    """

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    def quantizer(self, least: Tensor, most: Tensor, axes: tuple[int, ...]) -> Quantizer:
        """Static, or a step for each token; with a zero point where asked for and one side of 0 is nearly empty."""
        bits = self._scheme.activation_bits
        if self._scheme.per_token:
            return Quantizer(bits, None, axes)
        if self._scheme.zero_point and bool(torch.minimum(-least, most) < torch.maximum(-least, most) / 2):
            return Quantizer(bits, most.clamp(min=0), axes, least=least.clamp(max=0))
        return Quantizer(bits, torch.maximum(-least, most), axes)

    def layer(self, layer: nn.Module, quantizer: Quantizer) -> QuantizedLayer:
        """A layer of integer products."""
        return QuantizedLayer(layer, quantizer, self._scheme.weight_bits, per_channel=self._scheme.per_channel)


def convert(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    observation: Observation,
    scheme: Scheme,
    keep_float: Collection[str],
) -> None:
    """Quantize a model to integers, in place: the converter of schemes such as w8a8-tt."""
    onto_grid(model, blocks, observation, scheme, keep_float, Integers(scheme))


def onto_grid(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    observation: Observation,
    scheme: Scheme,
    keep_float: Collection[str],
    grid: Grid,
) -> None:
    """Quantize the layers of a model, and the sites that its scheme names, on a grid; in place.

    Args:
        model: a float model.
        blocks: its blocks by name.
        observation: what calibration saw in it.
        scheme: which sites are quantized.
        keep_float: layers ("blocks.0.mlp.fc1") and sites ("blocks.0.add1") that stay as they are.
        grid: the numbers.

    Raises:
        ValueError: naming the layer or block that the grid cannot hold, or a kept name that nothing has.
    """
    kept = set(keep_float)
    _replace_layers(model, observation, grid, kept)
    _quantize_streams(model, blocks, observation, scheme, grid, kept)
    refuse_unknown(kept, [*observation.layers, *_sites(observation.blocks, scheme)])


def refuse_unknown(names: Iterable[str], known: Collection[str]) -> None:
    """Refuse names of layers and sites that are not among those that a scheme quantizes.

    Raises:
        ValueError: naming the first, and the nearest that is known.
    """
    for name in sorted(set(names) - set(known)):
        raise ValueError(f"keep_float {name!r}: the scheme quantizes no such layer or site{suggest(name, known)}")


def _replace_layers(model: nn.Module, observation: Observation, grid: Grid, kept: Collection[str]) -> None:
    """Put a QuantizedLayer in the place, or the several places, of every layer that calibration saw."""
    replacements: dict[int, QuantizedLayer] = {}
    for name, layer in list(model.named_modules()):
        if name not in observation.layers or name in kept:
            continue
        axes = (-1,) if isinstance(layer, nn.Linear) else tuple(range(1, layer.weight.ndim))
        try:
            replacements[id(layer)] = grid.layer(layer, grid.quantizer(*observation.ranges[name], axes))
        except (ValueError, TypeError) as error:
            raise type(error)(f"layer {name!r}: {error}") from error
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if id(child) in replacements:
                parent._modules[child_name] = replacements[id(child)]


def _quantize_streams(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    observation: Observation,
    scheme: Scheme,
    grid: Grid,
    kept: Collection[str],
) -> None:
    """Give every block that ran a StreamQuantizer with the sites that the scheme asks for."""
    beside_blocks = scheme.compensation and compensation_named(scheme.compensation).place == "block"
    if not (scheme.residual or scheme.attention or beside_blocks):
        return
    if isinstance(model, nn.Sequential):
        raise TypeError("the model is a torch.nn.Sequential, which would run its own quantizers: wrap it in a module")
    streams = nn.ModuleDict()
    for name, block in blocks.items():
        sites = observation.blocks[name]
        if not sites.amax:
            _logger.warning("block %r was not used by the calibration images and stays float", name)
            continue
        try:
            quantizers = {
                site: grid.quantizer(-sites.amax[site], sites.amax[site], (axis,))
                for site, axis in _site_axes(sites, scheme).items()
                if f"{name}.{site}" not in kept
            }
        except ValueError as error:
            raise ValueError(f"block {name!r}: {error}") from error
        streams[name.replace(".", "/")] = stream = StreamQuantizer(name, sites, quantizers)
        stream.attach(block)
    model.add_module(STREAM, streams)


def _site_axes(sites: BlockSites, scheme: Scheme) -> dict[str, int]:
    """The sites of one block, in the order of execution within each kind -> the axis that shares a run-time step."""
    axes: dict[str, int] = {}
    if scheme.residual:
        axes |= {f"add{index}": axis for index, axis in sites.residual.items()}
        if sites.output:
            axes["output"] = sites.output_axis
    if scheme.attention:
        if sites.hidden_products:
            raise ValueError(
                f"{', '.join(sorted(set(sites.hidden_products)))} multiplies activations out of sight: +attn cannot "
                "quantize its operands; use the scheme without +attn"
            )
        for index in range(sites.num_products):  # an integer product allows one step along the axis it sums over
            axes |= {f"product{index}_left": -1, f"product{index}_right": -2}
    return axes


def _sites(blocks: Mapping[str, BlockSites], scheme: Scheme) -> list[str]:
    return [f"{name}.{site}" for name, sites in blocks.items() if sites.amax for site in _site_axes(sites, scheme)]
