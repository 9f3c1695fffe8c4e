"""AbsMax symmetric quantization of one tensor, and the layer that computes with integers only.

s = max|X| + eps,  X_q = round(X / s * Q_b),  Q_b = 2^(b-1) - 1          (arXiv:2511.23225, its PTQ protocol)

What is stored is the step s / Q_b in float32, because that single number is what an engine's QuantizeLinear divides by:
the integers here are then those of the engine, and not the neighbours that X / s * Q_b gives once in a million.

A QuantizedLayer multiplies integers, held in floats. As long as no partial sum can reach 2^24 (checked for every layer,
from its own weights; float64 is used otherwise) this is bit for bit what int8 arithmetic with int32 accumulation gives,
in any order of summation, so neither the batch size nor the number of threads can change a result. Biases stay float:
engines keep them in int32, at a step far below one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame, pad_same
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tweo_timm.wide import back, wide

EPS = 1e-8
"""Keeps the step of an all-zero tensor positive; far below one step of any real one."""

_EXACT_FLOAT32 = 2**24
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_STANDARDIZED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
_CONV_FORWARDS = {cls.forward for cls in (*_CONVS, Conv2dSame, *_STANDARDIZED)}


def largest_integer(bits: int) -> int:
    """Q_b: the largest magnitude that a symmetric b-bit integer takes here."""
    return int(2 ** (bits - 1) - 1)


def step_of(amax: Tensor, bits: int) -> Tensor:
    """Return the quantization step (max|X| + eps) / Q_b in float32, of any shape."""
    return (amax.to(torch.float32) + EPS) / largest_integer(bits)


def to_integers(x: Tensor, step: Tensor, bits: int, zero_point: int = 0) -> Tensor:
    """Return round(x / step) within [-Q_b, Q_b] less the zero point, ties to even, as floats of x's dtype."""
    limit = largest_integer(bits)
    return (x / step).round_().clamp_(-limit - zero_point, limit - zero_point)


class Quantizer(nn.Module):
    """Rounds activations to the integers of a step: a static one for the whole tensor, or one computed as they come.

    Args:
        bits: 8, 6 or 4.
        amax: max|X| over the calibration images, a scalar; None computes it at run time.
        axes: for the dynamic kind, the axes that share a step, such as (-1,) for one step a token.
        least: min X over the calibration images, where integers are to cover [min, max] with a zero point instead of
            +-max|X|; `amax` is then max X.

    Attributes:
        scale: the static step, a float32 buffer of no axes; None for the dynamic kind.
        zero_point: the stored integer that stands for 0; 0 unless `least` is given.

    Raises:
        ValueError: if `amax` or `least` is not finite.
    """

    scale: Tensor | None

    def __init__(
        self,
        bits: int,
        amax: Tensor | None = None,
        axes: tuple[int, ...] = (-1,),
        least: Tensor | None = None,
    ) -> None:
        super().__init__()
        for extreme in (amax, least):
            if extreme is None or bool(torch.isfinite(extreme)):
                continue
            raise ValueError(
                f"max|X| is {float(extreme.abs())} over the calibration images: no static scale can hold that"
            )
        self.bits = bits
        self.axes = axes
        self.zero_point = 0
        scale = None if amax is None else step_of(amax.detach(), bits).reshape(())
        if least is not None:
            assert amax is not None
            scale = step_of((amax.detach().float() - least.detach().float()) / 2, bits).reshape(())
            self.zero_point = -largest_integer(bits) - round(float(least) / float(scale))
        self.register_buffer("scale", scale)

    @property
    def granularity(self) -> str:
        """Either "tensor", static, or "dynamic"."""
        return "dynamic" if self.scale is None else "tensor"

    def integers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return integers less the zero point, as floats (float32, float64 for float64 input), and their step."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        step = self.scale
        if step is None:
            step = step_of(x.abs().amax(self.axes, keepdim=True), self.bits)
        return to_integers(x, step, self.bits, self.zero_point), step

    def forward(self, x: Tensor) -> Tensor:
        """Return x rounded to its grid: integers times step, in x's dtype."""
        integers, step = self.integers(x)
        return integers.mul_(step).to(x.dtype)

    def extra_repr(self) -> str:
        """Show what a user wants to see of a scale."""
        return (
            f"{self.bits} bits, {self.granularity}"
            + ("" if self.scale is None else f", step={float(self.scale):.6g}")
            + (f", zero point={self.zero_point}" if self.zero_point else "")
        )


def along(vector: Tensor, ndim: int, axis: int) -> Tensor:
    """Shape a vector of channels so that it broadcasts along `axis` of a tensor with `ndim` axes."""
    return vector.reshape([-1 if index == axis % ndim else 1 for index in range(ndim)])


class QuantizedLayer(nn.Module):
    """A Linear or convolution that multiplies integers: takes and returns floats.

    Args:
        layer: the float layer; its parameters are read, not kept.
        input_quantizer: how the input becomes integers.
        bits: of the weights: 8, 7, 6 or 4.
        per_channel: one step for each output channel, not one for the tensor.

    Attributes:
        weight_int: the integers, int8, in the float weight's shape.
        weight_scale: the step, float32: of no axes, or (output channels,).
        bias: float32, or None.
        compensation: None or a `Compensation` applied to the input and the output.

    Raises:
        TypeError: for a convolution whose forward is its own (those of timm with standardized weights excepted): the
            weight that it multiplies with is not the stored one.
        ValueError: if the weight is not finite.
    """

    stream: ClassVar[int] = 0
    """Position of the argument that it reads; a StreamQuantizer has one too."""
    number_format: ClassVar[str] = "int"
    """What weight and input are rounded to."""
    weight_int: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    compensation: nn.Module | None

    def __init__(self, layer: nn.Module, input_quantizer: Quantizer, bits: int, *, per_channel: bool) -> None:
        super().__init__()
        weight, bias = _parameters(layer)
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("the weight has non-finite values: it cannot be quantized")
        self.bits = bits
        self.channel_axis = -1 if isinstance(layer, nn.Linear) else 1
        self._hold(weight, per_channel)
        self.register_buffer("bias", bias)
        self.geometry = None if isinstance(layer, nn.Linear) else _without_parameters(layer)
        self.input_quantizer = input_quantizer
        self.compensation = None
        self._in_float32 = self._fits_float32()

    def _hold(self, weight: Tensor, per_channel: bool) -> None:
        """Keep a weight as `weight_scale` and `weight_int`."""
        rows = weight.flatten(1)
        self.register_buffer(
            "weight_scale", step_of(rows.abs().amax(1) if per_channel else rows.abs().max(), self.bits)
        )
        step = along(self.weight_scale, weight.ndim, 0) if per_channel else self.weight_scale
        self.register_buffer("weight_int", to_integers(weight, step, self.bits).to(torch.int8))

    def _fits_float32(self) -> bool:
        """Whether products are summed in float32: wherever that is exact."""
        largest_sum = int(self.weight_int.flatten(1).abs().sum(1, dtype=torch.int64).max())
        largest_input = largest_integer(self.input_quantizer.bits) + abs(self.input_quantizer.zero_point)
        return largest_sum * largest_input < _EXACT_FLOAT32

    def __getattr__(self, name: str) -> Any:
        """Answer for the convolution whose place this takes: some models read kernel_size and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            geometry = self.__dict__["_modules"].get("geometry")
            if geometry is None:
                raise
            return getattr(geometry, name)

    @property
    def weight(self) -> Tensor:
        """The weight that the integers stand for, float32."""
        scale = self.weight_scale
        return self.weight_int.to(torch.float32) * (along(scale, self.weight_int.ndim, 0) if scale.ndim else scale)

    @property
    def out_features(self) -> int:
        """Number of output channels."""
        return self.weight_int.shape[0]

    @property
    def in_features(self) -> int:
        """Number of input channels."""
        return self.weight_int.shape[1] * (self.geometry.groups if isinstance(self.geometry, _CONVS) else 1)

    def accumulate(self, integers: Tensor) -> Tensor:
        """Return the sums of integer products, exact, as floats: what an int32 accumulator holds.

        A device without float64 gets what float32 cannot hold rounded to it, once, when all is added.

        Args:
            integers: the input's integers, as floats, in the float layer's input shape.
        """
        if self._in_float32:
            return self._products(integers, self.weight_int.to(integers.dtype))
        return back(self._products(wide(integers), wide(self.weight_int)), integers.device)

    def _products(self, integers: Tensor, weight: Tensor) -> Tensor:
        if not isinstance(self.geometry, _CONVS):
            return F.linear(integers, weight)
        if isinstance(self.geometry, Conv2dSame) or getattr(self.geometry, "same_pad", False):
            integers = pad_same(integers, self.geometry.kernel_size, self.geometry.stride, self.geometry.dilation)
        sums: Tensor = self.geometry._conv_forward(integers, weight, None)
        return sums

    def forward(self, x: Tensor) -> Tensor:
        """Return accumulate(integers of x) * step of x * step of the weight + bias, in x's dtype.

        Raises:
            RuntimeError: in training mode: rounding has no gradient and the scales are frozen.
        """
        if self.training:
            raise RuntimeError("a statically quantized model is for evaluation only: call model.eval()")
        with torch.autocast(x.device.type, enabled=False):
            integers, step = self.input_quantizer.integers(x)
            sums = self.accumulate(integers)
            step = step * (
                along(self.weight_scale, x.ndim, self.channel_axis) if self.weight_scale.ndim else self.weight_scale
            )
            if self.bias is None:
                y = sums * step
            else:  # addcmul and not `+`: a residual add is recognised by being an add
                y = torch.addcmul(along(self.bias, x.ndim, self.channel_axis).to(sums.dtype), sums, step.to(sums.dtype))
            if self.compensation is not None:
                y = self.compensation(x, y)
            return y.to(x.dtype)

    def extra_repr(self) -> str:
        """Show bits, shape and granularity of the weight."""
        kind = "channel" if self.weight_scale.ndim else "tensor"
        return f"{self.in_features} -> {self.out_features}, weight: {self.bits} bits, per {kind}"


def is_quantizable(layer: nn.Module) -> bool:
    """Say whether this is a layer that QuantizedLayer replaces: a Linear or a convolution."""
    return isinstance(layer, (nn.Linear, *_CONVS))


def _parameters(layer: Any) -> tuple[Tensor, Tensor | None]:
    if not isinstance(layer, nn.Linear) and type(layer).forward not in _CONV_FORWARDS:
        raise TypeError(
            f"{type(layer).__name__} computes its weight in its own forward, so the stored weight is not what it "
            "multiplies with: replace it by a plain convolution that holds the effective weight first"
        )
    weight, bias = layer.weight.detach(), layer.bias
    if isinstance(layer, _STANDARDIZED):
        with _ConvWeight() as seen, torch.no_grad():
            layer.eval()(weight.new_zeros(1, layer.in_channels, *(4 * size for size in layer.kernel_size)))
        weight = seen.weight
    return weight.float(), None if bias is None else bias.detach().float().clone()


class _ConvWeight(TorchFunctionMode):
    """Catches the weight that a convolution multiplies with, once it is standardized."""

    weight: Tensor

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.conv2d:
            self.weight = args[1]
        return func(*args, **(kwargs or {}))


def _without_parameters(layer: Any) -> nn.Module:
    """Keep a convolution's stride, padding and groups, and drop its weights."""
    layer.weight = layer.bias = None
    module: nn.Module = layer
    return module
