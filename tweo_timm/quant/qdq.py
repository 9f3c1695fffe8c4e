"""What a quantized model's parts look like in an ONNX graph: QuantizeLinear, DequantizeLinear and a float operator.

Engines recognise int8 computation by a pattern: operands of a MatMul or Conv come out of DequantizeLinear nodes. The
modules here stand in for a model's own while it is traced and emit that pattern with the frozen scales, so the integers
in the file are those of the PyTorch model, but that an engine's int8 goes to -128 where the model stops at -127. They
trace, they do not compute: outside of an export they return zeros.

Linear layers become MatMul and Add, with the weight stored (in, out): a Transpose between DequantizeLinear and MatMul
would hide the pattern. For onnxruntime, which has no int8 convolution with a float result, so does a patch embedding:
it is a product of patches. Grids below 8 bits are clipped first and stored in 8 bits: no engine has 6-bit integers.
E4M3 has the same pattern: QuantizeLinear saturates, as the model does. What leaves DequantizeLinear is of the scales'
type, so that a model whose float parts are float16 has them between its integers too.
A step that is computed at run time, one a token, is refused: ONNX has no operator for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn

from tweo_timm.fp8.cast import E4M3
from tweo_timm.quant.float8 import Float8Quantizer
from tweo_timm.quant.quantizer import QuantizedLayer, Quantizer, largest_integer

UNSIGNED_ZERO_POINT = 128
"""Added to a signed integer, it gives the unsigned one that stands for the same value."""


def stand_in(model: nn.Module, *, unsigned: bool) -> nn.Module:
    """Replace every quantized layer and static quantizer of a model by its stand-in, in place.

    Args:
        model: what `quantize_static` returned, a copy that may be changed, its compensations folded.
        unsigned: activations are stored as uint8 with zero point 128, not int8 with zero point 0: the same values.

    Raises:
        ValueError: if a quantizer computes its step at run time.
    """
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent._modules.items()):
            try:
                if isinstance(child, QuantizedLayer):
                    parent._modules[name] = QdqLayer(child, unsigned=unsigned)
                elif isinstance(child, Quantizer) and not isinstance(parent, QuantizedLayer):
                    parent._modules[name] = QdqPoint(child, unsigned=unsigned)
            except ValueError as error:
                raise ValueError(f"{parent_name}.{name}".lstrip(".") + f": {error}") from error
    return model


class QdqPoint(nn.Module):
    """A static Quantizer in a graph: [Clip,] QuantizeLinear, DequantizeLinear.

    Args:
        quantizer: what it stands for.
        unsigned: see `stand_in`.

    Raises:
        ValueError: if the quantizer computes its step at run time.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: Quantizer, *, unsigned: bool) -> None:
        super().__init__()
        if quantizer.scale is None:
            raise ValueError(
                "its step is computed at run time, one a token, which ONNX cannot express: quantize with static "
                "activation scales, such as w8a8-tt or w8a8-ct"
            )
        zero = _zero_point(quantizer, unsigned)
        largest, step = largest_integer(quantizer.bits), float(quantizer.scale)
        bounds = tuple((side * largest - quantizer.zero_point) * step for side in (-1, 1))
        self.bounds = None if quantizer.bits == 8 else bounds
        self.register_buffer("scale", quantizer.scale.detach().clone())
        self.register_buffer("zero_point", zero)

    def forward(self, x: Tensor) -> Tensor:
        """Emit the nodes that round x."""
        with torch._C.DisableTorchFunction():
            if self.bounds is not None:
                x = x.clamp(*self.bounds)
            integers = _node("QuantizeLinear", (x, self.scale, self.zero_point), x.shape, self.zero_point.dtype)
            return _node("DequantizeLinear", (integers, self.scale, self.zero_point), x.shape, self.scale.dtype)


class QdqLayer(QuantizedLayer):
    """A QuantizedLayer in a graph: both operands through DequantizeLinear into MatMul (and Add) or Conv.

    Args:
        layer: what it stands for; its compensation must be folded.
        unsigned: see `stand_in`.

    Raises:
        ValueError: if the input's step is computed at run time, or a compensation is left.
    """

    def __init__(self, layer: QuantizedLayer, *, unsigned: bool) -> None:
        nn.Module.__init__(self)
        if layer.compensation is not None:
            raise ValueError(
                f"its compensation, a {type(layer.compensation).__name__}, cannot be folded into its weights: export a "
                "scheme without it"
            )
        self.bits, self.channel_axis, self.compensation = layer.bits, layer.channel_axis, None
        self.input = QdqPoint(layer.input_quantizer, unsigned=unsigned)
        self._patch = patch_size_of(layer.geometry) if unsigned else None
        is_product = layer.geometry is None or self._patch is not None
        self.register_buffer("weight_int", layer.weight_int)
        self.register_buffer("weight_scale", layer.weight_scale)
        self.register_buffer("stored", layer.weight_int.flatten(1).T.contiguous() if is_product else layer.weight_int)
        self.register_buffer("zero_point", torch.zeros_like(layer.weight_scale, dtype=layer.weight_int.dtype))
        self.register_buffer("bias", layer.bias)
        self.geometry = layer.geometry
        self._attributes = {"axis": 1 if is_product else 0} if layer.weight_scale.ndim else {}

    def forward(self, x: Tensor) -> Tensor:
        """Emit the layer's nodes; x is (..., in) for a Linear, (B, C, ...) for a convolution."""
        geometry: Any = self.geometry
        with torch._C.DisableTorchFunction():  # a StreamQuantizer counts additions, and the bias is none of its own
            if geometry is None:
                return self._product(x)
            if isinstance(geometry, Conv2dSame) or getattr(geometry, "same_pad", False):  # zeros are on every grid
                x = pad_same(x, geometry.kernel_size, geometry.stride, geometry.dilation)
            if self._patch is None:
                convolved: Tensor = geometry._conv_forward(self.input(x), self._weight(), self.bias)
                return convolved
            tokens, grid = patches_of(x, self._patch)
            y = self._product(tokens)
            return y.transpose(1, 2).reshape(-1, y.shape[-1], *grid)

    def _weight(self) -> Tensor:
        stored: Any = self.stored
        inputs = (stored, self.weight_scale, self.zero_point)
        return _node("DequantizeLinear", inputs, stored.shape, self.weight_scale.dtype, self._attributes)

    def _product(self, x: Tensor) -> Tensor:
        weight = self._weight()
        y = _node("MatMul", (self.input(x), weight), (*x.shape[:-1], weight.shape[1]), weight.dtype)
        return y if self.bias is None else _node("Add", (y, self.bias), y.shape, y.dtype)


def _zero_point(quantizer: Quantizer, unsigned: bool) -> Tensor:
    """What stands for 0, in the type that values are stored in."""
    if isinstance(quantizer, Float8Quantizer):
        return torch.zeros((), dtype=E4M3.dtype)
    if unsigned:
        return torch.tensor(UNSIGNED_ZERO_POINT + quantizer.zero_point, dtype=torch.uint8)
    return torch.tensor(quantizer.zero_point, dtype=torch.int8)


def patch_size_of(geometry: Any) -> tuple[int, int] | None:
    """The patches of a convolution that is a product of patches and weight, such as ViT's patch embedding; or None."""
    if not isinstance(geometry, nn.Conv2d) or isinstance(geometry.padding, str) or any(geometry.padding):
        return None
    is_product = geometry.stride == geometry.kernel_size and geometry.groups == 1 and geometry.dilation == (1, 1)
    return (geometry.kernel_size[0], geometry.kernel_size[1]) if is_product else None


def patches_of(x: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Cut (B, C, H, W) into (B, patches, C * h * w), a rest left out, as a convolution does; and the patches' grid."""
    height, width = x.shape[2] // size[0], x.shape[3] // size[1]
    x = x[:, :, : height * size[0], : width * size[1]]
    x = x.reshape(-1, x.shape[1], height, size[0], width, size[1])
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), (height, width)


def _node(
    op: str,
    inputs: Sequence[Any],
    shape: Sequence[Any],
    dtype: torch.dtype,
    attributes: dict[str, Any] | None = None,
) -> Tensor:
    return torch.onnx.ops.symbolic(op, inputs, attributes, dtype=dtype, shape=shape)
