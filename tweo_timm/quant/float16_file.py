"""A model whose floats are float16 in its file: islands between integers, scales and biases.

An engine that types strictly (TensorRT's --stronglyTyped) computes a file's float32 in float32, and what is left in
float takes half of an int8 file's time. Input and logits stay float32, and a LayerNormalization adds up in float32
(its stash_type), since sums of squares are what float16 overflows at first.

Refused: weights that float16 cannot hold, and steps that it rounds by more than 2^-8, where values would no longer be
those that calibration saw. Activations above 65504 are infinite in such a file: `validate.py --survey` finds them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tweo_timm.quant.qdq import QdqLayer, QdqPoint

_ROUNDING = 2**-8
_SMALLEST = 2**-14
"""The smallest number that float16 has at full precision."""


class Float16Inside(nn.Module):
    """A model between two casts, in place: float32 images in, float32 logits out, float16 between.

    Args:
        model: with stand-ins for its quantized parts; changed in place.

    Raises:
        ValueError: naming the tensor that float16 cannot hold.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, module in model.named_modules():
            if isinstance(module, QdqPoint):
                _check_step(f"the input of {name.removesuffix('.input')}", module.scale)
            elif isinstance(module, QdqLayer):
                module.weight_scale = _weight_step(name, module)
        self.model = in_precision(model, torch.float16)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes), float32, of images (B, C, H, W)."""
        logits: Tensor = self.model(images.to(torch.float16))
        return logits.to(torch.float32)


def in_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Bring the floats of a model into a precision, in place; integers and E4M3 numbers stay what they are.

    Raises:
        ValueError: naming a tensor that the precision cannot hold.
    """
    for place, module in model.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
                continue
            cast = tensor.detach().to(dtype)
            if bool((cast.isinf() & tensor.isfinite()).any()):
                largest = float(tensor.detach().abs().max())
                full = f"{place}.{name}".lstrip(".")
                raise ValueError(f"{full} holds {largest:.3g}, which {str(dtype).removeprefix('torch.')} cannot hold")
            if isinstance(tensor, nn.Parameter):
                tensor.data = cast
            else:
                setattr(module, name, cast)
    return model


def _weight_step(name: str, layer: QdqLayer) -> Tensor:
    """The steps of a weight; where a channel holds zeros alone, any step will do, and is one that float16 has."""
    stored: Any = layer.weight_int
    used = stored.float().flatten(1).ne(0).any(1) if layer.weight_scale.ndim else stored.float().ne(0).any()
    step = torch.where(used.reshape(layer.weight_scale.shape), layer.weight_scale, _SMALLEST)
    _check_step(f"the weight of {name}", step)
    return step


def _check_step(what: str, step: Tensor) -> None:
    wrong = ((step.half().float() - step).abs() > _ROUNDING * step).reshape(-1)
    if bool(wrong.any()):
        worst = float(step.reshape(-1)[wrong].min())
        raise ValueError(f"{what} has a step of {worst:.3g}, which float16 rounds too much: export in float32")
