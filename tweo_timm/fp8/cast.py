"""Rounding to the E4M3 and E5M2 grids, faster than casting to float8 and back.

Every E4M3 and E5M2 value is also a bfloat16 value. A tensor rounded to the FP8 grid but kept in bfloat16 can
therefore be multiplied by any device's bfloat16 matrix unit with exactly the products that an FP8 unit would form.
PyTorch's own way there, a cast to float8 and back, decodes one element at a time on a CPU; here the rounding is
arithmetic.

The rounding: let ``u`` be the power of two at or below ``|y|``, at least the smallest normal number. Adding ``c =
1.5 * 2**(23 - m) * u`` moves ``y`` to where float32 is spaced ``u / 2**m`` apart, m being the mantissa bits of the
format, so the addition itself rounds to nearest even; subtracting ``c`` is exact.

Saturates explicitly (PyTorch's E5M2 cast overflows to infinity), propagates NaN, keeps the sign of zero. Knows no
model and no scaling policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Elements a thread rounds at a time: small enough for the work buffers to stay in cache, large enough that starting
# ten operators costs little.
CHUNK_PER_THREAD = 1 << 18
_EXPONENT_BITS = 0x7F800000


@dataclass(frozen=True)
class Fp8Format:
    """One FP8 number format.

    Attributes:
        name: ``'e4m3'`` or ``'e5m2'``.
        dtype: PyTorch's dtype of that format.
        max: the largest finite value; larger inputs saturate here.
        min_normal: the smallest normal value; below it the grid is uniform.
        mantissa_bits: explicit mantissa bits.
    """

    name: str
    dtype: torch.dtype
    max: float
    min_normal: float
    mantissa_bits: int

    @property
    def shift(self) -> float:
        """What to multiply the exponent of a float32 by so that adding the result rounds to this format."""
        return 1.5 * 2.0 ** (23 - self.mantissa_bits)


E4M3 = Fp8Format("e4m3", torch.float8_e4m3fn, max=448.0, min_normal=2.0**-6, mantissa_bits=3)
E5M2 = Fp8Format("e5m2", torch.float8_e5m2, max=57344.0, min_normal=2.0**-14, mantissa_bits=2)
FORMATS = {fmt.name: fmt for fmt in (E4M3, E5M2)}


def round_to_fp8(x: Tensor, scale: Tensor, fmt: Fp8Format, *, signed_zeros: bool = True) -> Tensor:
    """Scale, saturate and round to the FP8 grid: ``(x.float() * scale).clamp(-max, max)`` to nearest even.

    Args:
        x: floating-point tensor of any shape.
        scale: float32 tensor with one element.
        fmt: the target format.
        signed_zeros: whether negative values that round to zero become -0, as in a cast to float8. It takes a fifth of
            the time, and a matrix product does not see it.

    Returns:
        A contiguous bfloat16 tensor of the shape of ``x``; infinities saturate and NaN stays NaN.
    """
    flat = x.detach().reshape(-1)
    out = torch.empty(flat.shape, dtype=torch.bfloat16, device=x.device)
    chunk = _chunk_size(flat)
    # The work buffers are made once: on a CPU they stay in the cache from one chunk to the next.
    work = torch.empty(3 if signed_zeros else 2, chunk, dtype=torch.float32, device=x.device)
    for start in range(0, flat.numel(), max(chunk, 1)):
        source = flat[start : start + chunk]
        size = source.numel()
        _round_chunk(source, scale.reshape(()), fmt, work[:, :size], out[start : start + size])
    return out.view(x.shape)


def _round_chunk(x: Tensor, scale: Tensor, fmt: Fp8Format, work: Tensor, out: Tensor) -> None:
    """Round ``x`` into ``out``; ``work`` is float32, rows of the size of ``x``: a third one keeps signs of zero."""
    y, unit, *kept = work.unbind()
    rounded = kept[0] if kept else y
    if x.dtype == torch.float32:
        torch.mul(x, scale, out=y)
    else:
        y.copy_(x).mul_(scale)
    y.clamp_(-fmt.max, fmt.max)
    torch.bitwise_and(y.view(torch.int32), _EXPONENT_BITS, out=unit.view(torch.int32))
    unit.clamp_min_(fmt.min_normal)
    # `unit * shift` is exact, so whether the device fuses the product with the sum or not, each line rounds once.
    torch.add(y, unit, alpha=fmt.shift, out=rounded)
    rounded.sub_(unit, alpha=fmt.shift)
    if kept:  # a sum that cancels is +0; the float8 cast keeps the sign of what it rounded to zero
        rounded.copysign_(y)
    out.copy_(rounded)


def _chunk_size(flat: Tensor) -> int:
    if flat.device.type != "cpu":
        return flat.numel()
    return min(flat.numel(), CHUNK_PER_THREAD * torch.get_num_threads())


def absolute_maximum(x: Tensor) -> Tensor:
    """Return ``max|x|`` as a float32 scalar that ignores NaN and keeps infinity, as the hardware does; 0 if empty."""
    x = x.detach()
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    if x.device.type == "cpu":
        low, high = torch.aminmax(x)
        peak = torch.maximum(-low, high).float()
        if not bool(peak.isnan()):
            return peak
    return torch.where(x.isnan(), 0, x.abs()).amax().float()
