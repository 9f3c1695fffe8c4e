"""Checkpoints: timm's files, written so that no crash can lose the last good one, with what an exact resume needs.

Each file is what timm's CheckpointSaver writes and `timm.create_model(arch, checkpoint_path=...)` loads. One entry
more, `exact`, holds the position inside the epoch, every random state of every process, the scheduler, the epoch's
running sums and the FP8 scales, all as plain tensors and numbers. A file is written under another name, flushed to the
disk, and renamed; a truncated one, left by a full disk or an older program, is noticed and the one before it is used.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models import clean_state_dict
from timm.task import TrainingTask
from timm.utils import CheckpointSaver, unwrap_model
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from tweo_timm.suggestion import suggest_path
from tweo_timm.train.param_groups import under_settings
from tweo_timm.train.shard import shard_like, shard_optimizer_like, whole

_logger = logging.getLogger(__name__)

EXACT_KEY = "exact"
LAST = "last.pth.tar"


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

    def take_over(self, path: Path, content: dict[str, Any]) -> None:
        """Go on with the files of the process that wrote a checkpoint into this folder.

        What that process may not have come to is done now: ranking the checkpoint, and removing the recovery files
        that the continued run will write again.

        Args:
            path: the checkpoint that the run continues from.
            content: what `read_checkpoint` returned.
        """
        self.last_good = str(path)
        self._leave_behind(path, content)
        here = _file_position(path) if path.name.startswith("recovery-") else (_progress(content)[0], 0)
        for stale in recovery_files(path.parent):
            if _file_position(stale) > here:
                stale.unlink()
        files = recovery_files(path.parent)
        for stale in files[2:]:
            stale.unlink()
        self.curr_recovery_file = str(files[0]) if files else ""
        self.prev_recovery_file = str(files[1]) if len(files) > 1 else ""
        state = content.get("saver")
        if state is None:
            return
        self.load_state_dict(state | {"pending": (None, None)})
        epoch, metric = state.get("pending", (None, None))
        if path.name == LAST and epoch is not None:
            self._finishing = True
            super().save_checkpoint(epoch, metric)
            self._finishing = False

    def _leave_behind(self, path: Path, content: dict[str, Any]) -> None:
        """Let a run that goes back to an earlier checkpoint begin there again, not at the end it turned away from."""
        last = path.with_name(LAST)
        if path.name == LAST or not last.exists():
            return
        try:
            further = _progress(load_checkpoint_metadata(str(last))) > _progress(content)
        except Exception:  # torch raises whatever the damage looks like; such a file is passed over anyway
            return
        if not further:
            return
        number = next(n for n in itertools.count(1) if not path.with_name(f"last.old{n}.pth.tar").exists())
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
            os.link(src, temporary)
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


def recovery_files(folder: Path) -> list[Path]:
    """Return the recovery checkpoints in a run folder, newest first."""
    return sorted(folder.glob("recovery-*-*.pth.tar"), key=_file_position, reverse=True)


def holds_checkpoints(folder: Path) -> bool:
    """Return whether a run has left checkpoints in a folder."""
    return (folder / LAST).exists() or bool(recovery_files(folder))


def _file_position(path: Path) -> tuple[int, int]:
    """Epoch and update in the name of a recovery file."""
    _, epoch, update = path.name.removesuffix(".pth.tar").split("-")
    return int(epoch), int(update)


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Load the checkpoint in a run folder that is furthest on; damaged files are passed over with a warning.

    Returns:
        Its path and content, or None if the folder holds no checkpoint.

    Raises:
        ValueError: if there are checkpoints and none of them can be read.
    """
    newest = [path for path in (folder / LAST, *recovery_files(folder)) if path.exists()]
    older = sorted(folder.glob("checkpoint-*.pth.tar"), key=lambda path: path.stat().st_mtime, reverse=True)
    readable: list[tuple[tuple[int, int], Path, dict[str, Any]]] = []
    for path in (*newest, *older):
        if readable and path in older:
            break
        try:
            content = read_checkpoint(path)
        except ValueError as error:
            _logger.warning("%s; trying the one before it", error)
            continue
        readable.append((_progress(content), path, content))
    if (newest or older) and not readable:
        raise ValueError(
            f"none of the {len(newest) + len(older)} checkpoints in {folder} can be read: start anew with another "
            "--experiment"
        )
    if not readable:
        return None
    _, path, content = max(readable, key=lambda entry: entry[0])
    return path, content


def _progress(content: dict[str, Any]) -> tuple[int, int]:
    exact = content.get(EXACT_KEY)
    return (exact["epoch"], exact["batch"]) if exact else (_next_epoch(content), 0)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of timm or of this package, tensors and plain values only.

    Raises:
        ValueError: if the file is missing, truncated, or holds no weights.
    """
    if not path.is_file():
        raise ValueError(
            f"there is no checkpoint {path}: pass a file that timm or tweo-train saved{suggest_path(path)}"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damage looks like
        raise ValueError(f"checkpoint {path} is truncated or no checkpoint ({type(error).__name__})") from error
    if not isinstance(content, dict) or not any(key in content for key in ("state_dict", "model")):
        raise ValueError(f"checkpoint {path} holds no training state: weights alone go to --initial-checkpoint")
    return content


def training_state(task: TrainingTask, optimizer: torch.optim.Optimizer, scaler: Any) -> dict[str, Any]:
    """Return the entries of timm's checkpoint that hold tensors: weights, EMA, task, optimizer and scaler.

    Sharded tensors are put together, which makes this a collective; others are references, not copies.
    """
    state = {"optimizer": optimizer.state_dict(), **task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    if scaler is not None:
        state[scaler.state_dict_key] = scaler.state_dict()
    return dict(whole(state))


def restore(
    content: dict[str, Any],
    path: Path,
    task: TrainingTask,
    optimizer: torch.optim.Optimizer | None,
    scaler: Any,
    remembered_rates: bool = False,
) -> int:
    """Load weights, optimizer and scaler of a checkpoint; the settings of the optimizer stay those of this run.

    Args:
        content: what `read_checkpoint` returned.
        path: for messages.
        task: gets the weights, and the EMA weights where it has an EMA.
        optimizer: gets its state; None leaves it alone, for --no-resume-opt.
        scaler: timm's NativeScaler, or None.
        remembered_rates: whether the learning rates are the checkpoint's, for --sched plateau.

    Returns:
        The epoch to go on with.

    Raises:
        ValueError: if the checkpoint is of another architecture or another optimizer.
    """
    weights = content.get("state_dict", content.get("model"))
    averaged = content.get("state_dict_ema") or content.get("model_ema") or weights
    try:
        _load_weights(task, weights, content.get("task_state"))
        if task.has_ema():
            _load_weights(task, averaged, content.get("task_state_ema"), ema=True)
        if optimizer is not None and "optimizer" in content:
            state = under_settings(content["optimizer"], optimizer, remembered_rates)
            optimizer.load_state_dict(shard_optimizer_like(state, optimizer))
    except (RuntimeError, ValueError, KeyError) as error:
        arch = content.get("arch", "another model")
        raise ValueError(f"checkpoint {path} (of {arch}) does not fit this run: {str(error)[:400]}") from error
    if scaler is not None and scaler.state_dict_key in content:
        scaler.load_state_dict(content[scaler.state_dict_key])
    return _next_epoch(content)


def _load_weights(task: TrainingTask, weights: Any, task_state: dict[str, Any] | None, ema: bool = False) -> None:
    model = unwrap_model(task.get_eval_model(ema=ema))
    task.load_checkpoint_state(shard_like(clean_state_dict(weights), model.state_dict()), task_state, ema=ema)


def _next_epoch(content: dict[str, Any]) -> int:
    """The epoch after a checkpoint, by timm's rule: files before version 2 hold it, later ones the epoch done."""
    return int(content.get("epoch", -1)) + (1 if content.get("version", 1) > 1 else 0)
