"""The FP8 linear layer in plain PyTorch: an nn.Linear that owns the very parameters of the layer it replaces.

Three products, as FP8 hardware forms them (T tokens, I inputs, O outputs):
    y_TO  = x_TI @ w_OI^T       x and w rounded to E4M3
    dx_TI = dy_TO @ w_OI        dy rounded once, to E5M2 in the hybrid format; the saved E4M3 w
    dw_OI = dy_TO^T @ x_TI      the same dy; the saved E4M3 x
The bias gradient sums the gradient before rounding. What is saved for backward is the rounded operands, never a
float32 copy.

Each product is rounded to the activation dtype (the autocast dtype, or that of the input where autocast is off),
then to the dtype of the tensor it is the gradient of. Odd numbers of tokens and features are the arithmetic's business.
Follows the structure of Transformer Engine's Linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tweo_timm.fp8.arithmetic import ARITHMETICS
from tweo_timm.fp8.cast import FORMATS, Fp8Format
from tweo_timm.fp8.region import Kernel, LayerSite
from tweo_timm.fp8.scaling import current_scale

Observe = Callable[[str, Tensor, Tensor, Fp8Format], None]


class Fp8Linear(nn.Linear):
    """nn.Linear whose three matrix products run in FP8; made by `from_float`."""

    _fp8_site: LayerSite

    @classmethod
    def from_float(cls, linear: nn.Linear, site: LayerSite) -> Fp8Linear:
        """Return the FP8 face of ``linear``: same parameters, same hooks, same buffers, by identity.

        The two modules share their registries, so whatever is later done to one (a new parameter, a hook) is seen by
        both and nothing is lost when the original is put back.
        """
        layer = cls.__new__(cls)
        layer.__dict__.update(linear.__dict__)
        layer._fp8_site = site
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``[..., in_features]``; the result is ``[..., out_features]`` in the activation dtype.

        Raises:
            RuntimeError: for another number of features.
        """
        if input.shape[-1] != self.in_features:
            raise RuntimeError(
                f"this layer takes {self.in_features} features in the last dimension and got {tuple(input.shape)}"
            )
        x_TI = input.reshape(-1, self.in_features)
        region = self._fp8_site.region
        scales = self._fp8_site.scales(x_TI, self.weight, self.training)
        operands = (x_TI, self.weight, self.bias, *scales, region.kernel, activation_dtype(input))
        y_TO: Tensor
        if region.observer is not None:
            y_TO = _observed_product(*operands, self._fp8_site.observe)
        else:
            y_TO = _product(*operands)
        # FSDP2 warns of a model whose output is a view, as that of its head would be.
        return y_TO if input.ndim == 2 else y_TO.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Add how the layer computes to what nn.Linear prints."""
        region = self._fp8_site.region
        formats = f"{region.forward_format.name}/{region.backward_format.name}"
        return f"{super().extra_repr()}, fp8={formats} {region.recipe.scaling} {region.kernel.arithmetic}"


def activation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a layer given ``x`` answers: autocast's where it is on, else that of ``x``."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        w_OI: Tensor,
        bias_O: Tensor | None,
        scale_x: Tensor,
        scale_w: Tensor,
        scale_dy: Tensor | None,
        dy_amax: Tensor | None,
        kernel: Kernel,
        dtype: torch.dtype,
        observe: Observe | None,
    ) -> Tensor:
        arithmetic, fmt = ARITHMETICS[kernel.arithmetic], FORMATS[kernel.forward_format]
        if observe:
            observe("x", x_TI, scale_x, fmt)
            observe("w", w_OI, scale_w, fmt)
        xq_TI = arithmetic.quantize(x_TI, scale_x, fmt)
        wq_OI = arithmetic.quantize(w_OI, scale_w, fmt)
        ctx.save_for_backward(xq_TI, wq_OI, scale_x, scale_w, scale_dy)
        ctx.kernel, ctx.observe, ctx.dy_amax, ctx.dtype = kernel, observe, dy_amax, dtype
        ctx.x_dtype, ctx.w_dtype, ctx.bias_dtype = x_TI.dtype, w_OI.dtype, None if bias_O is None else bias_O.dtype
        return arithmetic.product(xq_TI, wq_OI.t(), scale_x, scale_w, bias_O, dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        xq_TI, wq_OI, scale_x, scale_w, scale_dy = ctx.saved_tensors
        arithmetic, fmt = ARITHMETICS[ctx.kernel.arithmetic], FORMATS[ctx.kernel.backward_format]
        if scale_dy is None:
            amax = arithmetic.absolute_maximum(dy_TO)
            scale_dy = current_scale(amax, fp8_max=fmt.max, margin=ctx.kernel.margin)
        elif ctx.dy_amax is not None:
            arithmetic.record(ctx.dy_amax, dy_TO)
        if ctx.observe:
            ctx.observe("dy", dy_TO, scale_dy, fmt)
        dx_TI = dw_OI = db_O = None
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        if needs_x or needs_w:
            dyq_TO = arithmetic.quantize(dy_TO, scale_dy, fmt)
        if needs_x:
            dx_TI = arithmetic.product(dyq_TO, wq_OI, scale_dy, scale_w, None, ctx.dtype, fast=False).to(ctx.x_dtype)
        if needs_w:
            dw_OI = arithmetic.product(dyq_TO.t(), xq_TI, scale_dy, scale_x, None, ctx.dtype, fast=False).to(
                ctx.w_dtype
            )
        if needs_bias:
            db_O = dy_TO.sum(0).to(ctx.bias_dtype)
        return dx_TI, dw_OI, db_O, None, None, None, None, None, None, None


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _product(*operands: Any) -> Tensor:
    """Run the layer's products; left whole by Dynamo, because its backward records a maximum in place."""
    return cast(Tensor, _Fp8Product.apply(*operands, None))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _observed_product(*operands: Any) -> Tensor:
    """Run the layer's products and show the operands to an observer, outside any compiled graph."""
    return cast(Tensor, _Fp8Product.apply(*operands))
