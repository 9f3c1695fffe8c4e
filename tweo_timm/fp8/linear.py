"""The FP8 linear layer in plain PyTorch: a subclass of nn.Linear that owns the very parameters of the layer it replaces.

Three products, as FP8 hardware forms them (T tokens, I inputs, O outputs):
    y_TO  = x_TI @ w_OI^T       x and w rounded to E4M3
    dx_TI = dy_TO @ w_OI        dy rounded once, to E5M2 in the hybrid format; the saved E4M3 w
    dw_OI = dy_TO^T @ x_TI      the same dy; the saved E4M3 x
The bias gradient sums the gradient before rounding. What is saved for backward is the rounded operands, never a float32 copy.

Each product is rounded to the activation dtype (the autocast dtype, or that of the input where autocast is off), then to the dtype of the tensor it is the
gradient of. Refuses nothing: odd shapes are the arithmetic's business. Follows the structure of Transformer Engine's Linear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tweo_timm.fp8.region import LayerSite


class Fp8Linear(nn.Linear):
    """nn.Linear whose three matrix products run in FP8; made by `from_float`."""

    _fp8_site: LayerSite

    @classmethod
    def from_float(cls, linear: nn.Linear, site: LayerSite) -> Fp8Linear:
        """Return the FP8 face of ``linear``: same parameters, same hooks, same buffers, by identity.

        The two modules share their registries, so whatever is later done to one (a new parameter, a hook) is seen by both and nothing is lost when
        the original is put back.
        """
        layer = cls.__new__(cls)
        layer.__dict__.update(linear.__dict__)
        layer._fp8_site = site
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``[..., in_features]``; the result is ``[..., out_features]`` in the activation dtype."""
        x_TI = input.reshape(-1, self.in_features)
        scales = self._fp8_site.scales(x_TI, self.weight, self.training)
        y_TO = _Fp8Product.apply(x_TI, self.weight, self.bias, *scales, self._fp8_site, activation_dtype(input))
        return y_TO.view(*input.shape[:-1], self.out_features)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Add how the layer computes to what nn.Linear prints."""
        region = self._fp8_site.region
        formats = f"{region.forward_format.name}/{region.backward_format.name}"
        return f"{super().extra_repr()}, fp8={formats} {region.recipe.scaling} {region.arithmetic.name}"


def activation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a layer given ``x`` answers: autocast's where it is on, else that of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


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
        site: LayerSite,
        dtype: torch.dtype,
    ) -> Tensor:
        region = site.region
        arithmetic, fmt = region.arithmetic, region.forward_format
        site.observe("x", x_TI, scale_x, fmt)
        site.observe("w", w_OI, scale_w, fmt)
        xq_TI = arithmetic.quantize(x_TI, scale_x, fmt)
        wq_OI = arithmetic.quantize(w_OI, scale_w, fmt)
        ctx.save_for_backward(xq_TI, wq_OI, scale_x, scale_w, scale_dy)
        ctx.site, ctx.dy_amax, ctx.dtype = site, dy_amax, dtype
        ctx.x_dtype, ctx.w_dtype, ctx.bias_dtype = x_TI.dtype, w_OI.dtype, None if bias_O is None else bias_O.dtype
        return arithmetic.product(xq_TI, wq_OI.t(), scale_x, scale_w, bias_O, dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        xq_TI, wq_OI, scale_x, scale_w, scale_dy = ctx.saved_tensors
        site: LayerSite = ctx.site
        arithmetic, fmt = site.region.arithmetic, site.region.backward_format
        if scale_dy is None:
            scale_dy = site.gradient_scale(dy_TO)
        elif ctx.dy_amax is not None:
            ctx.dy_amax.copy_(torch.maximum(ctx.dy_amax, arithmetic.absolute_maximum(dy_TO)))
        site.observe("dy", dy_TO, scale_dy, fmt)
        dx_TI = dw_OI = db_O = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dyq_TO = arithmetic.quantize(dy_TO, scale_dy, fmt)
        if ctx.needs_input_grad[0]:
            dx_TI = arithmetic.product(dyq_TO, wq_OI, scale_dy, scale_w, None, ctx.dtype, fast=False).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            dw_OI = arithmetic.product(dyq_TO.t(), xq_TI, scale_dy, scale_x, None, ctx.dtype, fast=False).to(ctx.w_dtype)
        if ctx.needs_input_grad[2]:
            db_O = dy_TO.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx_TI, dw_OI, db_O, None, None, None, None, None, None

