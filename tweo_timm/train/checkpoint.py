"""Checkpoints: timm's files, written so that no crash can lose the last good one, with what an exact resume needs.

Each file is what timm's CheckpointSaver writes and `timm.create_model(arch, checkpoint_path=...)` loads. One entry
more, `exact`, holds the position inside the epoch, every random state of every process, the scheduler, the epoch's
running sums and the FP8 scales, all as plain tensors and numbers. A file is written under another name, flushed to the
disk, and renamed; a truncated one, left by a full disk or an older program, is noticed and the one before it is used.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.models import clean_state_dict
from timm.task import TrainingTask
from timm.utils import CheckpointSaver, unwrap_model

_logger = logging.getLogger(__name__)

EXACT_KEY = "exact"


class AtomicSaver(CheckpointSaver):  # type: ignore[misc]
    """timm's CheckpointSaver with writes that are whole or absent, and the `exact` entry.

    Args:
        task: the training task, which owns the weights.
        optimizer: its state is saved.
        args: the run's options as a namespace of plain values.
        exact: called at each save for the `exact` entry.
        folder: where the files go.
        amp_scaler: timm's NativeScaler, or None.
        decreasing: whether a lower metric is better.
        max_history: how many of the best checkpoints are kept.
    """

    def __init__(
        self,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        args: argparse.Namespace,
        exact: Callable[[], dict[str, Any]],
        folder: Path,
        amp_scaler: Any = None,
        decreasing: bool = False,
        max_history: int = 10,
    ) -> None:
        super().__init__(
            model=unwrap_model(task.get_eval_model()),
            optimizer=optimizer,
            args=args,
            amp_scaler=amp_scaler,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            decreasing=decreasing,
            max_history=max_history,
            task=_WithExact(task, exact),
        )
        self.last_good = "none"
        self._adopt_recoveries(folder)

    def _adopt_recoveries(self, folder: Path) -> None:
        """Take over the recovery files of an earlier process, so that they are cleaned up in turn."""
        files = recovery_files(folder)
        for stale in files[2:]:
            stale.unlink()
        self.curr_recovery_file = str(files[0]) if files else ""
        self.prev_recovery_file = str(files[1]) if len(files) > 1 else ""

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        try:
            super()._save(save_path, epoch, metric)
            _flush(save_path)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                os.unlink(save_path)
            raise OSError(
                f"cannot write a checkpoint to {self.checkpoint_dir}: {error}. The last good one is {self.last_good}; "
                "free some space, then continue with --resume auto"
            ) from error

    def _replace(self, src: str, dst: str) -> None:
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


class _WithExact:
    """The task as CheckpointSaver sees it, with one entry more."""

    def __init__(self, task: TrainingTask, exact: Callable[[], dict[str, Any]]) -> None:
        self._task = task
        self._exact = exact

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Any = unwrap_model) -> dict[str, Any]:
        state = dict(self._task.get_checkpoint_state(ema=ema, unwrap_fn=unwrap_fn))
        return state if ema else state | {EXACT_KEY: self._exact()}


def _flush(path: str) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def recovery_files(folder: Path) -> list[Path]:
    """Return the recovery checkpoints in a run folder, newest first."""

    def position(path: Path) -> tuple[int, int]:
        _, epoch, batch = path.name.removesuffix(".pth.tar").split("-")
        return int(epoch), int(batch)

    return sorted(folder.glob("recovery-*-*.pth.tar"), key=position, reverse=True)


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Load the checkpoint in a run folder that is furthest on; damaged files are passed over with a warning.

    Returns:
        Its path and content, or None if the folder holds no checkpoint.

    Raises:
        ValueError: if there are checkpoints and none of them can be read.
    """
    candidates = [folder / "last.pth.tar", *recovery_files(folder), *folder.glob("checkpoint-*.pth.tar")]
    readable: list[tuple[tuple[int, int], Path, dict[str, Any]]] = []
    existing = [path for path in candidates if path.exists()]
    for path in existing:
        if readable and path.name.startswith("checkpoint-"):
            break  # older by construction; read only when nothing newer could be
        try:
            content = read_checkpoint(path)
        except ValueError as error:
            _logger.warning("%s; trying the one before it", error)
            continue
        readable.append((_progress(content), path, content))
    if existing and not readable:
        raise ValueError(
            f"none of the {len(existing)} checkpoints in {folder} can be read: start anew in another folder"
        )
    if not readable:
        return None
    _, path, content = max(readable, key=lambda entry: entry[0])
    return path, content


def _progress(content: dict[str, Any]) -> tuple[int, int]:
    exact = content.get(EXACT_KEY)
    return (exact["epoch"], exact["batch"]) if exact else (content.get("epoch", -1) + 1, 0)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of timm or of this package, tensors and plain values only.

    Raises:
        ValueError: if the file is missing, truncated, or holds no weights.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damage looks like
        raise ValueError(f"checkpoint {path} is truncated or no checkpoint ({type(error).__name__})") from error
    if not isinstance(content, dict) or not any(key in content for key in ("state_dict", "model")):
        raise ValueError(f"checkpoint {path} holds no training state: weights alone go to --initial-checkpoint")
    return content


def restore(
    content: dict[str, Any], path: Path, task: TrainingTask, optimizer: torch.optim.Optimizer | None, scaler: Any
) -> int:
    """Load weights, optimizer and scaler of a checkpoint.

    Args:
        content: what `read_checkpoint` returned.
        path: for messages.
        task: gets the weights, and the EMA weights where it has an EMA.
        optimizer: gets its state; None leaves it alone, for --no-resume-opt.
        scaler: timm's NativeScaler, or None.

    Returns:
        The epoch to go on with.

    Raises:
        ValueError: if the checkpoint is of another architecture or another optimizer.
    """
    weights = clean_state_dict(content.get("state_dict", content.get("model")))
    try:
        task.load_checkpoint_state(weights, content.get("task_state"))
        if task.has_ema():
            ema = content.get("state_dict_ema")
            task.load_checkpoint_state(
                clean_state_dict(ema) if ema is not None else weights, content.get("task_state_ema"), ema=True
            )
        if optimizer is not None and "optimizer" in content:
            optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        arch = content.get("arch", "another model")
        raise ValueError(f"checkpoint {path} (of {arch}) does not fit this run: {str(error)[:400]}") from error
    if scaler is not None and scaler.state_dict_key in content:
        scaler.load_state_dict(content[scaler.state_dict_key])
    return int(content.get("epoch", -1)) + (1 if content.get("version", 1) > 1 else 0)
