"""Statistics of every transformer block's output while a model runs: how large the outliers are, and where."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tweo_timm.blocks import channel_axis, find_blocks
from tweo_timm.stats import ActivationStats, gather, nan_largest
from tweo_timm.tap import BlockTap


class OutlierRecorder:
    """Counts block outputs while it is recording.

    A recorder that is to see a compiled model must be made before the model's first compiled call, because
    torch.compile ignores hooks that come later. An EMA copy is another model: it needs a recorder of its own.

    Args:
        model: a timm model, possibly wrapped by DistributedDataParallel or torch.compile.
        blocks: regular expression naming the blocks by hand; None finds them by structure.

    Raises:
        ValueError: if the model has no transformer blocks, or `blocks` matches nothing.
    """

    def __init__(self, model: nn.Module, blocks: str | None = None) -> None:
        found = find_blocks(model, blocks)
        self.armed = False
        self.stats: dict[str, ActivationStats | None] = dict.fromkeys(found)
        self._tap = BlockTap(found, self._observe)

    def _observe(self, name: str, block: nn.Module, output: Tensor) -> None:
        if self.armed:
            self._count(name, block, output)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _count(self, name: str, block: nn.Module, output: Tensor) -> None:
        stats = self.stats[name]
        if stats is None:
            stats = self.stats[name] = ActivationStats(channel_axis(block, output))
        with torch.no_grad():
            stats.update(output)

    @contextlib.contextmanager
    def recording(self) -> Iterator[OutlierRecorder]:
        """Arm the recorder inside the context. Leave it before a backward pass: checkpointing runs forwards again."""
        self.armed = True
        try:
            yield self
        finally:
            self.armed = False

    def reset(self) -> None:
        """Forget what has been counted."""
        self.stats = dict.fromkeys(self.stats)

    def gather(self) -> None:
        """Merge what all processes of the default group have counted, so that every one holds the whole."""
        self.stats = gather(self.stats)

    def summary(self) -> dict[str, Any]:
        """Return the largest peak and the statistics of every block.

        Returns:
            peak_abs (max |A| over all blocks), peak_block (its name) and blocks: one dict a block, in forward order,
            with name and the fields of `ActivationStats.summary`.

        Raises:
            RuntimeError: if blocks were never seen; the message names the first of them.
        """
        unseen = [name for name, stats in self.stats.items() if stats is None]
        if unseen:
            raise RuntimeError(
                f"{len(unseen)} of {len(self.stats)} blocks produced no output while recording, the first is "
                f"{unseen[0]!r}: run the model inside the context, and make the recorder before torch.compile"
            )
        blocks = [{"name": name, **stats.summary()} for name, stats in self.stats.items() if stats is not None]
        worst = max(blocks, key=lambda block: nan_largest(block["peak_abs"]))
        return {"peak_abs": worst["peak_abs"], "peak_block": worst["name"], "blocks": blocks}

    def remove(self) -> None:
        """Take the hooks off the model; what has been counted stays."""
        self._tap.remove()


@contextlib.contextmanager
def record_outliers(model: nn.Module, blocks: str | None = None) -> Iterator[OutlierRecorder]:
    """Record every block's output of every forward pass inside the context.

    Example::

        with record_outliers(model) as record:
            for images in loader:
                model(images)
        print(record.summary()["peak_abs"])

    Args:
        model: a timm model in any mode; nothing about it is changed.
        blocks: regular expression naming the blocks by hand; None finds them by structure.

    Raises:
        ValueError: if the model has no transformer blocks, or `blocks` matches nothing.
    """
    recorder = OutlierRecorder(model, blocks)
    try:
        with recorder.recording():
            yield recorder
    finally:
        recorder.remove()
