"""The TWEO penalty.

    L_total = L_task + weight(t) * L_TWEO,      L_TWEO = (1/L) sum_l mean((|A_l| / (tau + eps))^p)

with A_l the output of transformer block l (arXiv:2511.23225; no official code is public). Everything here is pure: it
knows tensors and numbers, no models. Written naively, ``(A.float().abs() / tau).pow(4).mean()`` keeps four copies of A
for the backward pass and overflows in half precision at |A| = 48; the autograd function below keeps A itself, which the
next layer keeps anyway, and takes the mean's 1 / n under the power, so that no summand overflows where the mean does
not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tweo_timm.config import TweoConfig


def tweo_loss(outputs: Sequence[Tensor], config: TweoConfig) -> Tensor:
    """Return L_TWEO of the outputs of all blocks, without its weight.

    Args:
        outputs: one tensor a block, of any shape and any floating dtype, on one device.
        config: tau, eps, power and reduction are used.

    Returns:
        A differentiable scalar: float64 if an output is float64, float32 otherwise. NaN in an output gives NaN,
        infinity gives infinity. The gradient has the dtype of the output it belongs to, and overflows where that dtype
        does or, with p = 4, float32 for x^3: beyond |x| = 7e12.

    Raises:
        ValueError: if there is no output, or an empty one.
        TypeError: if an output is no floating-point tensor.
    """
    if not outputs:
        raise ValueError("L_TWEO is a mean over blocks and got none: pass the output of every transformer block")
    _check_outputs(outputs)
    return mean_power(outputs, block_shares([output.numel() for output in outputs], config), config)


def block_shares(numels: Sequence[int], config: TweoConfig) -> list[float]:
    """Return the share of each block in L_TWEO, by `config.reduction`; their sum is 1.

    Args:
        numels: the number of elements of each block's output.
        config: its `reduction` is used.
    """
    if config.reduction == "block":
        return [1 / len(numels)] * len(numels)
    total = sum(numels)
    return [numel / total for numel in numels]


def mean_power(outputs: Sequence[Tensor], shares: Sequence[float], config: TweoConfig) -> Tensor:
    """Return sum_l share_l * mean((|A_l| / (tau + eps))^p) over some blocks.

    It is one node of the autograd graph, which makes the gradients of all its outputs when the backward pass comes by.

    Args:
        outputs: block outputs, floating tensors of any shape; they alone are kept for the backward pass.
        shares: their factors, positive.
        config: tau, eps and power are used.

    Returns:
        A differentiable scalar: float64 if an output is float64, float32 otherwise.

    Raises:
        ValueError: if an output is empty.
        TypeError: if an output is no floating-point tensor.
    """
    _check_outputs(outputs)
    factors = [share / x.numel() for share, x in zip(shares, outputs, strict=True)]
    value: Tensor = _PowerSum.apply(config.tau + config.eps, config.power, factors, *outputs)
    return value


def _check_outputs(outputs: Sequence[Tensor]) -> None:
    for x in outputs:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"L_TWEO takes floating-point tensors, the outputs of transformer blocks; got {kind}")
        if x.numel() == 0:
            raise ValueError(f"L_TWEO is a mean and got an empty block output, of shape {tuple(x.shape)}")


class _PowerSum(torch.autograd.Function):
    """sum_l factor_l * sum((|x_l| / scale)^p), with the x as the only tensors kept."""

    @staticmethod
    def forward(ctx: Any, scale: float, power: float, factors: list[float], *outputs: Tensor) -> Tensor:
        ctx.save_for_backward(*outputs)
        ctx.scale, ctx.power, ctx.factors = scale, power, factors
        # The factor goes under the power: then no summand is larger than the sum, and overflows before it does.
        sums = [
            _power_(_times(x, factor ** (1 / power) / scale), power).sum()
            for x, factor in zip(outputs, factors, strict=True)
        ]
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, power = ctx.scale, ctx.power
        if torch.is_grad_enabled():  # asked for a graph of the gradient: nothing may be overwritten
            slope, constant = _differentiable_slope, power / scale
        elif power == 4:
            slope, constant = _cubes, power / scale**power
        else:
            slope, constant = _slope, power / scale
        grads = {factor: grad * (factor * constant) for factor in set(ctx.factors)}  # mostly one
        wanted = ctx.needs_input_grad[3:]
        inputs = zip(ctx.saved_tensors, ctx.factors, wanted, strict=True)
        return (
            None,
            None,
            None,
            *(slope(x, scale, power, grads[f]).to(x.dtype) if want else None for x, f, want in inputs),
        )


def _slope(x: Tensor, scale: float, power: float, factor: Tensor) -> Tensor:
    """Return factor * a |a|^(p - 2), where a = x / scale."""
    a = _times(x, 1 / scale)
    return a.mul_(_power_(a.clone(), power - 2)).mul_(factor)


def _differentiable_slope(x: Tensor, scale: float, power: float, factor: Tensor) -> Tensor:
    a = _times(x, 1 / scale)
    return a * a.abs().pow(power - 2) * factor


def _cubes(x: Tensor, scale: float, power: float, factor: Tensor) -> Tensor:
    """Return factor * x^3, in two passes."""
    cubes = x.pow(3) if x.dtype == _wide_dtype(x) else x.to(_wide_dtype(x)).pow_(3)
    return cubes.mul_(factor)


def _times(x: Tensor, factor: float) -> Tensor:
    """A new tensor, x times a number, in float32 or wider."""
    wide = _wide_dtype(x)
    return x * factor if x.dtype == wide else x.to(wide).mul_(factor)


def _wide_dtype(x: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _power_(x: Tensor, power: float) -> Tensor:
    """Overwrite x with |x|^power; the usual powers are products, which cost a tenth of `pow`."""
    if power == 4:
        return x.square_().square_()
    if power == 2:
        return x.square_()
    if power == 0:
        return x.fill_(1)
    return x.abs_().pow_(power)
