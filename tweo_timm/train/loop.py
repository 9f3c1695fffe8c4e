"""The training loop: epochs of updates, validation, records and checkpoints, continued exactly where it was left."""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path
from typing import Any

import torch
from timm.utils import distribute_bn, unwrap_model
from torch import Tensor

from tweo_timm.config import AUTO
from tweo_timm.records import append_rows
from tweo_timm.run.checkpoint_file import CheckpointFile
from tweo_timm.run.class_names import KEY, check_same_names, names_by_index, recorded_names
from tweo_timm.run.progress import ProgressLine
from tweo_timm.train.build import Session
from tweo_timm.train.checkpoint import EXACT_KEY, LAST, AtomicSaver, exact_state, restore, training_state
from tweo_timm.train.exact import Cursor, capture_exact, put_back_statistics, restore_exact
from tweo_timm.train.folder import RunFolder
from tweo_timm.train.health import HealthWatch
from tweo_timm.train.journal import Journal
from tweo_timm.train.meters import EpochMeters, Pace, block_columns
from tweo_timm.train.options import changed_settings
from tweo_timm.train.replay import Position, RandomState
from tweo_timm.train.signals import Interrupted, SignalWatch
from tweo_timm.train.step import TrainStep
from tweo_timm.train.validation import evaluate

_logger = logging.getLogger(__name__)


class Trainer:
    """Trains a session to its end, from its beginning or from a checkpoint.

    Args:
        session: the built run.
        signals: notices SIGTERM and SIGINT.
    """

    def __init__(self, session: Session, signals: SignalWatch) -> None:
        self.session = session
        self.signals = signals
        self.cursor = Cursor(epoch=session.options.start_epoch or 0)
        names, device = session.block_names, session.world.device
        self.meters = EpochMeters(names, device, session.train_recorder)
        trained = session.task.get_trainable_module()
        self.health = HealthWatch(trained, names, device, session.options.stop_on_peak)
        self.step = TrainStep(session, self.cursor, self.meters, self.health, self._check_at_once)
        self.folder: RunFolder | None = None
        self.saver: AtomicSaver | None = None
        self.journal: Journal | None = None
        self._entry: Position | RandomState | None = None
        self._remembers = False  # whether the learning rates are those of the checkpoint
        self._statistics: dict[str, dict[str, Tensor]] = {}

    # ------------------------------------------------------------------------------------- what was, and what is kept

    def resume(self, file: CheckpointFile) -> None:
        """Continue from a checkpoint: exactly from one of ours, at the next epoch from one of timm's.

        With --no-resume-opt it gives its weights alone, with --start-epoch all but its position.

        Args:
            file: what was read.

        Raises:
            ValueError: if it is of another model or run, or holds what no run writes.
        """
        session, options, before = self.session, self.session.options, file.args
        check_same_names(
            recorded_names(file.fields.mapping),
            names_by_index(session.data.class_names),
            f"checkpoint {file.path}",
            "name the folders as they were, or give the same --class-map; --initial-checkpoint begins anew from its "
            "weights",
        )
        optimizer = None if options.no_resume_opt else session.optimizer
        opt = before.get("opt", options.opt)
        if optimizer is not None and str(opt).lower() != options.opt.lower():
            raise ValueError(
                f"checkpoint {file.path} was written under --opt {opt}, whose state --opt {options.opt} cannot use: "
                "go on with that one, or begin without its state by --no-resume-opt"
            )
        exact = exact_state(file)
        if optimizer is None or options.start_epoch is not None:
            exact = None
        self._remembers = options.sched == "plateau" and exact is not None and exact.has("plateau")
        epoch = restore(file, session.task, optimizer, session.scaler, self._remembers)
        changed = changed_settings(before, options) if exact_state(file) is not None else ""
        if changed:
            _logger.warning("%s was written under other settings: %s", file.path, changed)
        self.step.restored = CheckpointFile(file.path, {}) if optimizer is not None else None
        if exact is not None:
            self._entry, self._statistics = restore_exact(file, exact, session, self.cursor, self.meters)
            how = "under other settings" if changed else "exactly"
            _logger.info("Resumed %s %s: epoch %d, batch %d", file.path, how, self.cursor.epoch, self.cursor.batch)
            return
        self.cursor.epoch = options.start_epoch if options.start_epoch is not None else epoch
        _logger.info("Resumed weights from %s; going on with epoch %d", file.path, self.cursor.epoch)

    def open_folder(self, run_folder: RunFolder, args: argparse.Namespace, resumed: CheckpointFile | None) -> None:
        """Begin to write: checkpoints and records. Only for the primary process.

        Args:
            run_folder: the run's.
            args: the options as plain values, stored in every checkpoint as timm does.
            resumed: the checkpoint that the run continues from, if it lies in this folder.
        """
        session, options = self.session, self.session.options
        self.folder, folder = run_folder, run_folder.path
        self.saver = AtomicSaver(folder, args, decreasing=session.falling_metric, max_history=options.checkpoint_hist)
        if resumed is not None:
            self.saver.take_over(resumed)
            if resumed.path.name == LAST:
                self._keep_milestone(self.cursor.epoch)
        names = session.task.create_evaluator().metric_names if session.data.val is not None else ()
        self.journal = Journal(
            folder, self.cursor.epoch, self._updates_at_start(), names, options.tensorboard, self._wandb(folder)
        )

    def _updates_at_start(self) -> int:
        return self.cursor.updates if self.cursor.batch else self.cursor.epoch * self.session.updates_per_epoch

    def _wandb(self, folder: Path) -> Any:
        options = self.session.options
        if not options.log_wandb:
            return None
        import wandb  # type: ignore[import-not-found]

        return wandb.init(
            project=options.wandb_project,
            name=folder.name,
            config=vars(self.saver.args) if self.saver is not None else None,
            tags=options.wandb_tags,
            resume="must" if options.wandb_resume_id else None,
            id=options.wandb_resume_id or None,
        )

    def _content(self, position: Position | None = None) -> dict[str, Any]:
        """What a checkpoint holds at this point. A collective."""
        session = self.session
        exact = capture_exact(session, self.cursor, self.meters, position)
        names = names_by_index(session.data.class_names)
        return {**training_state(session.task, session.optimizer, session.scaler), EXACT_KEY: exact, KEY: names}

    def _require_folder(self) -> None:
        if self.folder is not None:
            self.folder.require()

    def _save_recovery(self, epoch: int, position: Position | None = None) -> None:
        """Write a checkpoint that the ranking knows nothing of."""
        self._check_weights()
        self._require_folder()
        content = self._content(position)
        if self.saver is not None:
            # Counted in batches: a stream may end before the updates that it announced. None of the next epoch: all.
            done = math.ceil(self.cursor.batch / self.session.options.grad_accum_steps)
            done = done or self.session.updates_per_epoch
            with self.saver.holding(content):
                self.saver.save_recovery(epoch, done)

    def _save_epoch(self, epoch: int, metric: float | None) -> None:
        """Write the checkpoint of a finished epoch: ranked if it was validated, for recovery otherwise."""
        self.cursor.epoch, self.cursor.batch = epoch + 1, 0
        if metric is None:
            self._save_recovery(epoch)
            return
        content = self._content()
        self._require_folder()
        if self.saver is not None:
            with self.saver.holding(content):
                self.saver.save_checkpoint(epoch, metric=metric)
            self._keep_milestone(epoch + 1)

    def _keep_milestone(self, epochs: int) -> None:
        if self.saver is not None and epochs in (self.session.options.save_epochs or ()):
            self.saver.save_milestone(epochs)

    def _check_weights(self) -> None:
        """Stop the run if anything was wrong, or weights are that are to be validated or written. A collective."""
        self.health.note_weights(self.cursor.updates - 1)
        self.health.check(self.session.world, self._last_good())

    def _check_at_once(self) -> None:
        """Stop the run if anything was wrong, where to ask does not wait: on a CPU, by a process on its own."""
        world = self.session.world
        if world.device.type == "cpu" and not world.distributed:
            self.health.check(world, self._last_good())

    def _last_good(self) -> str:
        return self.saver.last_good if self.saver is not None else "see the first process"

    # --------------------------------------------------------------------------------------------------------- epochs

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch.

        Returns:
            best_metric and best_epoch, and epochs: the metrics of each that was ranked, the best first.

        Raises:
            TrainingStopped: for a loss, an activation or a gradient that is not finite, or above --stop-on-peak.
            Interrupted: after SIGTERM or SIGINT, when the state has been saved.
        """
        session = self.session
        last_epoch = min(session.num_epochs, session.options.stop_epoch or session.num_epochs)
        if self.cursor.epoch >= last_epoch:
            _logger.info(
                "Already finished: %d of %d epochs are done. To go on, give more --epochs", last_epoch, last_epoch
            )
        self.set_off()
        rows = []
        for epoch in range(self.cursor.epoch, last_epoch):
            rows.append(self._epoch(epoch, last_epoch))
            self._raise_if_interrupted()
        if self.journal is not None:
            self.journal.close()
        saver = self.saver
        if saver is not None and not session.options.recovery_interval:
            saver.forget_recovery_files()
        best = (saver.best_metric, saver.best_epoch) if saver is not None else (None, None)
        return {"best_metric": best[0], "best_epoch": best[1], "epochs": self._best_first(rows, last_epoch)}

    def _best_first(self, rows: list[dict[str, Any]], last_epoch: int) -> list[dict[str, Any]]:
        name = "loss" if self.session.data.val is None else self.session.options.eval_metric
        ranked = [row for row in rows if self._is_validated(row["epoch"] + 1, last_epoch)]
        return sorted(
            ranked, key=lambda row: row.get("validation", row["train"])[name], reverse=not self.session.falling_metric
        )

    def set_off(self) -> None:
        """Bring schedule, counters and random state to where the first epoch begins."""
        session, cursor = self.session, self.cursor
        if self._entry is None:
            cursor.updates = cursor.epoch * session.updates_per_epoch
        if session.scheduler is not None and not self._remembers:
            # The rates of a checkpoint are those of the schedule it was written under, which may be another one.
            if cursor.epoch:
                session.scheduler.step(self._scheduled(cursor.epoch))
            if cursor.updates:
                session.scheduler.step_update(cursor.updates)
        put_back_statistics(session, self._statistics)
        self._statistics = {}
        if isinstance(self._entry, RandomState):
            self._entry.restore()
            self._entry = None

    def _scheduled(self, epoch: int) -> int:
        """The epoch by which a schedule finds its rate; plateau without memory begins at the end of its warm-up."""
        warmup = self.session.options.warmup_epochs
        return min(epoch, warmup) if self.session.options.sched == "plateau" and warmup else epoch

    def _epoch(self, epoch: int, last_epoch: int) -> dict[str, Any]:
        session = self.session
        train = self.train_epoch(epoch)
        rows = self.meters.rows(epoch, session.world.distributed)
        if rows:
            train["peak_abs"] = max(row["train_peak_abs"] for row in rows)
        val = self._validate(epoch, last_epoch, rows)
        metric = val.get(session.options.eval_metric)
        if session.data.val is None and self._is_validated(epoch + 1, last_epoch):
            metric = train["loss"]
        lr = self._lr()
        if session.scheduler is not None:
            session.scheduler.step(epoch + 1, metric)
        self._require_folder()
        if self.journal is not None:
            updates = self.cursor.updates
            self.journal.epoch(epoch, train, val, lr, updates, listed=self._is_validated(epoch + 1, last_epoch))
            self.journal.blocks(rows, updates)
            recorders = {"train": session.train_recorder, "eval": session.ema_recorder or session.recorder}
            for label, recorder in recorders.items():
                if recorder is not None:
                    self.journal.histograms(label, recorder.stats, updates)
        self._save_epoch(epoch, metric)
        return {"epoch": epoch, "train": train} | ({"validation": val} if val else {})

    def _lr(self) -> float:
        groups = self.session.optimizer.param_groups
        return float(sum(group["lr"] for group in groups) / len(groups))

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch, or what is left of it.

        Returns:
            loss, task_loss and tweo_loss: means over the samples of all processes.
        """
        session, options, world = self.session, self.session.options, self.session.world
        cursor, data = self.cursor, self.session.data
        entry, self._entry = self._entry, None
        if not isinstance(entry, Position):
            entry = None
            self.meters.reset()
        cursor.epoch, cursor.batch = epoch, entry.batch if entry is not None else 0
        if cursor.batch:
            _logger.info("Reading the %d batches of epoch %d that were used already", cursor.batch, epoch)
        data.start_epoch(epoch, options.mixup_off_epoch)
        data.replay.enter_at(entry)
        session.task.get_trainable_module().train()
        session.optimizer.zero_grad()
        num_batches = len(data.train)
        pace = Pace()
        with ProgressLine(f"epoch {epoch}", num_batches - cursor.batch, world.primary) as bar:
            for images, targets in data.batches():
                pace.loaded()
                self.step(images, targets)
                pace.trained(len(targets))
                bar.advance()
                self._after_batch(images, num_batches, pace)
        if cursor.batch < num_batches:
            last = f"; its last update is of {self.step.waiting} instead of {options.grad_accum_steps}"
            _logger.warning(
                "The training data ended after %d of %d batches%s: give fewer --workers, or exact lengths",
                *(cursor.batch, num_batches, last if self.step.waiting else ""),
            )
        if options.grad_accum_steps > 1:
            self.step.finish_group()
        self._synchronise_lookahead()
        self._check_weights()
        self._share_batch_norm()
        return self.meters.means(world.distributed) | self.meters.balance()

    def _synchronise_lookahead(self) -> None:
        """Take the weights half the way back to Lookahead's slow ones, as timm's train.py means to.

        timm passes over parameters without a gradient, and after an update there are none: zeros stand for them.
        """
        optimizer = self.session.optimizer
        if not hasattr(optimizer, "sync_lookahead"):
            return
        for parameter in self.session.inner_optimizer.state:  # of each that was updated
            parameter.grad = torch.zeros_like(parameter)
        optimizer.sync_lookahead()
        optimizer.zero_grad()

    def _share_batch_norm(self) -> None:
        session, options = self.session, self.session.options
        if not session.world.distributed or options.dist_bn not in ("broadcast", "reduce"):
            return
        models = [session.task.get_eval_model()]
        if session.task.has_ema() and not options.model_ema_force_cpu:
            models.append(session.task.get_eval_model(ema=True))
        for model in models:
            distribute_bn(unwrap_model(model), session.world.size, options.dist_bn == "reduce")

    def _after_batch(self, images: Tensor, num_batches: int, pace: Pace) -> None:
        """What happens between two batches: log lines, health, recovery checkpoints, signals."""
        options, world, cursor = self.session.options, self.session.world, self.cursor
        logs = cursor.batch % (options.log_interval * options.grad_accum_steps) == 0 or cursor.batch == num_batches
        if logs:
            self.health.check(world, self._last_good())
            self._log_line(num_batches, pace)
            if options.save_images and self.saver is not None:
                self._save_images(images)
        if cursor.batch % options.grad_accum_steps and cursor.batch < num_batches:
            return
        if self.journal is not None and self.step.fp8_rows:
            self._require_folder()
            append_rows(self.journal.health, self.step.fp8_rows)
        if cursor.batch == num_batches:
            return
        interval = options.recovery_interval
        if interval and cursor.batch // options.grad_accum_steps % interval == 0:
            self._save_recovery(cursor.epoch)
        if self._stop_requested():
            self._save_recovery(cursor.epoch)
            self._raise_if_interrupted()

    def _stop_requested(self) -> bool:
        """Whether any process was told to stop; the others are asked at every tenth update only."""
        if not self.session.world.distributed:
            return self.signals.received is not None
        return self.cursor.updates % 10 == 0 and self.signals.agreed(self.session.world) is not None

    def _raise_if_interrupted(self) -> None:
        number = self.signals.agreed(self.session.world)
        if number is not None:
            raise Interrupted(number)

    def _log_line(self, num_batches: int, pace: Pace) -> None:
        world = self.session.world
        means = self.meters.means(world.distributed)
        samples, peaks = self.meters.samples(world.distributed), self.meters.peaks(world.distributed)
        if not world.primary:
            return
        own = f"  TWEO: {means['tweo_loss']:#.3g}  Peak: {max(peaks):#.3g}" if peaks else ""
        balance = self.meters.balance()
        if self.session.options.tweo_weight == AUTO:
            own += f"  Weight: {balance['tweo_weight']:#.3g}"
        if balance["tweo_weight"] and not math.isnan(balance["tweo_grad_ratio"]):
            own += f"  Gradients: {balance['tweo_grad_ratio']:#.3g}"
        _logger.info(
            "Train: %d [%4d/%d (%3.0f%%)]  Loss: %#.3g%s  %s  LR: %.3e",
            self.cursor.epoch,
            self.cursor.batch,
            num_batches,
            100 * self.cursor.batch / num_batches,
            means["loss"],
            own,
            pace.text(world.size),
            self._lr(),
        )
        if self.journal is not None:
            values = {"step/loss": means["loss"], "step/tweo_loss": means["tweo_loss"], "step/lr": self._lr()}
            values |= {f"step/{name}": value for name, value in balance.items()}
            if peaks:
                values["step/peak_abs"] = max(peaks)
            self.journal.scalars(values, self.cursor.updates)
            self._require_folder()
            self.journal.log_line(self.cursor.epoch, samples, means, self.cursor.updates)

    def _save_images(self, images: Tensor) -> None:
        from torchvision.utils import save_image  # type: ignore[import-untyped]

        assert self.journal is not None
        self._require_folder()
        name = f"train-batch-{self.cursor.epoch}-{self.cursor.batch}.jpg"
        path = self.journal.folder / name
        path.unlink(missing_ok=True)  # a link there would lead the picture elsewhere
        save_image(images, path, padding=0, normalize=True)

    # ----------------------------------------------------------------------------------------------------- validation

    def _is_validated(self, done: int, last_epoch: int) -> bool:
        """Whether a validation follows when so many epochs are done: as scheduled, for a milestone, at the end."""
        options = self.session.options
        return done % options.val_interval == 0 or done == last_epoch or done in (options.save_epochs or ())

    def _validate(self, epoch: int, last_epoch: int, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Evaluate the model, or its EMA where there is one, and describe every block in `rows`."""
        session, options = self.session, self.session.options
        if session.data.val is None or not self._is_validated(epoch + 1, last_epoch):
            return {}
        position = session.data.replay.position(self.cursor.batch)
        # A run that goes on after --stop-epoch draws what it would have drawn without the stop.
        unscheduled = RandomState.capture() if (epoch + 1) % options.val_interval else None
        try:
            recorder = session.recorder
            metrics = evaluate(session, session.task.get_eval_model(), recorder, "Test", self.signals)
            if session.task.has_ema() and not options.model_ema_force_cpu:
                recorder = session.ema_recorder
                averaged = session.task.get_eval_model(ema=True)
                metrics = evaluate(session, averaged, recorder, "Test (EMA)", self.signals, session.ema_dtype)
        except Interrupted:
            self._save_recovery(epoch, position)
            raise
        if unscheduled is not None:
            unscheduled.restore()
        if recorder is not None:
            summary = recorder.summary()
            metrics["peak_abs"] = summary["peak_abs"]
            for row, block in zip(rows, summary["blocks"], strict=True):
                row |= block_columns("eval", block)
        return metrics
