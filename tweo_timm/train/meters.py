"""Running sums of one epoch, kept on the device so that a step never waits, and the pace of the run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LOSSES = ("loss", "task_loss", "tweo_loss")


class EpochMeters:
    """Sample-weighted means of the losses and the largest activation of every block since the epoch began.

    Args:
        num_blocks: number of blocks whose peaks are followed.
        device: where the losses live.
    """

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        self._sums = torch.zeros(len(LOSSES), dtype=torch.float64, device=device)
        self._samples = 0
        self._peaks = torch.zeros(num_blocks, device=device)

    def update(self, result: Mapping[str, Any], peaks: Tensor | None, samples: int) -> None:
        """Count in one micro-batch.

        Args:
            result: what the task returned: `loss`, and with TWEO `task_loss` and `tweo_loss`, all scalars.
            peaks: max |A| of each block, (L,); None without blocks.
            samples: images in the micro-batch.
        """
        loss = result["loss"].detach()
        zero = torch.zeros_like(loss)
        values = [loss, result.get("task_loss", loss), result.get("tweo_loss", zero)]
        self._sums += torch.stack([value.detach().double() for value in values]) * samples
        self._samples += samples
        if peaks is not None:
            self._peaks = torch.maximum(self._peaks, peaks)

    def means(self, distributed: bool = False) -> dict[str, float]:
        """Return loss, task_loss and tweo_loss: means over the samples, of all processes if `distributed`."""
        sums = torch.cat([self._sums, self._sums.new_tensor([self._samples])])
        if distributed:
            torch.distributed.all_reduce(sums)
        *totals, samples = sums.tolist()
        return {name: total / max(samples, 1) for name, total in zip(LOSSES, totals, strict=True)}

    def peaks(self, distributed: bool = False) -> list[float]:
        """Return the largest |A| of each block, over all processes if `distributed`."""
        peaks = self._peaks.clone()
        if distributed and peaks.numel():
            torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
        return [float(peak) for peak in peaks]

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as plain tensors and numbers."""
        return {"sums": self._sums.cpu(), "samples": self._samples, "peaks": self._peaks.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self._sums = state["sums"].to(self._sums.device)
        self._samples = int(state["samples"])
        self._peaks = state["peaks"].to(self._peaks.device)


class Pace:
    """Times the loader and the step since the last log line."""

    def __init__(self) -> None:
        self._mark = time.perf_counter()
        self._data_s = self._step_s = 0.0
        self._samples = self._batches = 0

    def loaded(self) -> None:
        """Note that a batch has arrived from the loader."""
        now = time.perf_counter()
        self._data_s += now - self._mark
        self._mark = now

    def trained(self, samples: int) -> None:
        """Note that a batch of so many images has been trained on."""
        now = time.perf_counter()
        self._step_s += now - self._mark
        self._mark = now
        self._samples += samples
        self._batches += 1

    def text(self, processes: int) -> str:
        """Return seconds a batch, images a second and seconds of waiting for data, and start again."""
        total = max(self._data_s + self._step_s, 1e-9)
        batches = max(self._batches, 1)
        words = f"Time: {total / batches:.3f}s, {processes * self._samples / total:.1f}/s"
        words += f"  Data: {self._data_s / batches:.3f}s"
        self._data_s = self._step_s = 0.0
        self._samples = self._batches = 0
        return words
