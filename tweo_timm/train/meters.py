"""Running sums of one epoch, added up now and then so that a step does not wait for the device, and the run's pace."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tweo_timm.outliers import OutlierRecorder
from tweo_timm.stats import NUM_BINS, ActivationStats

LOSSES = ("loss", "task_loss", "tweo_loss")


class EpochMeters:
    """Sample-weighted means of the losses, the largest activation of every block, and their statistics.

    The losses of a micro-batch stay on the device, as one row, until somebody asks for their means, at a log line say.
    Python then adds row after row in float64: neither log lines nor an interruption change a bit of the sums.

    Args:
        block_names: the blocks whose peaks are followed.
        device: where the losses live.
        recorder: counts block outputs in the steps in which it is armed; None where nothing is counted.

    Attributes:
        grad_ratio: the norm of the weighted penalty's gradient over that of the task's in the middle batch, a scalar;
            None before it, and where it is not measured.
        weight: of the penalty in the latest micro-batch, a number or a scalar on the device; None without TWEO.
    """

    def __init__(self, block_names: list[str], device: torch.device, recorder: OutlierRecorder | None = None) -> None:
        self.block_names = block_names
        self.recorder = recorder
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Begin an epoch."""
        self._pending: list[tuple[int, Tensor]] = []  # samples, and the losses that there are, in the order of LOSSES
        self._sums = [0.0] * len(LOSSES)
        self._counts = [0] * len(LOSSES)
        self._peaks = torch.zeros(len(self.block_names), device=self._device)
        self.grad_ratio: Tensor | None = None
        self.weight: float | Tensor | None = None
        if self.recorder is not None:
            self.recorder.reset()

    def update(self, result: Mapping[str, Any], peaks: Tensor | None, samples: int) -> None:
        """Count in one micro-batch.

        Args:
            result: what the task returned: `loss`, and with TWEO `task_loss` and, where measured, `tweo_loss`; scalars.
            peaks: max |A| of each block, float32 (L,); None without blocks.
            samples: images in the micro-batch.
        """
        loss = result["loss"]
        losses = [loss, result.get("task_loss", loss), *([result["tweo_loss"]] if "tweo_loss" in result else [])]
        self.weight = result.get("tweo_weight")
        self._pending.append((samples, torch.stack([each.detach() for each in losses]).float()))
        if peaks is not None:
            self._peaks = torch.maximum(self._peaks, peaks)

    def _add_up(self) -> None:
        """Count in what is pending, one micro-batch after the other."""
        pending, self._pending = self._pending, []
        values = iter(torch.cat([row for _, row in pending]).tolist() if pending else [])
        for samples, row in pending:
            for index in range(len(row)):
                self._sums[index] += next(values) * samples
                self._counts[index] += samples

    def samples(self, distributed: bool = False) -> int:
        """Return over how many samples `means` goes."""
        return int(self._totals(distributed)[1][0])

    def _totals(self, distributed: bool) -> tuple[list[float], list[int]]:
        """Sums of the losses and counts of their samples, of all processes if `distributed`."""
        self._add_up()
        if not distributed:
            return self._sums, self._counts
        everyone = torch.tensor([self._sums, self._counts], dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(everyone)
        sums, counts = everyone.tolist()
        return sums, counts

    def means(self, distributed: bool = False) -> dict[str, float]:
        """Return loss, task_loss and tweo_loss: means over the samples, of all processes if `distributed`."""
        sums, counts = self._totals(distributed)
        return {name: total / max(count, 1) for name, total, count in zip(LOSSES, sums, counts, strict=True)}

    def balance(self) -> dict[str, float]:
        """Return tweo_weight and tweo_grad_ratio: 0 where the penalty does not act, NaN where it was not measured."""
        if not self.weight:
            return {"tweo_weight": 0.0, "tweo_grad_ratio": 0.0}
        ratio = math.nan if self.grad_ratio is None else float(self.grad_ratio.detach())
        return {"tweo_weight": float(self.weight), "tweo_grad_ratio": ratio}

    def peaks(self, distributed: bool = False) -> list[float]:
        """Return the largest |A| of each block in all steps, over all processes if `distributed`."""
        peaks = self._peaks.clone()
        if distributed and peaks.numel():
            torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
        return [float(peak) for peak in peaks]

    def rows(self, epoch: int, distributed: bool = False) -> list[dict[str, Any]]:
        """Return one row a block: train_peak_abs over all steps, and train_* statistics of the steps that were counted.

        Called once an epoch: afterwards every process holds the statistics of all.
        """
        rows: list[dict[str, Any]] = [{"epoch": epoch, "block": name} for name in self.block_names]
        if self.recorder is not None:
            self.recorder.gather()
            for row in rows:
                stats = self.recorder.stats[row["block"]]
                row |= {} if stats is None else block_columns("train", stats.summary())
        for row, peak in zip(rows, self.peaks(distributed), strict=True):
            row["train_peak_abs"] = peak
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as plain tensors and numbers."""
        self._add_up()
        recorded = self.recorder.stats if self.recorder is not None else {}
        return {
            "sums": torch.tensor(self._sums, dtype=torch.float64),
            "counts": list(self._counts),
            "peaks": self._peaks.cpu().clone(),
            "balance": self.balance(),
            "outliers": {name: _pack(stats.state()) for name, stats in recorded.items() if stats is not None},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: the state is of other blocks, or no sums.
        """
        self.reset()
        self._sums, self._counts = state["sums"].double().tolist(), [int(count) for count in state["counts"]]
        if not len(self._sums) == len(self._counts) == len(LOSSES) or state["peaks"].shape != self._peaks.shape:
            raise ValueError(f"sums of {len(self._sums)} losses and peaks of {len(state['peaks'])} blocks")
        self._peaks = state["peaks"].to(self._device, copy=True)
        balance = state.get("balance", {})
        self.weight, ratio = balance.get("tweo_weight"), balance.get("tweo_grad_ratio")
        self.grad_ratio = None if ratio is None else torch.tensor(float(ratio), device=self._device)
        if self.recorder is not None:
            for name, counted in state["outliers"].items():
                if name not in self.recorder.stats:
                    raise ValueError(f"statistics of {name}, which is none of the blocks")
                self.recorder.stats[name] = ActivationStats.from_state(_unpack(counted))


def block_columns(prefix: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Name a block's statistics as columns of outliers.jsonl."""
    return {f"{prefix}_{key}": value for key, value in summary.items() if key not in ("name", "count")}


def _pack(state: dict[str, Any]) -> dict[str, Any]:
    """Keep the filled bins of a histogram only: a checkpoint holds one for every block and process."""
    sums = dict(state["sums"])
    histogram = sums.pop("histogram")
    bins = histogram.nonzero().flatten()
    return {**state, "sums": sums, "bins": bins, "counts": histogram[bins], "num_bins": len(histogram)}


def _unpack(packed: dict[str, Any]) -> dict[str, Any]:
    if packed["num_bins"] != NUM_BINS:
        raise ValueError(f"a histogram of {packed['num_bins']} bins; there are {NUM_BINS}")
    histogram = packed["counts"].new_zeros(NUM_BINS)
    histogram[packed["bins"]] = packed["counts"]
    return {"channel_axis": packed["channel_axis"], "sums": {**packed["sums"], "histogram": histogram}}


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
