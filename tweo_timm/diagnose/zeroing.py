"""What large activations are worth: the K largest elements of every block's output become zero.

A model that leans on its outliers loses far more than one that loses as many elements at random, which is the control.
arXiv:2511.23225 cites language models whose loss grows by 600 to 1000 % without 0.1 % of their elements; what a vision
model loses is measured here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tweo_timm.blocks import find_blocks
from tweo_timm.stream import stream_of, with_stream


@contextlib.contextmanager
def zeroed(
    model: nn.Module, k: float, *, at_random: bool = False, blocks: str | None = None, seed: int = 0
) -> Iterator[None]:
    """Inside the context every block's output loses K elements of each image.

    Args:
        model: a timm model; nothing about it is changed.
        k: how many elements; below 1 a share of a block's elements, rounded up. 0 zeroes none.
        at_random: any K elements instead of the K largest in magnitude.
        blocks: regular expression naming the blocks by hand; None finds them by structure.
        seed: of the random ones.

    Raises:
        ValueError: for a negative K, or a model without blocks.
    """
    if not 0 <= k < math.inf:
        raise ValueError(f"K is {k!r}; it must be a number of elements, or a share of them below 1")
    found = find_blocks(model, blocks)
    generator = torch.Generator().manual_seed(seed)
    seen = _Images()
    with contextlib.ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(seen.count).remove)
        for block in found.values():
            stack.callback(block.register_forward_hook(_hook(seen, k, generator if at_random else None)).remove)
        yield


class _Images:
    """How many images the pass at hand has; some blocks see an image in several rows."""

    number = 0

    def count(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self.number = len(args[0])


def _hook(images: _Images, k: float, generator: torch.Generator | None) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(block: nn.Module, args: Any, output: Any) -> Any:
        return with_stream(output, without(stream_of(output, block), images.number, k, generator), block)

    return hook


def without(x: Tensor, images: int, k: float, generator: torch.Generator | None = None) -> Tensor:
    """Return a block's output with K elements of each image zeroed.

    Args:
        x: the output, of any shape whose elements are those of one image after the other.
        images: how many there are in it.
        k: as for `zeroed`.
        generator: of random elements; None takes the largest.
    """
    flat = x.reshape(images, -1)
    count = min(int(k) if k >= 1 or k == 0 else math.ceil(k * flat.shape[1]), flat.shape[1])
    if not count:
        return x
    ranked = flat.abs() if generator is None else torch.rand(flat.shape, generator=generator).to(x.device)
    return flat.scatter(1, ranked.topk(count, 1).indices, 0).reshape(x.shape)
