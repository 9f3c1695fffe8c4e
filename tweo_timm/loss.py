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
    terms = [mean_power(output, config) for output in outputs]
    return mean_over_blocks(terms, [output.numel() for output in outputs], config)


def mean_power(x: Tensor, config: TweoConfig, mask: Tensor | None = None) -> Tensor:
    """Return mean((|x| / (tau + eps))^p), what one block adds to the penalty: a node of the autograd graph.

    Args:
        x: the block's output, a floating tensor of any shape; it alone is kept for the backward pass.
        config: tau, eps and power are used.
        mask: bool, the shape of `x` without its last axis: the tokens that the mean is over; None: all. The mean over
            none is 0.

    Returns:
        A differentiable scalar: float64 for float64, float32 otherwise.

    Raises:
        ValueError: if `x` is empty, or the mask is of another shape.
        TypeError: if `x` is no floating-point tensor.
    """
    _check_output(x)
    value: Tensor = _MeanPower.apply(x, config.tau + config.eps, config.power, _shares(x, mask))
    return value


def mean_over_blocks(terms: Sequence[Tensor], numels: Sequence[int], config: TweoConfig) -> Tensor:
    """Return L_TWEO from the mean power of each block, by `config.reduction`.

    Args:
        terms: a scalar a block.
        numels: the number of elements of each block's output.
        config: its `reduction` is used.
    """
    if config.reduction == "block":
        return torch.stack(list(terms)).mean()
    total = sum(numels)
    return torch.stack([term * (numel / total) for term, numel in zip(terms, numels, strict=True)]).sum()


def _shares(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """The share of each token's elements in the mean: (..., 1), wide; None where all have the same."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
        raise ValueError(
            f"the mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be bool, of the shape of a block's output "
            f"without its channels, {tuple(x.shape[:-1])}"
        )
    counted = mask.sum().clamp(min=1) * x.shape[-1]
    return (mask / counted).to(_wide_dtype(x)).unsqueeze(-1)


def _check_output(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"L_TWEO takes floating-point tensors, the outputs of transformer blocks; got {kind}")
    if x.numel() == 0:
        raise ValueError(f"L_TWEO is a mean and got an empty block output, of shape {tuple(x.shape)}")


class _MeanPower(torch.autograd.Function):
    """mean((|x| / scale)^p), with x (and the shares of its tokens, where they differ) as the only tensors kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, power: float, shares: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, shares)
        ctx.scale, ctx.power = scale, power
        # 1 / n goes under the power: then no summand is larger than the mean, and overflows before it does.
        if shares is None:
            return _power_(_times(x, x.numel() ** (-1 / power) / scale), power).sum()
        return _power_(_times(x, 1 / scale) * shares ** (1 / power), power).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shares = ctx.saved_tensors
        scale, power = ctx.scale, ctx.power
        if torch.is_grad_enabled():  # asked for a graph of the gradient: nothing may be overwritten
            slope, constant = _differentiable_slope, power / scale
        elif power == 4:
            slope, constant = _cubes, power / scale**power
        else:
            slope, constant = _slope, power / scale
        factor = grad * constant * (1 / x.numel() if shares is None else shares)
        return slope(x, scale, power, factor).to(x.dtype), None, None, None


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
