"""The residual stream in what a block returns, which is not always one tensor.

A tensor is the stream itself; of a tuple or list the stream is the first element (MViTv2 adds the size of its grid), as
it is `last_hidden_state` of what the models of transformers return. Two classes of timm return several streams, and
say nothing of it: they are declared here. TNT returns pixels within patches, then the patches, which the head reads.
The parallel blocks of CoaT pass the first of four streams on as it is, and write the other three, of one width: they
count as one, token after token.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_WRITTEN = {"timm.models.tnt.Block": (1,), "timm.models.coat.ParallelBlock": (1, 2, 3)}


def stream_of(output: Any, block: nn.Module | None = None) -> Tensor:
    """Return the residual stream in a block's output.

    Args:
        output: what the block returned: a tensor, a tuple or list, or an object with ``last_hidden_state``.
        block: the block; it matters for the classes that return several streams.

    Raises:
        TypeError: there is no tensor where the stream should be.
    """
    if isinstance(output, Tensor):
        return output
    streams = streams_in(output, block)
    return streams[0] if len(streams) == 1 else torch.cat(streams, 1)


def streams_in(output: Any, block: nn.Module | None = None) -> list[Tensor]:
    """Return the tensors of which `stream_of` makes one.

    Raises:
        TypeError: there is no tensor where the stream should be.
    """
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, (tuple, list)):
        streams = [output[index] for index in _places(block) if index < len(output)]
    else:
        streams = [getattr(output, "last_hidden_state", None)]
    if not streams or not all(isinstance(stream, Tensor) for stream in streams):
        raise TypeError(
            f"returned {type(output).__name__}, and no tensor in it where its stream is looked for: the first of a "
            "tuple or list, or last_hidden_state"
        )
    return streams


def with_stream(output: Any, stream: Tensor, block: nn.Module | None = None) -> Any:
    """Return a block's output with another stream in it; the given one is not changed.

    Args:
        output: as for `stream_of`.
        stream: of the shape that `stream_of` returned.
        block: as for `stream_of`.
    """
    if isinstance(output, Tensor):
        return stream
    if isinstance(output, (tuple, list)):
        places = [index for index in _places(block) if index < len(output)]
        parts = torch.split(stream, [output[index].shape[1] for index in places], 1) if len(places) > 1 else [stream]
        replaced = dict(zip(places, parts, strict=True))
        items = [replaced.get(index, item) for index, item in enumerate(output)]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    changed = copy.copy(output)
    changed.last_hidden_state = stream
    return changed


def answers_of(output: Any, num_images: int) -> Tensor:
    """Return all that a model answers with as one tensor (images, values), for comparisons.

    Args:
        output: a tensor, or tensors in tuples, lists and dicts (the outputs of transformers' models are dicts); those
            whose first axis is not of images, such as a loss, are left out.
        num_images: that the model was given.

    Raises:
        ValueError: no tensor in it has an axis of images.
    """
    found = [answer.flatten(1) for answer in _tensors_in(output) if answer.ndim > 1 and len(answer) == num_images]
    if not found:
        raise ValueError(f"the model returns a {type(output).__name__} that holds nothing about single images")
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def _tensors_in(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for item in items for tensor in _tensors_in(item)]


def _places(block: nn.Module | None) -> tuple[int, ...]:
    names = (f"{base.__module__}.{base.__qualname__}" for base in type(block).__mro__)  # FSDP2 makes a subclass
    return next((_WRITTEN[name] for name in names if name in _WRITTEN), (0,))
