"""Powers of two that keep a trained model's values within float16: exact, without training, the same architecture.

The residual stream times 2^-k: every tensor that writes it is multiplied, and the norms that read it undo it, all but
for their eps, which is then larger in comparison. What that changes is measured by whoever asks for it.

A pair of linear maps, one behind the other, may share a factor otherwise: v's rows times 2^-k and the columns that read
them times 2^k; likewise the linear half of a gated MLP and its second layer. A power of two changes exponents alone, so
that no bit of a result changes, short of overflow and underflow.

Refused: streams that are handed out unnormalized (their scale is the model's output).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from timm.layers import GluMlp, SwiGLU
from timm.utils import unwrap_model
from torch import Tensor, nn

from tweo_timm.families import describe_stream
from tweo_timm.rewrite.edit import Edit
from tweo_timm.structure import Stage


@dataclass(frozen=True)
class Pair:
    """Two linear maps with nothing between them that knows a scale.

    Attributes:
        writer: the layer whose rows are multiplied.
        rows: first row and the row after the last.
        bias: name of the bias added to them; "" for none.
        bias_rows: the same for the bias.
        reader: the layer whose columns take the inverse.
    """

    writer: str
    rows: tuple[int, int]
    bias: str
    bias_rows: tuple[int, int]
    reader: str


def scale_stream(model: nn.Module, exponents: Mapping[str, int]) -> None:
    """Multiply the residual stream of a model by 2^-k, in place.

    Args:
        model: a timm model; keys, shapes and dtypes stay.
        exponents: stage of `stages_of` -> k; stages that are not named stay.

    Raises:
        ValueError: for a model that `describe_stream` refuses, or a stream that is the model's output.
    """
    edit = Edit(unwrap_model(model))
    for stage in stages_of(model):
        factor = 2.0 ** -exponents.get(stage.name, 0)
        if factor != 1 and stage.features == "":
            raise ValueError(f"the stream of {stage.name} is the model's output: its scale cannot change unnoticed")
        for port in stage.ports:
            if factor != 1 and not port.norm:
                edit.then(port.name, partial(torch.mul, other=factor if port.role == "writes" else 1 / factor))
    edit.apply()


def stages_of(model: nn.Module) -> list[Stage]:
    """Return the stages whose stream may be multiplied by a number: all that may be rotated, and some more.

    Raises:
        ValueError: for a model that `describe_stream` refuses.
    """
    stream = describe_stream(model)
    return [*stream.scalable, *stream.stages]


def linear_pairs(model: nn.Module) -> dict[str, Pair]:
    """Return the pairs of a model by their readers: values and projection, and the halves of gated MLPs.

    Raises:
        ValueError: for a model that `describe_stream` refuses.
    """
    bare = unwrap_model(model)
    values = [value for stage in stages_of(bare) for value in stage.values if not value.norm]
    pairs = [Pair(v.weight.removesuffix(".weight"), v.rows, v.bias, v.bias_rows, v.projection) for v in values]
    for name, module in bare.named_modules():
        if isinstance(module, (SwiGLU, GluMlp)) and isinstance(module.norm, nn.Identity):
            layer, rows = _linear_half(module)
            bias = f"{name}.{layer}.bias" if module.get_submodule(layer).bias is not None else ""
            pairs.append(Pair(f"{name}.{layer}", rows, bias, rows, f"{name}.fc2"))
    return {pair.reader: pair for pair in pairs}


def _linear_half(mlp: SwiGLU | GluMlp) -> tuple[str, tuple[int, int]]:
    """The layer and the rows that the gate multiplies."""
    if isinstance(mlp, SwiGLU):
        return "fc1_x", (0, len(mlp.fc1_x.weight))
    width = len(mlp.fc1.weight)
    return "fc1", (0, width // 2) if mlp.gate_last else (width // 2, width)


def scale_pairs(model: nn.Module, exponents: Mapping[str, int]) -> None:
    """Multiply rows by 2^-k and the columns that read them by 2^k, in place; the model's outputs stay as they are.

    Args:
        model: a timm model; keys, shapes and dtypes stay.
        exponents: reader of `linear_pairs` -> k.

    Raises:
        ValueError: for a model that `describe_stream` refuses.
    """
    edit, pairs = Edit(unwrap_model(model)), linear_pairs(model)
    for reader, exponent in exponents.items():
        pair, factor = pairs[reader], 2.0**-exponent
        edit.then(f"{pair.writer}.weight", _Rows(pair.rows, factor))
        if pair.bias:
            edit.then(pair.bias, _Rows(pair.bias_rows, factor))
        edit.then(f"{reader}.weight", partial(torch.mul, other=1 / factor))
    edit.apply()


@dataclass(frozen=True)
class _Rows:
    """Multiplies some rows of a tensor."""

    rows: tuple[int, int]
    factor: float

    def __call__(self, value: Tensor) -> Tensor:
        factors = torch.ones(len(value), dtype=value.dtype)
        factors[slice(*self.rows)] = self.factor
        return value * factors.reshape(-1, *[1] * (value.ndim - 1))
