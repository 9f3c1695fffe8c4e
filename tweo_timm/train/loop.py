"""The training loop: epochs of updates, validation, records and checkpoints, continued exactly where it was left."""

from __future__ import annotations

import argparse
import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
from timm.utils import dispatch_clip_grad, distribute_bn, unwrap_model
from torch import Tensor

from tweo_timm.fp8 import fp8_state, load_fp8_state
from tweo_timm.train.build import Session
from tweo_timm.train.checkpoint import EXACT_KEY, AtomicSaver, restore
from tweo_timm.train.journal import Journal
from tweo_timm.train.meters import EpochMeters, Pace
from tweo_timm.train.progress import ProgressLine
from tweo_timm.train.replay import Position, RandomState
from tweo_timm.train.validation import evaluate
from tweo_timm.train.watch import HealthWatch, Interrupted, SignalWatch

_logger = logging.getLogger(__name__)


class Trainer:
    """Trains a session to its end, from its beginning or from a checkpoint.

    Args:
        session: the built run.
        folder: the run folder; None on processes that write nothing.
        args: the options as plain values, stored in every checkpoint as timm does.
        signals: notices SIGTERM and SIGINT.
    """

    def __init__(self, session: Session, folder: Path | None, args: argparse.Namespace, signals: SignalWatch) -> None:
        self.session = session
        self.folder = folder
        self.signals = signals
        self.start_epoch = session.options.start_epoch or 0
        self.num_updates = 0
        self._entry: Position | None = None
        self._random_after_resume: RandomState | None = None
        self.meters = EpochMeters(len(session.block_names), session.world.device)
        self.health = HealthWatch(session.block_names, session.world.device, session.options.stop_on_peak)
        self._epoch = self.start_epoch
        self._batch = 0
        self.saver: AtomicSaver | None = None
        self.journal: Journal | None = None
        self._args = args

    # ---------------------------------------------------------------------------------------------- resume and save

    def resume(self, content: dict[str, Any], path: Path, with_optimizer: bool = True) -> None:
        """Continue from a checkpoint: exactly from one of ours, at the next epoch from one of timm's.

        Args:
            content: what `read_checkpoint` returned.
            path: where it came from.
            with_optimizer: whether to take over the optimizer, scheduler and random states too.

        Raises:
            ValueError: if it is of another model or run.
        """
        session = self.session
        epoch = restore(content, path, session.task, session.optimizer if with_optimizer else None, session.scaler)
        exact = content.get(EXACT_KEY) if with_optimizer else None
        if exact is None:
            self.start_epoch = session.options.start_epoch if session.options.start_epoch is not None else epoch
            self.num_updates = self.start_epoch * session.updates_per_epoch
            self._restart_schedule()
            _logger.info("Resumed weights from %s; going on with epoch %d", path, self.start_epoch)
            return
        self._resume_exactly(exact, path)
        _logger.info("Resumed %s exactly: epoch %d, batch %d", path, self.start_epoch, exact["batch"])

    def _resume_exactly(self, exact: dict[str, Any], path: Path) -> None:
        session = self.session
        if len(exact["processes"]) != session.world.size:
            raise ValueError(
                f"checkpoint {path} was written by {len(exact['processes'])} processes and this run has "
                f"{session.world.size}: start as many, or take over its weights alone with --initial-checkpoint"
            )
        mine = exact["processes"][session.world.rank]
        self.start_epoch, self.num_updates = exact["epoch"], exact["updates"]
        if session.scheduler is not None:
            session.scheduler.load_state_dict(exact["scheduler"])
        if session.fp8 is not None:
            load_fp8_state(session.model, mine["fp8"])
        if exact["batch"]:
            self._entry = Position.from_state_dict(mine["position"])
            self.meters.load_state_dict(mine["meters"])
        else:
            self._random_after_resume = RandomState.from_state_dict(mine["random"])

    def _restart_schedule(self) -> None:
        scheduler, options = self.session.scheduler, self.session.options
        if scheduler is None or self.start_epoch == 0:
            return
        if options.sched_on_updates:
            scheduler.step_update(self.start_epoch * self.session.updates_per_epoch)
        else:
            scheduler.step(self.start_epoch)

    def _exact_state(self) -> dict[str, Any]:
        """Everything beside weights and optimizer that the rest of the run depends on. A collective."""
        session = self.session
        mine: dict[str, Any] = {"fp8": fp8_state(session.model) if session.fp8 is not None else None}
        if self._batch:
            mine["position"] = session.data.replay.position(self._batch).state_dict()
            mine["meters"] = self.meters.state_dict()
        else:
            mine["random"] = RandomState.capture().state_dict()
        processes = [mine]
        if session.world.distributed:
            processes = [None] * session.world.size  # type: ignore[list-item]
            torch.distributed.all_gather_object(processes, mine)
        return {
            "epoch": self._epoch,
            "batch": self._batch,
            "updates": self.num_updates,
            "scheduler": session.scheduler.state_dict() if session.scheduler is not None else None,
            "processes": processes,
        }

    def _save_recovery(self) -> None:
        """Write a checkpoint in the middle of an epoch."""
        self.health.check(self._last_good())
        self._exact = self._exact_state()
        if self.saver is not None:
            self.saver.save_recovery(self._epoch, self._batch)

    def _last_good(self) -> str:
        return self.saver.last_good if self.saver is not None else "see the primary process"

    # ------------------------------------------------------------------------------------------------------- epochs

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch.

        Returns:
            best_metric and best_epoch (None without validation), and the last epoch's metrics.

        Raises:
            TrainingStopped: for a loss or an activation that is not finite, or above --stop-on-peak.
            Interrupted: after SIGTERM or SIGINT, when the state has been saved.
        """
        session, options = self.session, self.session.options
        best: tuple[float | None, int | None] = (None, None)
        row: dict[str, Any] = {}
        last_epoch = min(session.num_epochs, options.stop_epoch or session.num_epochs)
        self._open_records()
        if self._random_after_resume is not None:
            self._random_after_resume.restore()
        for epoch in range(self.start_epoch, last_epoch):
            lr = sum(group["lr"] for group in session.optimizer.param_groups) / len(session.optimizer.param_groups)
            train = self._train_epoch(epoch)
            val, rows = self._validate(epoch, last_epoch)
            metric = val.get(options.eval_metric)
            if session.scheduler is not None:
                session.scheduler.step(epoch + 1, metric)
            row = {"epoch": epoch, "train": train, "validation": val}
            if self.journal is not None:
                self.journal.epoch(epoch, train, val, lr)
                self.journal.blocks(rows, epoch)
                if session.recorder is not None:
                    self.journal.histograms((session.ema_recorder or session.recorder).stats, epoch)
            best = self._save_epoch(epoch, metric)
            self._raise_if_interrupted()
        if self.journal is not None:
            self.journal.close()
        return {"best_metric": best[0], "best_epoch": best[1], "last": row}

    def _open_records(self) -> None:
        if self.folder is None:
            return
        options = self.session.options
        self.saver = AtomicSaver(
            self.session.task,
            self.session.optimizer,
            self._args,
            exact=lambda: self._exact,
            folder=self.folder,
            amp_scaler=self.session.scaler,
            decreasing="loss" in options.eval_metric,
            max_history=options.checkpoint_hist,
        )
        last = self.folder / "last.pth.tar"
        if last.exists() and self.start_epoch:
            self.saver.load_state_dict_from_checkpoint(str(last))
            self.saver.last_good = str(last)
        self.journal = Journal(self.folder, self.start_epoch, options.tensorboard)

    def _save_epoch(self, epoch: int, metric: float | None) -> tuple[float | None, int | None]:
        self._epoch, self._batch = epoch + 1, 0
        self._exact = self._exact_state()
        if self.saver is None:
            return None, None
        best: tuple[float | None, int | None] = self.saver.save_checkpoint(epoch, metric=metric)
        if epoch + 1 in (self.session.options.save_epochs or ()):
            self.saver.save_milestone(epoch + 1)
        return best

    def _raise_if_interrupted(self) -> None:
        number = self.signals.agreed(self.session.world)
        if number is not None:
            raise Interrupted(number)

    # ----------------------------------------------------------------------------------------------------- training

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        session, options, world = self.session, self.session.options, self.session.world
        data = session.data
        data.start_epoch(epoch, options.mixup_off_epoch)
        if self._entry is None:
            self.meters = EpochMeters(len(session.block_names), world.device)
        self._epoch, self._batch = epoch, self._entry.batch if self._entry else 0
        if self._batch:
            _logger.info("Reading the %d batches of epoch %d that were used already", self._batch, epoch)
        data.replay.enter_at(self._entry)
        self._entry = None
        session.task.get_trainable_module().train()
        session.optimizer.zero_grad()
        num_batches = len(data.train)
        pace = Pace()
        with ProgressLine(f"epoch {epoch}", num_batches - self._batch, world.primary) as bar:
            for images, targets in data.batches():
                pace.loaded()
                self._train_batch(images, targets, num_batches)
                pace.trained(len(targets))
                bar.advance()
                self._after_batch(num_batches, pace)
        self.health.check(self._last_good())
        if world.distributed and options.dist_bn in ("broadcast", "reduce"):
            distribute_bn(unwrap_model(session.task.get_eval_model()), world.size, options.dist_bn == "reduce")
        peaks = self.meters.peaks(world.distributed)
        means = self.meters.means(world.distributed)
        return {**means, "peak_abs": max(peaks)} if peaks else means

    def _train_batch(self, images: Tensor, targets: Tensor, num_batches: int) -> None:
        """Forward and backward of one micro-batch; the last of its group updates the weights.

        A group holds `grad_accum_steps` micro-batches, the last group of an epoch what is left. Each is weighed by its
        group's size, so that the update is that of the one large batch.
        """
        session, options = self.session, self.session.options
        accumulate = options.grad_accum_steps
        group_start = self._batch - self._batch % accumulate
        group_size = min(accumulate, num_batches - group_start)
        completes = self._batch + 1 == group_start + group_size
        images, targets = session.place(images), targets.to(session.world.device)
        if session.tweo is not None:
            session.tweo.set_progress(min(self.num_updates / (session.updates_per_epoch * session.num_epochs), 1.0))
        wait = session.task.no_sync() if not completes else contextlib.nullcontext()
        with wait:
            with session.autocast():
                result = session.task(images, targets)
            self._backward(result["loss"] / group_size, completes)
        peaks = session.tweo.block_peaks if session.tweo is not None else None
        self.meters.update(result, peaks, len(targets))
        self.health.note(self.num_updates, result["loss"], peaks)
        self._batch += 1
        if completes:
            session.optimizer.zero_grad()
            session.task.update_ema(step=self.num_updates)
            self.num_updates += 1
            if session.scheduler is not None:
                session.scheduler.step_update(self.num_updates, metric=None)
            if options.synchronize_step and session.world.device.type == "cuda":
                torch.cuda.synchronize()

    def _backward(self, loss: Tensor, completes: bool) -> None:
        session, options = self.session, self.session.options
        second_order = bool(getattr(session.optimizer, "is_second_order", False))
        parameters = session.task.get_clip_parameters(exclude_head="agc" in options.clip_mode)
        if session.scaler is not None:
            session.scaler(
                loss,
                session.optimizer,
                clip_grad=options.clip_grad,
                clip_mode=options.clip_mode,
                parameters=parameters,
                create_graph=second_order,
                need_update=completes,
            )
            return
        loss.backward(create_graph=second_order)  # type: ignore[no-untyped-call]
        if completes:
            if options.clip_grad is not None:
                dispatch_clip_grad(parameters, options.clip_grad, mode=options.clip_mode)
            session.optimizer.step()

    def _after_batch(self, num_batches: int, pace: Pace) -> None:
        """What happens between two batches: log lines, health, recovery checkpoints, signals."""
        session, options = self.session, self.session.options
        at_update = self._batch % options.grad_accum_steps == 0 or self._batch == num_batches
        logs = self._batch % options.log_interval == 0 or self._batch == num_batches
        if logs or session.world.device.type == "cpu":
            self.health.check(self._last_good())
        if logs:
            self._log_line(num_batches, pace)
        inside = at_update and self._batch < num_batches
        if not inside:
            return
        since = options.recovery_interval
        if since and (self._batch % since) < options.grad_accum_steps and self._batch >= since:
            self._save_recovery()
        if (self.signals.received is not None or session.world.distributed) and self._stop_requested():
            self._save_recovery()
            self._raise_if_interrupted()

    def _stop_requested(self) -> bool:
        """Whether any process was told to stop; asked of the others at every tenth update only."""
        if not self.session.world.distributed:
            return self.signals.received is not None
        return self.num_updates % 10 == 0 and self.signals.agreed(self.session.world) is not None

    def _log_line(self, num_batches: int, pace: Pace) -> None:
        session = self.session
        means = self.meters.means(session.world.distributed)
        peaks = self.meters.peaks(session.world.distributed)
        if not session.world.primary:
            return
        lr = sum(group["lr"] for group in session.optimizer.param_groups) / len(session.optimizer.param_groups)
        own = f"  TWEO: {means['tweo_loss']:#.3g}  Peak: {max(peaks):#.3g}" if peaks else ""
        _logger.info(
            "Train: %d [%4d/%d (%3.0f%%)]  Loss: %#.3g%s  %s  LR: %.3e",
            self._epoch,
            self._batch,
            num_batches,
            100 * self._batch / num_batches,
            means["loss"],
            own,
            pace.text(session.world.size),
            lr,
        )
        if self.journal is not None:
            values = {"step/loss": means["loss"], "step/tweo_loss": means["tweo_loss"], "step/lr": lr}
            if peaks:
                values["step/peak_abs"] = max(peaks)
            self.journal.scalars(values, self.num_updates)

    # --------------------------------------------------------------------------------------------------- validation

    def _validate(self, epoch: int, last_epoch: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Evaluate the model, or its EMA where there is one, and describe every block."""
        session, options = self.session, self.session.options
        peaks = self.meters.peaks(session.world.distributed)
        rows: list[dict[str, Any]] = [
            {"epoch": epoch, "block": name, "train_peak_abs": peak}
            for name, peak in zip(session.block_names, peaks, strict=True)
        ]
        if (epoch + 1) % options.val_interval and epoch + 1 != last_epoch:
            return {}, rows
        recorder = session.recorder
        metrics = evaluate(session, session.task.get_eval_model(), recorder, "Test")
        if session.task.has_ema() and not options.model_ema_force_cpu:
            recorder = session.ema_recorder
            metrics = evaluate(session, session.task.get_eval_model(ema=True), recorder, "Test (EMA)")
        if recorder is not None:
            summary = recorder.summary()
            metrics["peak_abs"] = summary["peak_abs"]
            for row, block in zip(rows, summary["blocks"], strict=True):
                row |= {f"eval_{key}": value for key, value in block.items() if key not in ("name", "count")}
        return metrics, rows
