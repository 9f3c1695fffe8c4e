"""What a side network reads of its backbone: the token streams z_0 ... z_m, and nothing else of the forward pass.

z_0 is what enters the first transformer block, z_i what leaves the last block of group i. The backbone runs in eval
mode under no_grad, in its own precision whatever autocast is open around it: what is read is the same live and from a
cache, in training and in validation. Each z_i is copied into its place as it is read; all other activations die as in
inference.

Refused: backbones whose blocks return streams of different shapes (Swin and other pyramids), because a side network
adds them up; one stage of such a backbone can be named by a regular expression.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from tweo_timm.blocks import channel_axis, find_blocks
from tweo_timm.side.basis import OwnBasis
from tweo_timm.tap import BlockTap


class Reading:
    """Which streams of a backbone are read, and how.

    Args:
        backbone: a model with transformer blocks; it is run once on a blank image.
        gap: blocks in a group.
        blocks: regular expression naming the transformer blocks by hand; None finds them by structure.
        basis: of a rotated backbone, in which its streams are read.

    Attributes:
        first: name of the block whose input is z_0.
        names: names of the blocks whose outputs are z_1 ... z_m.
        tokens: tokens N in a stream.
        dim: width C of a stream.

    Raises:
        ValueError: the streams differ in shape, or `gap` does not divide the number of blocks.
    """

    def __init__(self, backbone: nn.Module, gap: int, blocks: str | None = None, basis: OwnBasis | None = None) -> None:
        self.basis = basis
        found = list(find_blocks(backbone, blocks))
        self.first, self.names = found[0], found
        size = get_model_input_config(backbone)["input_size"]
        shapes: dict[str, tuple[int, ...]] = {}
        blank = torch.zeros(1, *size, device=next(backbone.parameters()).device)
        self._run(backbone, blank, lambda name, stream: shapes.update({name: tuple(stream.shape[1:])}))
        _refuse_pyramids(shapes, backbone)
        if gap < 1 or len(found) % gap:
            divisors = ", ".join(str(g) for g in range(1, len(found) + 1) if not len(found) % g)
            raise ValueError(f"gap is {gap}; it must divide the {len(found)} blocks of the backbone: {divisors}")
        self.names = found[gap - 1 :: gap]
        self.tokens, self.dim = next(iter(shapes.values()))

    @property
    def count(self) -> int:
        """How many streams are read: m + 1."""
        return len(self.names) + 1

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def streams(self, backbone: nn.Module, images: Tensor, dtype: torch.dtype, summed: bool) -> Tensor:
        """Run the backbone and return what is read of it.

        Args:
            backbone: the model that this reading was made for, or a copy of it.
            images: (B, channels, H, W).
            dtype: of what is returned.
            summed: whether the streams are added up.

        Returns:
            (B, m + 1, N, C), or the sum (B, 1, N, C), outside any graph.
        """
        count = 1 if summed else self.count
        place = {name: index for index, name in enumerate(("", *self.names))}
        found: list[Tensor] = []

        def take(name: str, stream: Tensor) -> None:
            if not name:  # the first: tokens are as many as these images have
                batch, *shape = stream.shape
                found.append(torch.empty(batch, count, *shape, dtype=dtype, device=stream.device))
            if name and summed:
                found[0][:, 0] += stream
            else:  # a copy: a block that adds in place does not change what was read
                found[0][:, place[name]] = stream

        self._run(backbone, images, take)
        return found[0] if self.basis is None else self.basis.back(found[0], self.first)

    def _run(self, backbone: nn.Module, images: Tensor, take: Callable[[str, Tensor], None]) -> None:
        """Run the backbone, and hand out each stream when it is there, in the order of execution; z_0 has no name."""
        modules = {name: backbone.get_submodule(name) for name in self.names}
        first = backbone.get_submodule(self.first)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            take("", _tokens(first, given))

        def leave(name: str, block: nn.Module, stream: Tensor) -> None:
            take(name, _tokens(block, stream))

        handle = first.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            with BlockTap(modules, leave), _frozen(images.device):
                forward: Any = getattr(backbone, "forward_features", backbone)
                forward(images.to(next(backbone.parameters()).dtype))
        finally:
            handle.remove()


@contextmanager
def _frozen(device: torch.device) -> Iterator[None]:
    """No graph, and no autocast; tensors of inference mode could not be used in a graph afterwards."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _tokens(block: nn.Module, stream: Tensor) -> Tensor:
    """A stream as (B, N, C)."""
    if stream.ndim == 4:
        stream = stream.movedim(channel_axis(block, stream), -1).flatten(1, 2)
    return stream


def _refuse_pyramids(shapes: Mapping[str, tuple[int, ...]], backbone: nn.Module) -> None:
    odd = {name: shape for name, shape in shapes.items() if len(shape) != 2}
    if odd:
        name, shape = next(iter(odd.items()))
        raise ValueError(f"{type(backbone).__name__}: {name or 'the first block'} has a stream of shape {shape}")
    different = list(dict.fromkeys(shapes.values()))
    if len(different) > 1:
        sizes = ", ".join(f"{tokens} tokens of {dim}" for tokens, dim in different)
        raise ValueError(
            f"{type(backbone).__name__} has streams of different shapes ({sizes}), which a side network cannot add up: "
            "take a backbone of one shape, such as a ViT, or name blocks of one shape by a regular expression, one "
            r"stage of a Swin by blocks='layers\.2\.blocks\.\d+' (--tweo-blocks)"
        )
