"""The state of a run beside its weights and its optimizer: all that an exact continuation depends on.

Position in the data, random state of every process, the epoch's running sums, FP8 scales, the plateau schedule's memory
(timm's other schedules are functions of the epoch), and the generators of their own that a bfloat16 EMA and AdaHessian
draw from. Everything is plain tensors and numbers, which torch.load reads without running code.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor
from torch.utils.data import IterableDataset

from tweo_timm.balance import Balance
from tweo_timm.fp8.patch import fp8_state, load_fp8_state
from tweo_timm.records import Fields
from tweo_timm.run.checkpoint_file import CheckpointFile
from tweo_timm.settings import AT_LEAST_0, Bounds
from tweo_timm.train.build import Session
from tweo_timm.train.meters import EpochMeters
from tweo_timm.train.replay import Position, RandomState

_logger = logging.getLogger(__name__)

# What a plateau schedule has seen; the rest of its state are settings of the run.
_PLATEAU_MEMORY = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")


Statistics = dict[str, dict[str, Tensor]]  # running statistics of batch norms, by name, of the model and of its EMA


@dataclass
class Cursor:
    """Where a run is.

    Attributes:
        epoch: the epoch that is under way, or the next one.
        batch: batches of it that have been trained on.
        updates: optimizer updates since the run began.
    """

    epoch: int = 0
    batch: int = 0
    updates: int = 0


def capture_exact(
    session: Session, cursor: Cursor, meters: EpochMeters, position: Position | None = None
) -> dict[str, Any]:
    """Return the state as plain values. A collective.

    Args:
        session: the run.
        cursor: where it is.
        meters: the sums of the epoch under way.
        position: where the loader is; None asks it.
    """
    mine: dict[str, Any] = {
        "fp8": fp8_state(session.model) if session.fp8 is not None else None,
        "balance": balance.state() if (balance := _balance(session)) is not None else None,
        **{name: generator.get_state() for name, generator in _generators(session).items()},
    }
    if cursor.batch:
        mine["position"] = (position or session.data.replay.position(cursor.batch)).state_dict()
        mine["meters"] = meters.state_dict()
        if session.world.distributed:
            mine["statistics"] = {
                which: {name: buffer.cpu() for name, buffer in buffers.items()}
                for which, buffers in _batch_norm_statistics(session).items()
            }
    else:
        mine["random"] = RandomState.capture().state_dict()
    return {
        "epoch": cursor.epoch,
        "batch": cursor.batch,
        "updates": cursor.updates,
        "shape": _epoch_shape(session),
        "plateau": _plateau(session).state_dict() if session.options.sched == "plateau" else None,
        "processes": session.world.gather(mine),
    }


def restore_exact(
    file: CheckpointFile, exact: Fields, session: Session, cursor: Cursor, meters: EpochMeters
) -> tuple[Position | RandomState, Statistics]:
    """Put the state back.

    Args:
        file: where it was read from.
        exact: what `capture_exact` returned.
        session: the run, built.
        cursor: is set.
        meters: is set, if the epoch was under way.

    Returns:
        Where to enter the epoch, or the random state at its beginning, to be restored when all else is ready; and
        what `put_back_statistics` takes.

    Raises:
        ValueError: if the run had another number of processes, stood inside an epoch of another shape, or the state
            holds what no run writes.
    """
    world, path = session.world, file.path
    processes = exact.each("processes")
    if len(processes) != world.size:
        raise ValueError(
            f"checkpoint {path} was written by {len(processes)} processes and this run has {world.size}: "
            "start as many, or give up exactness and name the epoch to begin with --start-epoch N"
        )
    mine = processes[world.rank]
    cursor.epoch, cursor.batch, cursor.updates = (
        exact.integer(key, AT_LEAST_0) for key in ("epoch", "batch", "updates")
    )
    changed = _changes(exact, session)
    if changed and cursor.batch:
        raise ValueError(
            f"checkpoint {path} stands after batch {cursor.batch} of an epoch that has another shape now ({changed}): "
            f"go on with the settings and the data of before, or begin an epoch with --start-epoch {cursor.epoch}"
        )
    if changed:
        _logger.warning("The epochs have another shape than those before checkpoint %s: %s", path, changed)
        cursor.updates = cursor.epoch * session.updates_per_epoch
    if exact.has("plateau") and session.options.sched == "plateau":
        with file.giving("exact.plateau"):
            _remember_plateau(_plateau(session), exact.fields("plateau").mapping)
    if session.fp8 is not None and mine.has("fp8"):
        with file.giving("the FP8 scales"):
            load_fp8_state(session.model, dict(mine.fields("fp8").mapping))
    if (balance := _balance(session)) is not None and mine.has("balance"):
        with file.giving("the weight's memory"):
            balance.load_state(mine.fields("balance").mapping, world.device)
    for name, generator in _generators(session).items():
        if mine.has(name):
            with file.giving(f"the random state {name}"):
                generator.set_state(mine.mapping[name])
    return _entry(file, mine, session, cursor, meters)


def _entry(
    file: CheckpointFile, mine: Fields, session: Session, cursor: Cursor, meters: EpochMeters
) -> tuple[Position | RandomState, Statistics]:
    """Where this process enters the epoch: at its beginning, or between two of its batches with what it had counted."""
    if not cursor.batch:
        with file.giving("the random state"):
            return _tried(RandomState.from_state_dict(dict(mine.fields("random").mapping))), {}
    position = mine.fields("position")
    if position.integer("batch", Bounds(1, len(session.data.train))) != cursor.batch:
        position.refuse("batch", position.mapping["batch"], f"that of exact.batch, {cursor.batch}")
    with file.giving("the position inside the epoch"):
        entry = Position.from_state_dict(dict(position.mapping))
        for state in (entry.epoch_start, entry.before_batch, entry.now):
            _tried(state)
    with file.giving("the sums of the epoch"):
        meters.load_state_dict(mine.fields("meters").mapping)
    statistics = dict(mine.fields("statistics").mapping) if mine.has("statistics") else {}
    with file.giving("the statistics of batch norms"):
        _check_statistics(session, statistics)
    return entry, statistics


def _tried(state: RandomState) -> RandomState:
    """Make sure that a random state can be restored, since that will be too late for a word about the checkpoint."""
    present = RandomState.capture()
    try:
        state.restore()
    finally:
        present.restore()
    return state


def _check_statistics(session: Session, statistics: Statistics) -> None:
    present = _batch_norm_statistics(session) if statistics else {}
    for which, buffers in statistics.items():
        for name, value in buffers.items():
            if present[which][name].shape != value.shape:
                raise ValueError(f"{name} is of shape {tuple(value.shape)}")


def put_back_statistics(session: Session, statistics: Statistics) -> None:
    """Give batch norms what this process had measured; after DDP was made, which gives all those of the first.

    Args:
        session: the run, wrapped.
        statistics: of the checkpoint's entry for this process; empty if there are none.
    """
    present = _batch_norm_statistics(session)
    for which, buffers in statistics.items():
        for name, value in buffers.items():
            present[which][name].copy_(value)


def _batch_norm_statistics(session: Session) -> dict[str, dict[str, Tensor]]:
    """Running statistics of the model and of its EMA, which inside an epoch differ between processes.

    They are named as timm's distribute_bn names those that it makes equal at the end of an epoch.
    """
    task = session.task
    models = {"model": task.get_eval_model()} | ({"ema": task.get_eval_model(ema=True)} if task.has_ema() else {})
    return {
        which: {
            name: buffer
            for name, buffer in unwrap_model(model).named_buffers()
            if "running_mean" in name or "running_var" in name
        }
        for which, model in models.items()
    }


def _epoch_shape(session: Session) -> dict[str, int]:
    """What a position inside an epoch is a position in."""
    dataset, options = session.data.replay.loader.dataset, session.options
    shape = {
        "images": len(dataset),
        "batches": len(session.data.train),
        "--batch-size": options.batch_size,
        "--grad-accum-steps": options.grad_accum_steps,
    }
    # Each worker reads a part of a stream of its own.
    return shape | ({"--workers": options.workers} if isinstance(dataset, IterableDataset) else {})


def _changes(exact: Fields, session: Session) -> str:
    """What of an epoch's shape has changed since a checkpoint, in words."""
    now = _epoch_shape(session)
    shape = exact.fields("shape") if exact.has("shape") else None
    before = {name: shape.integer(name) for name in now if shape.has(name)} if shape is not None else {}
    return ", ".join(f"{name} {before[name]}, now {now[name]}" for name in before if before[name] != now[name])


def _remember_plateau(plateau: Any, before: Mapping[str, Any]) -> None:
    """Give a plateau schedule its memory back, unless it was of a metric that rises where this one falls."""
    if before["mode"] == plateau.mode:
        plateau.load_state_dict({name: before[name] for name in _PLATEAU_MEMORY if name in before})


def _balance(session: Session) -> Balance | None:
    return session.tweo.balance if session.tweo is not None else None


def _plateau(session: Session) -> Any:
    """Torch's scheduler inside timm's: timm's own state leaves out how many epochs were bad."""
    return session.scheduler.lr_scheduler


def _generators(session: Session) -> dict[str, torch.Generator]:
    """What draws random numbers apart from the rest: timm's EMA, to round bfloat16 weights, and AdaHessian."""
    rounding = getattr(session.task.get_trainable_module(ema=True), "_sr_generator", None)
    found = {"ema_rounding": rounding, "hessian": _hessian_generator(session)}
    return {name: generator for name, generator in found.items() if generator is not None}


def _hessian_generator(session: Session) -> torch.Generator | None:
    """AdaHessian's, on the device of the model, where timm puts it when it first draws from it."""
    optimizer: Any = session.inner_optimizer
    generator: torch.Generator | None = getattr(optimizer, "generator", None)
    device = next(session.model.parameters()).device
    if generator is not None and generator.device != device:
        generator = optimizer.generator = torch.Generator(device).manual_seed(optimizer.seed)
    return generator
