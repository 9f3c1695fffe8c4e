"""What an FP8 matrix unit does, twice: on the real unit, and emulated on any device.

An arithmetic rounds a tensor to FP8 and multiplies two rounded matrices, dividing the product by both scales.
Everything above it (scales, saved tensors, gradients) is the same for both.

Emulated: operands rounded to the FP8 grid are held in bfloat16, which represents them exactly, and multiplied with
    float32 accumulation. A bfloat16 output is
rounded once on a CPU, after scale and bias, as on FP8 hardware; on other devices once more, before the scale. Any
other output dtype is multiplied in float32, whose accumulation order is the only difference left.

Native: ``torch.nn.functional.scaled_mm``, or ``torch._scaled_mm`` where PyTorch is older. The unit wants every
    dimension to be a multiple of 16; zero rows and
columns are added here and cut off again, which changes no product.

Under torch.compile the emulation is two opaque operators. Left open, a compiler that is allowed unsafe float
arithmetic may simplify the very sum that rounds. The same bits come out compiled or not.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tweo_timm.fp8.cast import FORMATS, Fp8Format, absolute_maximum, round_to_fp8
from tweo_timm.machine import low_precision

_ALIGNMENT = 16


class Arithmetic(Protocol):
    """The three operations an FP8 linear layer is made of."""

    name: str

    def absolute_maximum(self, x: Tensor) -> Tensor:
        """Return ``max|x|`` as a float32 scalar, ignoring NaN."""

    def record(self, amax: Tensor, x: Tensor) -> None:
        """Raise ``amax`` (float32, one element) to ``max|x|`` in place."""

    def quantize(self, x: Tensor, scale: Tensor, fmt: Fp8Format) -> Tensor:
        """Scale, saturate and round ``x`` to ``fmt``."""

    def product(
        self,
        a_MK: Tensor,
        b_KN: Tensor,
        scale_a: Tensor,
        scale_b: Tensor,
        bias_N: Tensor | None,
        dtype: torch.dtype,
        fast: bool,
    ) -> Tensor:
        """Return ``a @ b / (scale_a * scale_b) + bias`` in ``dtype``; ``fast`` permits less precise accumulation."""


class EmulatedArithmetic:
    """FP8 products formed in bfloat16 with float32 accumulation, on any device."""

    name = "emulated"

    def absolute_maximum(self, x: Tensor) -> Tensor:
        """Return ``max|x|`` as a float32 scalar, ignoring NaN."""
        return _absolute_maximum_op(x) if torch.compiler.is_compiling() else absolute_maximum(x)

    def record(self, amax: Tensor, x: Tensor) -> None:
        """Raise ``amax`` (float32, one element) to ``max|x|`` in place."""
        record = _record_op if torch.compiler.is_compiling() else _record
        record(amax, x)

    def quantize(self, x: Tensor, scale: Tensor, fmt: Fp8Format) -> Tensor:
        """Scale, saturate and round ``x`` to ``fmt``; the result is bfloat16, its zeros without sign."""
        if torch.compiler.is_compiling():
            return cast(Tensor, _round_op(x, scale, fmt.name))
        return round_to_fp8(x, scale, fmt, signed_zeros=False)

    def product(
        self,
        a_MK: Tensor,
        b_KN: Tensor,
        scale_a: Tensor,
        scale_b: Tensor,
        bias_N: Tensor | None,
        dtype: torch.dtype,
        fast: bool,
    ) -> Tensor:
        """Return ``a @ b / (scale_a * scale_b) + bias`` in ``dtype``; accumulation is always float32."""
        multiply = _product_op if torch.compiler.is_compiling() else _emulated_product
        return multiply(a_MK, b_KN, scale_a, scale_b, bias_N, dtype)


class NativeArithmetic:
    """FP8 products on the matrix unit of a GPU, through PyTorch's scaled matrix product."""

    name = "native"

    def absolute_maximum(self, x: Tensor) -> Tensor:
        """Return ``max|x|`` as a float32 scalar, ignoring NaN."""
        return absolute_maximum(x)

    def record(self, amax: Tensor, x: Tensor) -> None:
        """Raise ``amax`` (float32, one element) to ``max|x|`` in place."""
        _record(amax, x)

    def quantize(self, x: Tensor, scale: Tensor, fmt: Fp8Format) -> Tensor:
        """Scale, saturate and round ``x`` to ``fmt``; the result is float8."""
        return (x.detach().float() * scale).clamp(-fmt.max, fmt.max).to(fmt.dtype)

    def product(
        self,
        a_MK: Tensor,
        b_KN: Tensor,
        scale_a: Tensor,
        scale_b: Tensor,
        bias_N: Tensor | None,
        dtype: torch.dtype,
        fast: bool,
    ) -> Tensor:
        """Return ``a @ b / (scale_a * scale_b) + bias`` in ``dtype``."""
        rows, columns = a_MK.shape[0], b_KN.shape[1]
        a = _aligned(a_MK)
        # The unit reads its second operand by columns.
        b = _aligned(b_KN.t()).t()
        out = _scaled_mm(a, b, scale_a.reciprocal(), scale_b.reciprocal(), dtype, fast)[:rows, :columns]
        return out if bias_N is None else out + bias_N.to(dtype)


ARITHMETICS: dict[str, Arithmetic] = {one.name: one for one in (EmulatedArithmetic(), NativeArithmetic())}


def _record(amax: Tensor, x: Tensor) -> None:
    amax.copy_(torch.maximum(amax, absolute_maximum(x)))


def _emulated_product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    # Where bfloat16 products are slow, the same operands are multiplied in float32: the same products, summed in
    # float32 too, and rounded once.
    if a.is_meta or (dtype == torch.bfloat16 and low_precision("bfloat16", str(a.device)).fast):
        return _scaled_addmm(a, b, scale_a, scale_b, bias, dtype)
    with torch.autocast(a.device.type, enabled=False):  # it would cast the operands down again
        return _scaled_addmm(a.float(), b.float(), scale_a, scale_b, bias, dtype)


def _scaled_addmm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    inverse = scale_a.reciprocal() * scale_b.reciprocal()
    if a.device.type != "cpu":  # reading the scale there would stall the device
        out = (a @ b).float() * inverse
        return (out if bias is None else out + bias.to(dtype)).to(dtype)
    offset = a.new_zeros(()) if bias is None else bias.to(dtype).to(a.dtype)
    return torch.addmm(offset, a, b, beta=int(bias is not None), alpha=float(inverse)).to(dtype)


def _aligned(x: Tensor) -> Tensor:
    """Return ``x`` row-major, with zeros appended until both dimensions are multiples of 16."""
    rows, columns = (-size % _ALIGNMENT for size in x.shape)
    if rows == columns == 0:
        return x.contiguous()
    # Padding is defined for bytes on every device, and a zero byte is a zero in both formats.
    return F.pad(x.contiguous().view(torch.uint8), (0, columns, 0, rows)).view(x.dtype)


def _scaled_mm(a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    functional: Any = F
    if hasattr(functional, "scaled_mm"):
        per_tensor = functional.ScalingType.TensorWise
        out = functional.scaled_mm(
            a, b, inverse_a, per_tensor, inverse_b, per_tensor, output_dtype=dtype, use_fast_accum=fast
        )
        return cast(Tensor, out)
    return torch._scaled_mm(a, b, scale_a=inverse_a, scale_b=inverse_b, out_dtype=dtype, use_fast_accum=fast)


@torch.library.custom_op("tweo_timm::absolute_maximum", mutates_args=())
def _absolute_maximum_op(x: Tensor) -> Tensor:
    return absolute_maximum(x).clone()


@_absolute_maximum_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


@torch.library.custom_op("tweo_timm::record_absolute_maximum", mutates_args=("amax",))
def _record_op(amax: Tensor, x: Tensor) -> None:
    _record(amax, x)


@torch.library.custom_op("tweo_timm::round_to_fp8", mutates_args=())
def _round_op(x: Tensor, scale: Tensor, fmt: str) -> Tensor:
    return round_to_fp8(x, scale, FORMATS[fmt], signed_zeros=False)


@_round_op.register_fake
def _(x: Tensor, scale: Tensor, fmt: str) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)


@torch.library.custom_op("tweo_timm::fp8_product", mutates_args=())
def _product_op(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return _emulated_product(a, b, scale_a, scale_b, bias, dtype)


@_product_op.register_fake
def _(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)
