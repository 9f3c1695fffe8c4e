"""The schemes fp16 and bf16: the model in that precision, as `model.half()` has it, between two casts.

Nothing is imitated: weights, activations and the operators are torch's own in that precision, so that what overflows
there is infinite here. What torch does not show is the float16 of other engines: squares inside LayerNorm, and logits
of attention that a fused product never stores (diagnose/float16.py reads those).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tweo_timm.flow import nested_tensors, with_tensors
from tweo_timm.quant.convert import Observation, refuse_unknown
from tweo_timm.quant.scheme import Scheme

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def convert(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    observation: Observation,
    scheme: Scheme,
    keep_float: Collection[str],
) -> None:
    """Put a model into half precision, in place: it takes float images and returns float32 outputs.

    Args:
        model: a float model.
        blocks: not needed.
        observation: not needed.
        scheme: of base fp16 or bf16.
        keep_float: modules that compute in float32; what they return is cast.

    Raises:
        ValueError: for a kept name that no module has.
    """
    dtype = DTYPES[scheme.base]
    refuse_unknown(keep_float, [name for name, _ in model.named_modules() if name])
    kept = {name: copy.deepcopy(model.get_submodule(name)).float() for name in sorted(keep_float)}
    model.to(dtype)
    for name, module in kept.items():
        _cast_around(module, torch.float32, dtype)
        model.set_submodule(name, module)
    _cast_around(model, dtype, torch.float32)


def _cast_around(module: nn.Module, inside: torch.dtype, outside: torch.dtype) -> None:
    """Cast the floating-point tensors that enter a module, and those that leave it."""

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _each(args, _cast_to(inside)), _each(kwargs, _cast_to(inside))

    def leave(_: nn.Module, args: Any, output: Any) -> Any:
        return _each(output, _cast_to(outside))

    module.register_forward_pre_hook(enter, with_kwargs=True)
    module.register_forward_hook(leave)


def _cast_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype) if x.is_floating_point() else x


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with every tensor changed, in tuples, lists and dicts too."""
    return with_tensors(value, map(change, nested_tensors(value)))
