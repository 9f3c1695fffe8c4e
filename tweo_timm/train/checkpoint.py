"""Checkpoints: timm's files, written so that no crash can lose the last good one, with what an exact resume needs.

Each file is what timm's CheckpointSaver writes and `timm.create_model(arch, checkpoint_path=...)` loads. One entry
more, `exact`, holds the position inside the epoch, every random state of every process, the scheduler, the epoch's
running sums and the FP8 scales, all as plain tensors and numbers. A file is written under another name, flushed to the
disk, and renamed; a damaged one, left by a full disk or an older program, is noticed and the one before it is used.

Names in a checkpoint are those of its own folder at most: a file is ranked, renamed or removed only if the saver itself
would give it that name, and it lies in the run folder as a plain file.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import CheckpointSaver, unwrap_model
from torch import Tensor

from tweo_timm.records import Fields, shown
from tweo_timm.run.checkpoint_file import CheckpointFile, read
from tweo_timm.settings import AT_LEAST_0
from tweo_timm.train.param_groups import check_state, under_settings
from tweo_timm.train.shard import shard_like, shard_optimizer_like, whole
from tweo_timm.train.side import check_side_entry, side_entry

_logger = logging.getLogger(__name__)

EXACT_KEY = "exact"
LAST = "last.pth.tar"
_RANKED = re.compile(r"checkpoint-(\d{1,9})\.pth\.tar")
_RECOVERY = re.compile(r"recovery-(\d{1,9})-(\d{1,9})\.pth\.tar")


class AtomicSaver(CheckpointSaver):  # type: ignore[misc]
    """timm's CheckpointSaver with writes that are whole or absent.

    Args:
        folder: where the files go.
        args: the run's options as a namespace of plain values.
        decreasing: whether a lower metric is better.
        max_history: how many of the best checkpoints are kept.

    Attributes:
        last_good: path of the newest whole file, for messages.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, decreasing: bool = False, max_history: int = 10) -> None:
        super().__init__(
            model=None,
            optimizer=None,
            args=args,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            decreasing=decreasing,
            max_history=max_history,
        )
        self._content: dict[str, Any] = {}
        self.last_good = "none"
        self._finishing = False
        for leftover in (*folder.glob("*tmp.pth.tar"), *folder.glob("*.pth.tar.tmp")):
            leftover.unlink()

    @contextlib.contextmanager
    def holding(self, content: dict[str, Any]) -> Iterator[None]:
        """Write these entries into what is saved meanwhile, beside epoch, arch, args, metric and the saver's own.

        timm's methods that save have no argument for them; kept longer, they would hold a second model in memory.
        """
        self._content = content
        try:
            yield
        finally:
            self._content = {}

    def take_over(self, file: CheckpointFile) -> None:
        """Go on with the files of the process that wrote a checkpoint into this folder.

        What that process may not have come to is done now: ranking the checkpoint, and removing the recovery files
        that the continued run will write again.

        Args:
            file: the checkpoint that the run continues from.

        Raises:
            ValueError: if what it says of the folder's files cannot be.
        """
        path = file.path
        state = self._history(file)
        self.last_good = str(path)
        self._leave_behind(file)
        here = _file_position(path) or (progress(file)[0], 0)
        for stale in recovery_files(path.parent):
            if _position(stale) > here:
                stale.unlink()
        files = recovery_files(path.parent)
        for stale in files[2:]:
            stale.unlink()
        self.curr_recovery_file = str(files[0]) if files else ""
        self.prev_recovery_file = str(files[1]) if len(files) > 1 else ""
        if state is None:
            return
        self.load_state_dict(state | {"pending": (None, None)})
        epoch, metric = state["pending"]
        if path.name == LAST and epoch is not None:
            self._finishing = True
            super().save_checkpoint(epoch, metric)
            self._finishing = False

    def forget_recovery_files(self) -> None:
        """Remove them: a finished run goes on from its last checkpoint."""
        for path in recovery_files(Path(self.recovery_dir)):
            path.unlink()
        self.curr_recovery_file = self.prev_recovery_file = ""

    def _history(self, file: CheckpointFile) -> dict[str, Any] | None:
        """What a checkpoint says of the ranking, with those files alone that are this saver's; None if nothing.

        Metrics of another --eval-metric rank nothing: such files are kept as timm keeps those without a metric.
        """
        if not file.fields.has("saver"):
            return None
        saver = file.fields.fields("saver")
        pairs = [_pair(saver, "checkpoint_files", pair) for pair in saver.items("checkpoint_files")]
        files = [(name, metric) for name, metric in pairs if self._is_mine(name)]
        pending = _pair(saver, "pending", saver.items("pending")) if saver.has("pending") else (None, None)
        if pending[0] is not None:
            pending = (
                Fields({"epoch": pending[0]}, file.fields.where, "saver.pending").integer("epoch", AT_LEAST_0),
                pending[1],
            )
        history: dict[str, Any] = {
            "checkpoint_files": files,
            "pending": pending,
            "best_epoch": None,
            "best_metric": None,
        }
        if saver.has("best_metric") and saver.has("best_epoch"):
            history |= {
                "best_metric": saver.number("best_metric"),
                "best_epoch": saver.integer("best_epoch", AT_LEAST_0),
            }
        if file.args.get("eval_metric", self.args.eval_metric) == self.args.eval_metric:
            return history
        _logger.warning("%s ranks by another --eval-metric: the ranking begins anew", file.path)
        return {
            "checkpoint_files": [(name, None) for name, _ in files],
            "pending": (pending[0], None),
            "best_epoch": None,
            "best_metric": None,
        }

    def _is_mine(self, name: Any) -> bool:
        """Whether this saver would have made a file of that name, and it lies in the folder as a plain file."""
        if isinstance(name, str) and _RANKED.fullmatch(name):
            path = Path(self.checkpoint_dir) / name
            return path.is_file() and not path.is_symlink()
        _logger.warning("A checkpoint lists %s among its files, which no run writes: left alone", shown(name))
        return False

    def _leave_behind(self, file: CheckpointFile) -> None:
        """Let a run that goes back to an earlier checkpoint begin there again, not at the end it turned away from."""
        path = file.path
        last = path.with_name(LAST)
        if path.name == LAST or not last.exists():
            return
        try:
            further = progress(read(last, "metadata")) > progress(file)
        except ValueError:  # a damaged file is passed over anyway
            return
        if not further:
            return
        number = next(n for n in itertools.count(1) if not os.path.lexists(path.with_name(f"last.old{n}.pth.tar")))
        aside = path.with_name(f"last.old{number}.pth.tar")
        self._duplicate(str(last), str(aside))
        self._duplicate(str(path), str(last))
        _logger.warning("Going back to %s: the later %s is now %s", path, LAST, aside.name)

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        if self._finishing:
            return
        state = {"epoch": epoch, "arch": self.args.model, "version": 2, "args": self.args, **self._content}
        if metric is not None:
            state["metric"] = metric
        state["saver"] = self.state_dict(epoch, metric)
        try:
            torch.save(state, save_path)
            _flush(save_path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            with contextlib.suppress(OSError):
                os.unlink(save_path)
            raise OSError(
                f"cannot write a checkpoint to {self.checkpoint_dir}: {error}. The last good one is {self.last_good}; "
                "free some space, then continue with --resume auto"
            ) from error

    def _replace(self, src: str, dst: str) -> None:
        if self._finishing:
            return
        os.replace(src, dst)
        _flush(os.path.dirname(dst) or ".")
        self.last_good = dst

    def _duplicate(self, src: str, dst: str) -> None:
        temporary = f"{dst}.tmp"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        try:
            os.link(os.path.realpath(src), temporary)
        except OSError:  # a file system without hard links
            shutil.copy2(src, temporary)
        os.replace(temporary, dst)
        with contextlib.suppress(FileNotFoundError):  # renaming a link to the very file it replaces leaves it there
            os.unlink(temporary)


def _flush(path: str) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pair(saver: Fields, name: str, pair: Any) -> tuple[Any, float | None]:
    """A name or an epoch, and its metric, of a list of them."""
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        saver.refuse(name, pair, "a list of two, the second a metric")
    metric = Fields({name: pair[1]}, saver.where, saver.path)
    return pair[0], metric.number(name) if metric.has(name) else None


def recovery_files(folder: Path) -> list[Path]:
    """Return the recovery checkpoints in a run folder, newest first; files of similar names are none."""
    found = [path for path in folder.glob("recovery-*.pth.tar") if _file_position(path) is not None]
    return sorted(found, key=_position, reverse=True)


def holds_checkpoints(folder: Path) -> bool:
    """Return whether a run has left checkpoints in a folder."""
    return (folder / LAST).exists() or bool(recovery_files(folder))


def _file_position(path: Path) -> tuple[int, int] | None:
    """Epoch and update in the name of a recovery file; None for a file of another name."""
    match = _RECOVERY.fullmatch(path.name)
    return (int(match[1]), int(match[2])) if match else None


def _position(path: Path) -> tuple[int, int]:
    position = _file_position(path)
    assert position is not None
    return position


def load_newest(folder: Path) -> CheckpointFile | None:
    """Load the checkpoint in a run folder that is furthest on; damaged files are passed over with a warning.

    Returns:
        It, or None if the folder holds no checkpoint.

    Raises:
        ValueError: if there are checkpoints and none of them can be read.
    """
    newest = [path for path in (folder / LAST, *recovery_files(folder)) if path.exists()]
    older = sorted(folder.glob("checkpoint-*.pth.tar"), key=lambda path: path.stat().st_mtime, reverse=True)
    readable: list[tuple[tuple[int, int], CheckpointFile]] = []
    for path in (*newest, *older):
        if readable and path in older:
            break
        try:
            file = read(path)
            readable.append((progress(file), file))
        except ValueError as error:
            _logger.warning("%s; trying the one before it", error)
    if (newest or older) and not readable:
        raise ValueError(
            f"none of the {len(newest) + len(older)} checkpoints in {folder} can be read: start anew with another "
            "--experiment"
        )
    return max(readable, key=lambda entry: entry[0])[1] if readable else None


def exact_state(file: CheckpointFile) -> Fields | None:
    """What a checkpoint of ours holds for an exact continuation; None in others."""
    return file.fields.fields(EXACT_KEY) if file.fields.has(EXACT_KEY) else None


def progress(file: CheckpointFile) -> tuple[int, int]:
    """The epoch that a checkpoint goes on with, and how many of its batches are done.

    Raises:
        ValueError: if it says so in another way than by integers.
    """
    exact = exact_state(file)
    if exact is None:
        return file.next_epoch, 0
    return exact.integer("epoch", AT_LEAST_0), exact.integer("batch", AT_LEAST_0)


def training_state(task: TrainingTask, optimizer: torch.optim.Optimizer, scaler: Any) -> dict[str, Any]:
    """Return the entries of timm's checkpoint that hold tensors: weights, EMA, task, optimizer and scaler.

    Sharded tensors are put together, which makes this a collective; others are references, not copies.
    """
    state = {"optimizer": optimizer.state_dict(), **task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    if scaler is not None:
        state[scaler.state_dict_key] = scaler.state_dict()
    return {**whole(state), **side_entry(task)}


def restore(
    file: CheckpointFile,
    task: TrainingTask,
    optimizer: torch.optim.Optimizer | None,
    scaler: Any,
    remembered_rates: bool = False,
) -> int:
    """Load weights, optimizer and scaler of a checkpoint; the settings of the optimizer stay those of this run.

    Args:
        file: what was read.
        task: gets the weights, and the EMA weights where it has an EMA.
        optimizer: gets its state; None leaves it alone, for --no-resume-opt.
        scaler: timm's NativeScaler, or None.
        remembered_rates: whether the learning rates are the checkpoint's, for --sched plateau.

    Returns:
        The epoch to go on with.

    Raises:
        ValueError: if the checkpoint is of another architecture or another optimizer, or its weights are not finite.
    """
    check_side_entry(file, task)
    weights, entries = file.weights, file.fields
    with file.giving(f"weights of {file.arch or 'another model'}"):
        _load_weights(file, task, weights, "task_state")
    if task.has_ema():
        with file.giving("averaged weights"):
            _load_weights(file, task, file.ema or weights, "task_state_ema", ema=True)
    if optimizer is not None and entries.has("optimizer"):
        with file.giving("optimizer"):
            saved = dict(entries.fields("optimizer").mapping)
            check_state(saved, optimizer)
            state = under_settings(saved, optimizer, remembered_rates)
            optimizer.load_state_dict(shard_optimizer_like(state, optimizer))
    if scaler is not None and entries.has(scaler.state_dict_key):
        with file.giving(scaler.state_dict_key):
            scaler.load_state_dict(entries.fields(scaler.state_dict_key).mapping)
    return file.next_epoch


def _load_weights(
    file: CheckpointFile, task: TrainingTask, weights: dict[str, Tensor], task_state: str, ema: bool = False
) -> None:
    reference = unwrap_model(task.get_eval_model(ema=ema)).state_dict()
    file.check(weights, reference)
    state = dict(file.fields.fields(task_state).mapping) if file.fields.has(task_state) else None
    task.load_checkpoint_state(shard_like(weights, reference), state, ema=ema)
