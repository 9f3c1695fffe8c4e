"""Activation checkpointing of a model in Transformer Engine: te.checkpoint where torch's own function would be called.

All of timm's checkpointing (`checkpoint`, `checkpoint_seq`, of blocks or of stages) ends in
``torch.utils.checkpoint.checkpoint``, looked up at each call. That function recomputes without te.autocast and with
scales that have moved on. So while the patched root's training forward runs, and only then, the name stands for
te.checkpoint, which restores both; models, their flags and `set_grad_checkpointing` are not touched.

What te.checkpoint leaves open is settled here:
    its queue of scales is first in, first out over the whole process, which is right only if every forward has its
    backward, in turn; each segment keeps its own scales, so a forward without a backward, or several before
    one backward, recompute what they computed
    it cannot be nested (DaViT checkpoints its stages and the blocks in them); the inner call runs as it is, because
    the outer one recomputes it anyway
    its recomputation reduces and updates the scales once more, after every segment; here it does not
    it takes a module that holds no Transformer Engine module, as none of ours does, for torch's business; it
    therefore gets a plain function

A function imported by name (``from torch.utils.checkpoint import checkpoint``) is out of reach: its recomputation
raises in the first layer. Facts: Transformer Engine 2.20.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.utils.checkpoint


class Region(Protocol):
    """What a checkpointed segment needs of the region it is part of."""

    def reopened(self) -> AbstractContextManager[None]:
        """Return a context in which layers compute as in the forward and no scale moves."""

    def recompute_queues(self) -> list[deque[Any]]:
        """Return the queues in which Transformer Engine keeps scales for recomputations, one a layer."""


@contextmanager
def replaced_checkpoint(replacement: Callable[..., Any]) -> Iterator[None]:
    """Let ``torch.utils.checkpoint.checkpoint`` be ``replacement`` meanwhile."""
    original = torch.utils.checkpoint.checkpoint
    torch.utils.checkpoint.checkpoint = replacement
    try:
        yield
    finally:
        torch.utils.checkpoint.checkpoint = original


def checkpoint(
    te_checkpoint: Callable[..., Any],
    region: Region,
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Call ``function(*args, **kwargs)`` and recompute it in the backward, through ``te_checkpoint``.

    Args:
        te_checkpoint: Transformer Engine's function.
        region: the region whose forward is running.
        function: a module or function.
        *args: its arguments.
        use_reentrant: not heeded; the results are the same, but reentrant checkpoints take gradients from hooks and
            confuse Transformer Engine about which layer's backward is the last of the step.
        **kwargs: its keyword arguments.
    """
    return te_checkpoint(
        functools.partial(function),
        *args,
        use_reentrant=False,
        context_fn=functools.partial(_contexts, region),
        **kwargs,
    )


def _contexts(region: Region) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    scales: list[tuple[deque[Any], list[Any]]] = []
    return _first_run(region, scales), _recomputation(region, scales)


@contextmanager
def _first_run(region: Region, scales: list[tuple[deque[Any], list[Any]]]) -> Iterator[None]:
    """Keep what Transformer Engine queues for the recomputation of this segment."""
    try:
        with replaced_checkpoint(_call):
            yield
    finally:
        for queue in region.recompute_queues():
            scales.append((queue, list(queue)))
            queue.clear()


@contextmanager
def _recomputation(region: Region, scales: list[tuple[deque[Any], list[Any]]]) -> Iterator[None]:
    """Queue this segment's scales again, and open the region to its layers again."""
    for queue, entries in scales:
        queue.extend(entries)
    try:
        with region.reopened(), replaced_checkpoint(_call):
            yield
    finally:
        for queue, _ in scales:
            queue.clear()


def _call(function: Callable[..., Any], *args: Any, use_reentrant: bool | None = None, **kwargs: Any) -> Any:
    """Stand in for a checkpoint inside a checkpointed segment."""
    return function(*args, **kwargs)
