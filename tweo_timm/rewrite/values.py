"""Rotating values: a basis of its own for each head between an attention's values and its projection.

Attention mixes the values of tokens and never their channels, so the channels of a head may be rotated where values are
made and back where they are read. Keys and queries, with RoPE or norms on them, do not matter. Where a norm stands
before the projection (EVA02-B) its gains are folded and each head's rotation fixes ones, so that all of them together
do. Left as they are: gated and differential attention. On DINOv2 this gained nothing in INT8, so `rotate` does not do
it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tweo_timm.families import describe_stream
from tweo_timm.rewrite.edit import Edit
from tweo_timm.rewrite.fold import fold_norm, shift_stays
from tweo_timm.rewrite.orthogonal import random_orthogonal
from tweo_timm.structure import Port, Share, Values


def rotate_values(model: nn.Module, seed: int = 0) -> list[str]:
    """Rotate the values of every described attention by a random matrix per head, in place and exactly.

    Returns:
        Names of the projections behind the attentions that were rotated.

    Raises:
        ValueError: for a model that `describe_stream` refuses; it is unchanged then.
    """
    generator = torch.Generator().manual_seed(seed)
    edit, rotated = Edit(model), []
    for stage in describe_stream(model).stages:
        for values in stage.values:
            if _rotate(edit, values, generator):
                rotated.append(values.projection)
    edit.apply()
    return rotated


def _rotate(edit: Edit, values: Values, generator: torch.Generator) -> bool:
    """Note the rotations of one attention; False where a norm's shift could not be folded."""
    weight = f"{values.projection}.weight"
    if values.norm:
        bias = f"{values.projection}.bias"
        shares = (Share(bias, (0, edit.shape(weight)[0])),) if edit.has(bias) else ()
        reader = Port(values.projection, "weight", 1, "reads", norm=values.norm, shares=shares)
        if shift_stays(edit, values.norm, [reader]):
            return False
        fold_norm(edit, values.norm, [reader])
    width = (values.rows[1] - values.rows[0]) // values.heads
    matrices = torch.stack([random_orthogonal(width, generator) for _ in range(values.heads)])
    edit.then(values.weight, partial(_turn_rows, matrices=matrices, rows=values.rows))
    if values.bias:
        edit.then(values.bias, partial(_turn_rows, matrices=matrices, rows=values.bias_rows))
    edit.then(weight, partial(_turn_columns, matrices=matrices))
    return True


def _turn_rows(value: Tensor, matrices: Tensor, rows: tuple[int, int]) -> Tensor:
    """R' W_h for the rows of each head h."""
    turned, (start, stop) = value.clone(), rows
    heads = value[start:stop].reshape(len(matrices), matrices.shape[1], -1)
    turned[start:stop] = (matrices.transpose(1, 2) @ heads).reshape(value[start:stop].shape)
    return turned


def _turn_columns(value: Tensor, matrices: Tensor) -> Tensor:
    """W_h R for the columns of each head h; several heads in a row share one of values where keys are grouped."""
    each = value.shape[1] // (len(matrices) * matrices.shape[1])
    heads = value.reshape(len(value), len(matrices), each, matrices.shape[1])
    return torch.einsum("ohgi,hij->ohgj", heads, matrices).reshape(value.shape)
