"""The schemes fp8 and fp8-unit: weights and inputs of layers in E4M3, one scale a tensor, frozen after calibration.

x_8 = E4M3(x / step),  step = max|X| / 448 over the calibration images (fp8), or 1 (fp8-unit)

Products are summed in float32, as an FP8 unit sums them, and multiplied by both steps; biases stay float. Attention's
products stay float too, as in the FP8 files that engines read, unless the scheme says +attn; so does the residual
stream, unless it says +res.

Larger than 448 steps saturates, by our own word: a cast of 500 is 448 or NaN, as the version of torch decides. What
saturates is counted (`saturation`): under fp8 it is larger than all that calibration saw, under fp8-unit it is what the
format cannot hold. Source: OCP FP8 formats; the scale is that of ONNX's QuantizeLinear, a division.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tweo_timm.fp8.cast import E4M3, round_to_fp8
from tweo_timm.quant.convert import Observation, onto_grid
from tweo_timm.quant.quantizer import QuantizedLayer, Quantizer
from tweo_timm.quant.scheme import Scheme

UNIT = "fp8-unit"


def float8_step(amax: Tensor, unit: bool) -> Tensor:
    """Return the step of a tensor, float32: max|X| / 448; 1 for a tensor of zeros, or if `unit`."""
    amax = amax.to(torch.float32)
    return torch.ones_like(amax) if unit else torch.where(amax > 0, amax, E4M3.max) / E4M3.max


def to_float8(x: Tensor, step: Tensor) -> Tensor:
    """Return x / step rounded to the nearest E4M3 number within +-448, ties to even; float32."""
    return round_to_fp8(x.to(torch.float32) / step, torch.ones((), device=x.device), E4M3).to(torch.float32)


class Float8Quantizer(Quantizer):
    """Rounds activations to E4M3 at a frozen step, and counts what is larger than the format holds.

    Args:
        amax: max|X| over the calibration images, a scalar.
        unit: the step is 1, whatever `amax` is.

    Attributes:
        limit: what is larger saturates: max|X|, or 448 under `unit`; float32.
        seen, saturated: elements since the last `reset`, int64.

    Raises:
        ValueError: if `amax` is not finite.
    """

    limit: Tensor
    seen: Tensor
    saturated: Tensor

    def __init__(self, amax: Tensor, *, unit: bool) -> None:
        super().__init__(8, torch.zeros_like(amax) if unit else amax)
        self.scale = float8_step(amax.detach(), unit).reshape(())
        limit = torch.full_like(self.scale, E4M3.max) if unit or not bool(amax > 0) else amax.detach().float()
        self.register_buffer("limit", limit.reshape(()))
        for name in ("seen", "saturated"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=amax.device), persistent=False)

    def integers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return E4M3 numbers, as floats (float32, float64 for float64 input), and their step."""
        assert self.scale is not None
        with torch._C.DisableTorchFunction():  # a StreamQuantizer counts additions, and these are not the block's
            self.seen.add_(x.numel())
            self.saturated.add_((x.detach().abs() > self.limit).sum())
            return to_float8(x, self.scale).to(torch.promote_types(x.dtype, torch.float32)), self.scale

    def extra_repr(self) -> str:
        """Show format and step."""
        return f"E4M3, tensor, step={float(self.scale if self.scale is not None else 1):.6g}"


class Float8Layer(QuantizedLayer):
    """A Linear or convolution that multiplies E4M3 numbers, held in float32: takes and returns floats.

    Args:
        layer: the float layer; its parameters are read, not kept.
        input_quantizer: how the input becomes E4M3 numbers.
        unit: the weight's step is 1.

    Attributes:
        weight_int: the weight's E4M3 numbers, float8_e4m3fn, in the float weight's shape.
        weight_scale: their step, float32, of no axes.

    Raises:
        TypeError, ValueError: as `QuantizedLayer`.
    """

    number_format: ClassVar[str] = "e4m3"

    def __init__(self, layer: nn.Module, input_quantizer: Float8Quantizer, *, unit: bool) -> None:
        self._unit = unit
        super().__init__(layer, input_quantizer, 8, per_channel=False)

    def _hold(self, weight: Tensor, per_channel: bool) -> None:
        self.register_buffer("weight_scale", float8_step(weight.abs().max(), self._unit))
        self.register_buffer("weight_int", to_float8(weight, self.weight_scale).to(E4M3.dtype))

    def _fits_float32(self) -> bool:
        return True  # no sum of floats is exact; float32 is what an FP8 unit sums in


class Float8:
    """The grid of E4M3.

    Args:
        unit: every step is 1.
    """

    def __init__(self, unit: bool) -> None:
        self._unit = unit

    def quantizer(self, least: Tensor, most: Tensor, axes: tuple[int, ...]) -> Float8Quantizer:
        """One static step for the tensor, whatever the axes."""
        return Float8Quantizer(torch.maximum(-least, most), unit=self._unit)

    def layer(self, layer: nn.Module, quantizer: Quantizer) -> Float8Layer:
        """A layer of E4M3 products."""
        assert isinstance(quantizer, Float8Quantizer)
        return Float8Layer(layer, quantizer, unit=self._unit)


def convert(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    observation: Observation,
    scheme: Scheme,
    keep_float: Collection[str],
) -> None:
    """Quantize a model to E4M3, in place: the converter of the schemes fp8 and fp8-unit."""
    onto_grid(model, blocks, observation, scheme, keep_float, Float8(scheme.base == UNIT))


def saturation(model: nn.Module) -> dict[str, Any] | None:
    """Return how many values of a model's activations saturated since it was quantized; None without E4M3.

    Returns:
        values, share (of all that were rounded), and sites: name of a layer or of a stream's quantizer -> values, only
        those where some did.
    """
    counted = {name: module for name, module in model.named_modules() if isinstance(module, Float8Quantizer)}
    if not counted:
        return None
    values = {name.removesuffix(".input_quantizer"): int(module.saturated) for name, module in counted.items()}
    total, seen = sum(values.values()), sum(int(module.seen) for module in counted.values())
    return {"values": total, "share": total / max(seen, 1), "sites": {n: v for n, v in values.items() if v}}
