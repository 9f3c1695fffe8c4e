"""The run folder: what a run writes about itself while it goes.

    args.yaml         the resolved options, readable by timm and by --config
    summary.csv       one row an epoch: timm's columns, then train_task_loss, train_tweo_loss, train_peak_abs,
                      eval_peak_abs, train_tweo_weight (in the last batch), train_tweo_grad_ratio (of the middle one;
                      nan where it cannot be measured)
    outliers.jsonl    one row an epoch and block
    losses.jsonl      one row a log line: means since the epoch began, and over how many samples
    fp8_health.jsonl  one row a report and FP8 layer, with --fp8-health-interval
    events.*          TensorBoard, with --tensorboard; its steps are optimizer updates

Only the primary process has one. Rows of epochs that a resumed run will repeat are taken out first.
"""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tweo_timm.outputs import Outputs
from tweo_timm.records import append_rows, keep_rows_before
from tweo_timm.stats import ActivationStats

_logger = logging.getLogger(__name__)

OWN_COLUMNS = (
    *("train_task_loss", "train_tweo_loss", "train_peak_abs", "eval_peak_abs"),
    *("train_tweo_weight", "train_tweo_grad_ratio"),
)


class Journal:
    """Writes the run folder's records.

    Args:
        folder: the run folder; it exists.
        epoch: the first epoch that this process will write.
        updates: optimizer updates done so far.
        eval_metrics: names of what validation measures, in order.
        tensorboard: whether to write TensorBoard events.
        wandb: a run of Weights & Biases, or None.
    """

    def __init__(
        self,
        folder: Path,
        epoch: int,
        updates: int,
        eval_metrics: Sequence[str],
        tensorboard: bool = False,
        wandb: Any = None,
    ) -> None:
        self.folder = folder
        self.summary = folder / "summary.csv"
        self.outliers = folder / "outliers.jsonl"
        self.losses = folder / "losses.jsonl"
        self.health = folder / "fp8_health.jsonl"
        self._columns = ["epoch", "train_loss", *(f"eval_{name}" for name in eval_metrics), "lr", *OWN_COLUMNS]
        self._wandb = wandb
        _continue_table(self.summary, self._columns, epoch)
        keep_rows_before(self.outliers, "epoch", epoch)
        keep_rows_before(self.losses, "update", updates + 1)  # the line of the last update was written before it ended
        keep_rows_before(self.health, "update", updates)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=updates or None)

    def epoch(
        self,
        epoch: int,
        train: Mapping[str, float],
        val: Mapping[str, float],
        lr: float,
        updates: int,
        listed: bool = True,
    ) -> None:
        """Write an epoch's scalars to TensorBoard, and append its row to summary.csv and wandb.

        Args:
            epoch: number of the epoch, from 0.
            train: metrics of training without their prefix: loss, task_loss, tweo_loss, peak_abs,
                tweo_weight, tweo_grad_ratio.
            val: metrics of validation without their prefix; empty when the epoch was not validated.
            lr: learning rate used in the epoch.
            updates: optimizer updates since the run began.
            listed: whether it has a row; timm gives those epochs one that --val-interval lets validate.
        """
        row: dict[str, Any] = {"epoch": epoch, "lr": lr}
        row |= {f"train_{name}": value for name, value in train.items()}
        row |= {f"eval_{name}": value for name, value in val.items()}
        self.scalars(row, updates)
        if not listed:
            return
        begun = self.summary.exists() and self.summary.stat().st_size > 0
        Outputs(self.folder).append(self.summary.name, as_csv([row], self._columns, header=not begun))
        if self._wandb is not None:
            self._wandb.log(row)

    def log_line(self, epoch: int, samples: int, means: Mapping[str, float], update: int) -> None:
        """Append a row to losses.jsonl.

        Args:
            epoch: number of the epoch, from 0.
            samples: images since it began, of all processes.
            means: task_loss and tweo_loss over them.
            update: optimizer updates since the run began.
        """
        losses = {name: means[name] for name in ("task_loss", "tweo_loss")}
        append_rows(self.losses, [{"update": update, "epoch": epoch, "samples": samples, **losses}])

    def blocks(self, rows: Iterable[Mapping[str, Any]], updates: int) -> None:
        """Append one row a block to outliers.jsonl, and the peaks to TensorBoard."""
        rows = list(rows)
        append_rows(self.outliers, rows)
        for row in rows:
            peaks = {f"{key}/{row['block']}": row[key] for key in ("train_peak_abs", "eval_peak_abs") if key in row}
            self.scalars(peaks, updates)

    def histograms(self, label: str, stats: Mapping[str, ActivationStats | None], updates: int) -> None:
        """Write the histogram of every block's |A| to TensorBoard, from the bins that were counted anyway.

        Args:
            label: train or eval.
            stats: of each block.
            updates: optimizer updates since the run began.
        """
        if self._board is None:
            return
        for name, block in stats.items():
            edges, counts = block.histogram() if block is not None else ([], [])
            if not counts:
                continue
            total, square = (sum(c * e**k for e, c in zip(edges, counts, strict=True)) for k in (1, 2))
            self._board.add_histogram_raw(
                f"{label}_abs_activation/{name}",
                min=edges[0],
                max=edges[-1],
                num=sum(counts),
                sum=total,
                sum_squares=square,
                bucket_limits=edges,
                bucket_counts=counts,
                global_step=updates,
            )

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        """Write finite numbers to TensorBoard."""
        if self._board is None:
            return
        for name, value in values.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush TensorBoard, end the run of Weights & Biases."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _continue_table(path: Path, columns: Sequence[str], epoch: int) -> None:
    """Keep the rows of earlier epochs under our columns; a table with others, timm's say, stays beside it."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    table = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    try:
        kept = [row for row in table if _number(row.get("epoch"), below=epoch)]
        foreign = bool(kept) and table.fieldnames != columns
    except csv.Error as error:
        _logger.warning("%s is no table (%s): it stays beside the new one", path, error)
        kept, foreign = [], True
    if foreign:
        path.rename(path.with_name(f"{path.name}.before"))
    Outputs(path.parent).write(path.name, as_csv(kept, columns, header=bool(kept)))


def as_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], header: bool = True) -> str:
    """Return rows as CSV, under these columns."""
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, restval="", extrasaction="ignore", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def _number(cell: Any, below: int) -> bool:
    """Whether a cell is the number of an epoch before another."""
    return isinstance(cell, str) and len(cell) < 10 and cell.isdecimal() and int(cell) < below
