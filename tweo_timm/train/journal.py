"""The run folder: what a run writes about itself while it goes.

    args.yaml       the resolved options, readable by timm and by --config
    summary.csv     one row an epoch: timm's columns, then train_task_loss, train_tweo_loss, train_peak_abs,
    eval_peak_abs outliers.jsonl  one row an epoch and block
    events.*        TensorBoard, with --tensorboard

Only the primary process has one. Rows of epochs that a resumed run will repeat are taken out first.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from timm.utils import trim_summary

from tweo_timm.stats import ActivationStats

_logger = logging.getLogger(__name__)

OWN_COLUMNS = ("train_task_loss", "train_tweo_loss", "train_peak_abs", "eval_peak_abs")


class Journal:
    """Writes the run folder's records.

    Args:
        folder: the run folder; it exists.
        start_epoch: the first epoch that this process will write.
        tensorboard: whether to write TensorBoard events.
        wandb: an initialised wandb run, or None.
    """

    def __init__(self, folder: Path, start_epoch: int, tensorboard: bool = False, wandb: Any = None) -> None:
        self.folder = folder
        self.summary = folder / "summary.csv"
        self.outliers = folder / "outliers.jsonl"
        self._wandb = wandb
        trim_summary(str(self.summary), start_epoch)
        for path in (self.outliers, folder / "fp8_health.jsonl"):
            _drop_epochs_from(path, start_epoch)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder))

    def epoch(self, epoch: int, train: Mapping[str, float], val: Mapping[str, float], lr: float) -> None:
        """Append one row to summary.csv, and its scalars to TensorBoard and wandb.

        Args:
            epoch: number of the epoch, from 0.
            train: metrics of training without their prefix: loss, task_loss, tweo_loss, peak_abs.
            val: metrics of validation without their prefix; empty when the epoch was not validated.
            lr: learning rate used in the epoch.
        """
        metrics = {f"train_{name}": value for name, value in train.items()}
        metrics |= {f"eval_{name}": value for name, value in val.items()}
        own = {name: metrics.pop(name) for name in OWN_COLUMNS if name in metrics}
        row = {"epoch": epoch, **metrics, "lr": lr, **{name: own.get(name, math.nan) for name in OWN_COLUMNS}}
        columns = self._columns() or list(row)
        for missing in [name for name in row if name not in columns]:
            _logger.debug("summary.csv has no column %s", missing)
        with open(self.summary, "a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=columns, restval="", extrasaction="ignore")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
        self.scalars({name: value for name, value in row.items() if name != "epoch"}, epoch)
        if self._wandb is not None:
            self._wandb.log(row)

    def _columns(self) -> list[str]:
        if not self.summary.exists():
            return []
        with open(self.summary, newline="") as file:
            return next(csv.reader(file), [])

    def blocks(self, rows: Iterable[Mapping[str, Any]], epoch: int) -> None:
        """Append one row a block to outliers.jsonl, and the peaks to TensorBoard."""
        rows = list(rows)
        append_rows(self.outliers, rows)
        for row in rows:
            peaks = {f"{key}/{row['block']}": row[key] for key in ("train_peak_abs", "eval_peak_abs") if key in row}
            self.scalars(peaks, epoch)

    def histograms(self, stats: Mapping[str, ActivationStats | None], epoch: int) -> None:
        """Write the histogram of every block's |A| to TensorBoard, from the bins that were counted anyway."""
        if self._board is None:
            return
        for name, block in stats.items():
            edges, counts = block.histogram() if block is not None else ([], [])
            if not counts:
                continue
            total, square = (sum(c * e**k for e, c in zip(edges, counts, strict=True)) for k in (1, 2))
            self._board.add_histogram_raw(
                f"abs_activation/{name}",
                min=edges[0],
                max=edges[-1],
                num=sum(counts),
                sum=total,
                sum_squares=square,
                bucket_limits=edges,
                bucket_counts=counts,
                global_step=epoch,
            )

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        """Write finite numbers to TensorBoard."""
        if self._board is None:
            return
        for name, value in values.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._board is not None:
            self._board.close()


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append mappings to a JSON-lines file; numbers that are not finite become null, which JSON has."""
    with open(path, "a") as file:
        file.writelines(json.dumps(finite(row)) + "\n" for row in rows)


def finite(value: Any) -> Any:
    """Replace every NaN and infinity in a nested record by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _drop_epochs_from(path: Path, epoch: int) -> None:
    """Take the rows of this and later epochs out of a JSON-lines file, and a last line that a crash cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["epoch"] < epoch:
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    os.replace(temporary, path)
