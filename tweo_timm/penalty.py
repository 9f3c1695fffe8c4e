"""Tweo: the penalty for any training loop, on a bare model, in three lines.

    tweo = Tweo(model, TweoConfig(weight=0.01))
    loss = task_loss(model(images)) + tweo.penalty()
    loss.backward()

Outliers form above all in self-supervised and contrastive training (DINO, MAE, CLIP), which runs in loops of its own,
often with several forward passes per step and a teacher beside the student. The measurement is attach_tweo's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tweo_timm.config import TweoConfig
from tweo_timm.measurement import Measurement, Pass, Scheduled

MOST_FORWARDS = 8
"""Forward passes that may wait for `penalty`: more are a loop that forgot to add it."""


class Tweo(Scheduled):
    """The TWEO penalty of a model's forward passes.

    A pass counts where gradients are enabled and the model trains: neither an evaluation nor a teacher's pass under
    no_grad does, nor a deep copy of the model, nor what activation checkpointing computes again.

    Args:
        model: on its device, before torch.compile and before DDP.
        config: the penalty and its schedule. Unless the schedule is constant, call `set_progress` before every step.
        blocks: regular expression naming the blocks by hand; None finds them by structure.

    Attributes:
        block_names: names of the blocks, in forward order.
        mask: which tokens count in the coming passes: bool, the shape of a block's output without its channels, (B, N)
            for a ViT, class token included; None: all. It leaves out padding, or what a masked autoencoder hides.

    Raises:
        ValueError: if the model has no transformer blocks, or the weight is to follow the task's gradient.
        RuntimeError: if the model checkpoints activations with reentrant checkpoints.
    """

    def __init__(self, model: nn.Module, config: TweoConfig | None = None, blocks: str | None = None) -> None:
        super().__init__(config if config is not None else TweoConfig())
        if self.config.balance:
            raise ValueError(
                f"TweoConfig.balance is {self.config.balance:g}, and this penalty does not know the task's loss; leave "
                "it out, or attach_tweo to a timm task"
            )
        self._measurement = Measurement(model, self.config, blocks)
        self.block_names = self._measurement.names
        self.mask: Tensor | None = None
        self._sum: Tensor | None = None
        self._peaks: Tensor | None = None
        self._passes = 0
        self._reported = False
        self._handles = self._hook(model)

    @property
    def block_peaks(self) -> Tensor | None:
        """Max |A| of each block, float32 (L,), over the passes of the latest step; None before the first."""
        return self._peaks

    @property
    def peak_abs(self) -> Tensor | None:
        """Max |A| over all blocks, float32 scalar, over the passes of the latest step; None before the first."""
        return None if self._peaks is None else self._peaks.amax()

    def penalty(self) -> Tensor:
        """Return weight times L_TWEO, the mean over the passes since the last call: a scalar, with gradients.

        Raises:
            RuntimeError: if no pass has counted since the last call.
        """
        if self._sum is None:
            raise RuntimeError(
                "no forward pass has counted since the last penalty(): call the model first, in train mode and with "
                "gradients enabled; attach Tweo before torch.compile"
            )
        mean = self._sum / self._passes
        self.forget()
        return mean * self._weight

    def forget(self) -> None:
        """Leave out the passes since the last `penalty()`: those of a batch that the loop skips."""
        self._sum, self._passes, self._reported = None, 0, True

    def remove(self) -> None:
        """Take every hook off the model; a second call does nothing."""
        self._measurement.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.forget()

    def _hook(self, model: nn.Module) -> list[Any]:
        def before(module: nn.Module, args: Any) -> None:
            if module is model and self._measurement.open(self._weight > 0, self.mask):
                self._require_progress()

        # Not compiled: sums that live between passes would make it one graph per number of passes.
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if module is model and (found := self._measurement.close()) is not None:
                self._count(found)

        return [model.register_forward_pre_hook(before), model.register_forward_hook(after)]

    def _count(self, found: Pass) -> None:
        if self._passes == MOST_FORWARDS:
            raise RuntimeError(
                f"{self._passes} forward passes have waited for penalty(): add it to the loss of every step, or call "
                "remove() where the penalty is not wanted"
            )
        first = self._peaks is None or self._reported
        self._peaks = found.peaks if first else torch.maximum(self._peaks, found.peaks)  # type: ignore[arg-type]
        self._sum = found.tweo if self._sum is None else self._sum + found.tweo
        self._passes, self._reported = self._passes + 1, False
