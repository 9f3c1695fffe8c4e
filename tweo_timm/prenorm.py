"""A pre-norm transformer described by its structure: x + scale1 * attn(norm1(x)), then x + scale2 * mlp(norm2(x)).

Names and classes of timm are declared in families.py; the vision models of transformers, and others that keep the same
plan, are recognised by what they hold instead. A block has two norms over the stream, in the order of its branches; an
attention with projections of its own for queries, keys and values, and one back; an MLP from the stream's width to
another and back; scales of its branches or none. Before the blocks there is one convolution and what is added to it,
behind them one norm and what reads it. Whatever does not fit is refused by name, and a rewriting that rests on a wrong
guess is put back, because outputs are compared.

Read for it: ViT, DINOv2, DINOv3 and SigLIP of transformers 5.24. Refused there: CLIP (a norm before the blocks), Swin
(several streams), pooling layers beside the output, torch.nn.MultiheadAttention.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from tweo_timm.blocks import find_blocks
from tweo_timm.draft import NORM_WRITES, Draft
from tweo_timm.structure import Port, Stream, Unsupported

_QUERIES_KEYS_VALUES = re.compile(r"(q|k|v|query|key|value)(_proj)?")
_POOL = re.compile(r"pool", re.IGNORECASE)


class PreNorm:
    """The `Family` of models with this plan outside of timm."""

    name = "pre-norm models of transformers"

    def matches(self, model: nn.Module) -> bool:
        """Whether every block has projections of its own for queries, keys and values; timm's families are declared."""
        if type(model).__module__.startswith("timm."):
            return False
        try:
            return all(_attention_of(block) for block in find_blocks(model).values())
        except ValueError:
            return False

    def describe(self, model: Any) -> Stream:
        """Describe the model's stream.

        Raises:
            Unsupported: naming the part that does not fit.
        """
        blocks = find_blocks(model)
        widths = {name: _norms(block)[0][1] for name, block in blocks.items()}
        if len(set(widths.values())) > 1:
            raise Unsupported(
                f"the blocks of {type(model).__name__} have streams of several widths "
                f"({', '.join(map(str, sorted(set(widths.values()))))}), and what joins them has not been described"
            )
        series = next(iter(blocks)).rpartition(".")[0]
        draft = Draft(model, series, next(iter(widths.values())))
        before, behind = _around(model, blocks)
        _stem(draft, before)
        for name, block in blocks.items():
            _block(draft, name, block)
            draft.stage.blocks.append(name)
        _tail(draft, behind)
        return Stream([draft.stage])


def _attention_of(block: nn.Module) -> str:
    """The name of the module in a block that holds its projections of queries, keys and values; "" for none."""
    for name, module in block.named_modules():
        children = [n for n, child in module.named_children() if isinstance(child, nn.Linear)]
        if sum(_QUERIES_KEYS_VALUES.fullmatch(child) is not None for child in children) == 3:
            return str(name)
    return ""


def _norms(block: nn.Module) -> list[tuple[str, int]]:
    """The norms of a block outside of its attention, each with its width."""
    attention = _attention_of(block)
    norms = [(name, m) for name, m in block.named_modules() if hasattr(m, "normalized_shape")]
    found: list[tuple[str, Any]] = [(name, m) for name, m in norms if not name.startswith(f"{attention}.")]
    if len(found) != 2:
        raise Unsupported(f"a {type(block).__name__} has {len(found)} norms over its stream: a pre-norm block has two")
    return [(name, int(norm.normalized_shape[-1])) for name, norm in found]


def _block(draft: Draft, prefix: str, block: nn.Module) -> None:
    """Two branches, each behind its norm, and their scales."""
    width, attention = draft.stage.width, _attention_of(block)
    norms = [f"{prefix}.{name}" for name, _ in _norms(block)]
    scales = [f"{prefix}.{n}" for n, p in block.named_parameters() if p.shape == (width,) and _is_scale(block, n)]
    if len(scales) not in (0, 2):
        raise Unsupported(f"{prefix} has {len(scales)} vectors beside its layers, where two scales or none belong")
    scales = scales or ["", ""]
    outer = attention.split(".")[0]
    for name, layer in block.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        path, inside = f"{prefix}.{name}", name.startswith(f"{outer}.")
        if inside and _QUERIES_KEYS_VALUES.fullmatch(name.rpartition(".")[-1]):
            draft.reads(path, norms[0])
        elif inside and layer.out_features == width:
            draft.writes(path, scales[0])
        elif not inside and layer.in_features == width != layer.out_features:
            draft.reads(path, norms[1])
        elif not inside and layer.out_features == width != layer.in_features:
            draft.writes(path, scales[1])
        else:
            raise Unsupported(f"{path}, {layer.in_features} to {layer.out_features}, has no part in a pre-norm block")


def _is_scale(block: nn.Module, parameter: str) -> bool:
    """Whether a vector belongs to no layer and no norm."""
    owner = block.get_submodule(parameter.rpartition(".")[0])
    return not isinstance(owner, nn.Linear) and not hasattr(owner, "normalized_shape")


def _around(model: nn.Module, blocks: Iterable[str]) -> tuple[list[str], list[str]]:
    """The modules with parameters of their own that stand before the blocks, and behind them, by their order."""
    names = list(blocks)
    before: list[str] = []
    behind: list[str] = []
    passed = False
    for name, module in model.named_modules():
        passed = passed or name in names
        inside = any(name == block or name.startswith(f"{block}.") for block in names)
        if not inside and next(module.parameters(recurse=False), None) is not None:
            (behind if passed else before).append(name)
    return before, behind


def _stem(draft: Draft, names: Iterable[str]) -> None:
    """One convolution to the stream's width, and vectors that are added to its tokens or put beside them."""
    width = draft.stage.width
    for name in names:
        module = draft.model.get_submodule(name)
        if hasattr(module, "normalized_shape"):
            raise Unsupported(f"{name} stands before the blocks (as in CLIP): {NORM_WRITES}")
        if isinstance(module, nn.Conv2d) and module.out_channels == width:
            draft.writes(name)
            continue
        for parameter, value in module.named_parameters(recurse=False):
            if isinstance(module, (nn.Linear, nn.Conv2d)) or value.shape[-1:] != (width,):
                raise Unsupported(f"{name}.{parameter}, before the blocks, has not been described")
            draft.stage.writers.append(Port(name, parameter, -1, "writes"))


def _tail(draft: Draft, names: Iterable[str]) -> None:
    """One norm, and the heads that read it; without a head the norm's output is the model's."""
    width, norm, heads = draft.stage.width, "", []
    for name in names:
        module = draft.model.get_submodule(name)
        if hasattr(module, "normalized_shape") and not norm:
            norm = name
        elif isinstance(module, nn.Linear) and module.in_features % width == 0 and not _POOL.search(name):
            heads.append(name)
        else:
            raise Unsupported(
                f"{name} ({type(module).__name__}) reads the last norm beside the model's own output, and has not been "
                "described: build the model without it (add_pooling_layer=False, vision_use_head=False), or with a "
                "classifier alone"
            )
    for name in heads:
        head: Any = draft.model.get_submodule(name)
        draft.reads(name, norm, copies=head.in_features // width)
    if not heads:
        draft.stage.features = norm
        if norm:
            draft.check_norm(norm, 1)
