"""Which modules of a vision model are its transformer blocks.

TWEO penalises the residual stream after every transformer block, so everything in this package (penalty, statistics,
quantization of the stream) starts from one question: which modules return it? timm's ``forward_intermediates`` does
not say: it works per stage in Swin, permutes what it returns and bypasses ``forward``. A list of class names would be
out of date with timm's next release. Structure answers it:

* An *attention core* is a module that owns projections of queries, keys or values (``qkv``, ``q_proj``, ``to_query``,
  ``in_proj_weight`` ...), or that calls itself attention and has heads. Channel gates (squeeze-and-excitation, CBAM)
  have neither.
* A *block* is the smallest module that holds an attention core and a feed-forward part (at least two weight layers
  outside any core). Where attention stands alone, it is the element of a container that adds attention to its input
  (MobileNetV4's ``MobileAttention``, the fusion of CrossViT), or the ``Sequential`` that pairs it with a residual
  feed-forward part. The code of a block contains an addition: the residual.
* Blocks are repeated: a block is an element of a ``Sequential``, ``ModuleList`` or ``ModuleDict``. If it stands inside
  such an element, the element is the block, unless it holds other blocks (a stage is not a block). So the window and
  the grid attention of MaxViT are one ``MaxxVitBlock``, which is what ``depths`` counts; its output is the stream after
  the second of them. Attention pooling looks like a block but is not repeated, and LeViT's attention downsampling
  belongs to its stage: neither is one.

In hybrids only the blocks with attention count, in CAFormer as in FastViT; bottlenecks with self-attention (BoTNet) do.

A block may return a tuple that holds the stream (MViTv2, TNT, the parallel blocks of CoaT): see stream.py.

Refused, with the remedy in the message: models without such blocks (convolution nets, MLP mixers, PoolFormer).
``blocks=REGEX`` names the blocks of a model by hand.

Source: the definition of the penalty in arXiv:2511.23225; the module structure of timm 1.0.31 and torchvision 0.29.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import itertools
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from tweo_timm.layers import begins_channels_first

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Names of the child modules that project to queries, keys and values: qkv, q_proj, kv, wq, to_query, qkvs, c_attn ...
_PROJECTION = re.compile(
    r"(?:(?:to|in|w|fc|lin|linear|proj|attn)_?)?(?:qkv|qk|kv|q|k|v|query|queries|key|value)(?:s|_.*)?|c_attn", re.I
)
_PROJECTION_WEIGHT = re.compile(r"(?:in|q|qkv)_proj_weight|qkv_weight")
_ATTENTION_CLASS = re.compile(r"attn|attention|mh?sa", re.I)
_HEADS = ("num_heads", "heads", "n_heads", "n_head", "nhead", "num_attention_heads")
# Names of a feed-forward part inside a module that is itself the attention core, as in ViT-22B's parallel blocks.
_FEED_FORWARD = re.compile(r"(?:mlp|ffn?|feed_?forward|fc1|linear1)(?:_.*)?", re.I)

# Methods of a module that are no part of its forward pass.
_NOT_FORWARD = ("__init__", "extra_repr", "_load_from_state_dict")


def find_blocks(model: nn.Module, blocks: str | None = None) -> dict[str, nn.Module]:
    """Find the residual transformer blocks of a model: the modules whose output is the residual stream.

    Wrappers (DDP, ``torch.compile``, timm's EMA) are taken off first; names are those of the bare model.

    Args:
        model: any vision model made of modules; the module docstring says what counts as a block.
        blocks: a regular expression that must match a module's whole name. Given, it alone decides.

    Returns:
        Name -> module in the order of ``model.named_modules()``; a module shared by two places appears once.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there are no blocks, or ``blocks`` is not a regular expression, matches no module, a module that is
            never called, or one module inside another.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"find_blocks needs a torch.nn.Module, got {type(model).__name__}")
    model = unwrap_model(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "a scripted model keeps no Python structure to search: find its blocks before torch.jit.script"
        )
    tree = _Tree(model)
    if blocks is not None:
        return _named_blocks(tree, blocks)
    found = tree.find()
    if not found:
        raise ValueError(_no_blocks_message(model, tree))
    return {name: tree.modules[name] for name in found}


def channel_axis(block: nn.Module, output: Tensor) -> int:
    """Say which axis of a block's output holds the channels.

    The width of the stream is the output width of the block's last weight layer (fc2, the last convolution): the axis
    of that size holds the channels. Where sizes coincide, so that both axes or none qualify, structure decides: 2-D and
    3-D outputs are channels-last, others are channels-first if the block's first layer is (a convolution, BatchNorm2d,
    GroupNorm, LayerNorm2d).

    Args:
        block: one of the modules of ``find_blocks``.
        output: what it returned, B,N,C or B,H,W,C or B,C,H,W.

    Returns:
        -1 for channels-last, 1 for channels-first.

    Raises:
        ValueError: ``output`` has fewer than two axes.
    """
    if output.ndim < 2:
        raise ValueError(f"a block output has at least 2 axes (tokens, channels), got shape {tuple(output.shape)}")
    if output.ndim == 2:
        return -1
    backwards = reversed(list(block.modules()))
    width = next((width for module in backwards if (width := _width(module)) is not None), None)
    first, last = output.shape[1] == width, output.shape[-1] == width
    if first != last:
        return 1 if first else -1
    return 1 if output.ndim > 3 and begins_channels_first(block) else -1


def _width(layer: nn.Module) -> int | None:
    """Output width of a linear layer or convolution, or of a layer that stands in for one (FP8); None for the rest."""
    if not isinstance(getattr(layer, "weight", None), Tensor):
        return None
    width = getattr(layer, "out_features", getattr(layer, "out_channels", None))
    return width if isinstance(width, int) else None


class _Tree:
    """The named modules of one model, with the questions that the search asks about them."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.order = {name: i for i, name in enumerate(self.modules)}
        self.element_kinds = Counter(type(m) for name, m in self.modules.items() if name and self.is_element(name))
        # A layer without children has nothing to go around: its additions (counters, biases) are no residual.
        wholes = {type(m) for m in self.modules.values() if any(True for _ in m.children())}
        self.adding = {cls for cls in wholes if _source_adds(cls)}  # type: ignore[arg-type]  # a class is hashable
        projecting = [name for name, m in self.modules.items() if name and _owns_projections(m)]
        heads_only = [
            name
            for name, m in self.modules.items()
            if name and _calls_itself_attention(m) and not any(_inside(p, name) for p in projecting)
        ]
        self.cores = sorted({*projecting, *heads_only}, key=self.order.__getitem__)

    def find(self) -> list[str]:
        """Names of the blocks in module order."""
        candidates = {name for core in self.cores if (name := self._block_of(core)) is not None}
        candidates = {c for c in candidates if not any(_inside(other, c) for other in candidates - {c})}
        found = {block for c in candidates if (block := self._unit_of(c, candidates)) is not None}
        return sorted(found, key=self.order.__getitem__)

    def is_element(self, name: str) -> bool:
        """Whether a module is kept in a Sequential, ModuleList or ModuleDict."""
        return isinstance(self.modules[_parent(name)], _CONTAINERS)

    def _block_of(self, core: str) -> str | None:
        """The smallest residual block around a core."""
        for name in _lineage(core):
            if type(self.modules[name]) in _CONTAINERS or not self._adds(name):
                continue
            block = name if self._has_feed_forward(name) else self._attention_alone(name)
            if block is not None:
                return block
        return None

    def _attention_alone(self, name: str) -> str | None:
        """The block of an element without a feed-forward part: itself, or the Sequential(attention, feed-forward)."""
        if not self.is_element(name) or name in self.cores:
            return None
        outer = _parent(name)
        pair = [f"{outer}.{child}" for child, _ in self.modules[outer].named_children()]
        if type(self.modules[outer]) is nn.Sequential and len(pair) == 2 and pair[0] == name:
            second = pair[1]
            attends = any(_inside(core, second) for core in self.cores)
            if self._has_feed_forward(second) and self._adds(second) and not attends:
                return outer
        return name

    def _unit_of(self, name: str, candidates: set[str]) -> str | None:
        """The repeated element that a candidate is or is part of; None if it belongs to a stage or stands alone."""
        for outer in _lineage(name):
            if type(self.modules[outer]) in _CONTAINERS or not self.is_element(outer) or not self._is_repeated(outer):
                continue
            others = candidates - {name, outer}
            if not any(_inside(other, outer) and self.is_element(other) for other in others):
                return outer
            return name if self.is_element(name) else None
        return name if self._is_repeated(name) else None

    def _is_repeated(self, name: str) -> bool:
        """Whether a module is one of a series; a model wrapped in Sequential(normalize, model) is not."""
        kind = type(self.modules[name])
        siblings = [type(m) for m in self.modules[_parent(name)].children()]
        if not self.is_element(name):
            return siblings.count(kind) > 1
        return len(siblings) == 1 or len(set(siblings)) < len(siblings) or self.element_kinds[kind] > 1

    def _has_feed_forward(self, name: str) -> bool:
        if name in self.cores:
            return any(_FEED_FORWARD.fullmatch(child) for child, _ in self.modules[name].named_children())
        return sum(_width(m) is not None for m in self._outside_cores(name)) >= 2

    def _adds(self, name: str) -> bool:
        return any(type(m) in self.adding for m in self._outside_cores(name))

    def _outside_cores(self, name: str) -> Iterator[nn.Module]:
        """A module and what it holds, without the attention cores inside."""
        inner = [core for core in self.cores if core != name and _inside(core, name)]
        for other, module in self.modules.items():
            if _inside(other, name) and not any(_inside(other, core) for core in inner):
                yield module


def _inside(name: str, outer: str) -> bool:
    """Whether a module is another one or stands in it."""
    return name == outer or name.startswith(f"{outer}.")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _lineage(name: str) -> Iterator[str]:
    """A module's name and those of the modules around it, innermost first, without the root."""
    while name:
        yield name
        name = _parent(name)


def _owns_projections(module: nn.Module) -> bool:
    for name, child in module.named_children():
        # Attention over a map of one channel is a gate (CSATv2), not a mixing of the stream.
        if _PROJECTION.fullmatch(name) and getattr(child, "in_features", None) != 1:
            return True
    return any(_PROJECTION_WEIGHT.fullmatch(name) for name, _ in module.named_parameters(recurse=False))


def _calls_itself_attention(module: nn.Module) -> bool:
    named = _ATTENTION_CLASS.search(type(module).__name__) is not None
    return named and any(isinstance(getattr(module, heads, None), int) for heads in _HEADS)


@functools.lru_cache(maxsize=1024)  # parsing the methods of a class takes most of a search
def _source_adds(cls: type[nn.Module]) -> bool:
    """Whether the methods of a class add two values; a class without readable source gets the benefit of the doubt."""
    own = itertools.takewhile(lambda base: base is not nn.Module, cls.__mro__)
    methods = {n: f for base in own for n, f in vars(base).items() if inspect.isfunction(f) and n not in _NOT_FORWARD}
    try:
        nodes = [node for method in methods.values() for node in ast.walk(_syntax(method))]
    except (OSError, TypeError, SyntaxError):
        return True
    return any(_is_addition(node) for node in nodes)


def _is_addition(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return not isinstance(node.left, ast.Constant) and not isinstance(node.right, ast.Constant)
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
        return not isinstance(node.value, ast.Constant | ast.JoinedStr)
    return isinstance(node, ast.Attribute) and node.attr in ("add", "add_", "addcmul")


def _syntax(function: Callable[..., object]) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def _named_blocks(tree: _Tree, pattern: str) -> dict[str, nn.Module]:
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"blocks={pattern!r} is not a regular expression: {error}") from error
    found = {name: m for name, m in tree.modules.items() if name and compiled.fullmatch(name)}
    if not found:
        near = [name for name in tree.modules if name and compiled.search(name)]
        near = near or difflib.get_close_matches(pattern.replace("\\", ""), tree.modules, n=5, cutoff=0.3)
        raise ValueError(
            f"blocks={pattern!r} matches the whole name of no module; near names: {', '.join(near[:5]) or 'none'}. "
            f"Series of modules in this model: {_hints(tree)}"
        )
    uncalled = [name for name, m in found.items() if isinstance(m, nn.ModuleList | nn.ModuleDict)]
    if uncalled:
        raise ValueError(
            f"blocks={pattern!r} matches {uncalled[0]}, a {type(found[uncalled[0]]).__name__}: it is never called "
            f"and has no output; name its elements, such as {re.escape(uncalled[0])}\\.\\d+"
        )
    nested = [(outer, name) for name in found for outer in _lineage(_parent(name)) if outer in found]
    if nested:
        raise ValueError(
            f"blocks={pattern!r} matches both {nested[0][0]} and {nested[0][1]} inside it, which would count the same "
            f"stream twice; a narrower expression is needed, such as {_pattern(nested[0][1])}"
        )
    return found


def _hints(tree: _Tree) -> str:
    """The longest series of modules, as expressions that name them."""
    wholes = [
        name for name, m in tree.modules.items() if name and tree.is_element(name) and any(True for _ in m.children())
    ]
    sizes = Counter(_pattern(name) for name in wholes)
    hints = [f"{pattern} ({size} modules)" for pattern, size in sizes.most_common(4) if size > 1]
    return ", ".join(hints) or "none"


def _pattern(name: str) -> str:
    return re.sub(r"\d+", r"\\d+", re.escape(name))


def _no_blocks_message(model: nn.Module, tree: _Tree) -> str:
    cores = f"{len(tree.cores)} found, such as {tree.cores[0]}" if tree.cores else "none found"
    return (
        f"{type(model).__name__} has no residual transformer blocks: looked for repeated modules that hold attention "
        f"(a module with query, key or value projections; {cores}), a feed-forward part and a residual addition. "
        "Name the modules whose output is the residual stream with blocks=REGEX (--tweo-blocks REGEX). "
        f"Series of modules in this model: {_hints(tree)}"
    )
