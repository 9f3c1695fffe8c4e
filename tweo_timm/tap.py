"""BlockTap: the one place that hooks the transformer blocks of a model.

Hooks outlive the intention they were registered with: a deep copy for EMA carries them along, activation checkpointing
runs them a second time, torch.compile ignores those that come after its first call. So a hook here is a closure (which
deepcopy shares rather than copies, so that no live tensor is copied with it), it speaks only for the very module it was
registered on, and whoever listens counts what arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tweo_timm.stream import stream_of

Observer = Callable[[str, nn.Module, Tensor], None]


class BlockTap:
    """Calls `observe(name, block, stream)` after every forward of every block, until removed.

    Args:
        blocks: names -> modules, as `find_blocks` returns them.
        observe: called with the block's name, the block, and its stream. It must keep no tensor beyond the step.

    Raises:
        ValueError: if there are no blocks.
        TypeError: during the forward pass, if a block returns something without a stream; see `stream_of`.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], observe: Observer) -> None:
        if not blocks:
            raise ValueError("there is no block to observe: pass what find_blocks(model) returns")
        self._handles: list[RemovableHandle] = [
            block.register_forward_hook(_hook(name, block, observe)) for name, block in blocks.items()
        ]

    def remove(self) -> None:
        """Take every hook off; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> BlockTap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _hook(name: str, block: nn.Module, observe: Observer) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if module is not block:  # a deep copy of the model, an EMA say, shares this hook
            return
        try:
            stream = stream_of(output, block)
        except TypeError as error:
            raise TypeError(
                f"block {name!r} ({type(block).__name__}) {error}: "
                "name the modules whose output is the residual stream with blocks=REGEX"
            ) from None
        observe(name, block, stream)

    return hook
