"""One micro-batch of training: forward, backward, and the update that completes a group of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from tweo_timm.fp8.health import Fp8HealthMonitor
from tweo_timm.fp8.patch import check_fp8_ran
from tweo_timm.run.checkpoint_file import CheckpointFile
from tweo_timm.train.build import Session
from tweo_timm.train.exact import Cursor
from tweo_timm.train.health import HealthWatch
from tweo_timm.train.meters import EpochMeters


class TrainStep:
    """Trains on micro-batches and moves the cursor.

    With --fp8-health-interval, `fp8_rows` holds the rows of the latest update; empty unless it was measured.

    A group holds `grad_accum_steps` micro-batches, the last group of an epoch what is left. Each is weighed by its
    group's size, so that the update is that of the one large batch. A group that the data did not complete, because a
    stream was shorter than announced, is weighed anew when it is known to be one: see `finish_group`.

    Args:
        session: the run.
        cursor: where it is; moved on by every call.
        meters: counts every micro-batch.
        health: watches losses, activations and gradients.
        check: called before a backward pass and before an update, to stop a run that went wrong: an update by the
            gradients of a loss that is not finite breaks every weight, and hides which was broken first.
    """

    def __init__(
        self,
        session: Session,
        cursor: Cursor,
        meters: EpochMeters,
        health: HealthWatch,
        check: Callable[[], None],
    ) -> None:
        self.session = session
        self.cursor = cursor
        self.meters = meters
        self.health = health
        self._check = check
        self._num_batches = len(session.data.train)
        self._num_updates = session.updates_per_epoch * session.num_epochs
        self._second_order = session.second_order
        self.fp8_rows: list[dict[str, Any]] = []
        interval = session.options.fp8_health_interval
        watched = session.fp8 is not None and interval > 0 and session.world.primary
        self._fp8_health = Fp8HealthMonitor(session.model) if watched else None
        self._fp8_ran = session.fp8 is None
        self.waiting = 0  # micro-batches of this process that no update has used yet
        self.restored: CheckpointFile | None = None  # whose optimizer state was not used yet

    def __call__(self, images: Tensor, targets: Tensor) -> None:
        """Train on one micro-batch; the last one of its group updates the weights.

        Args:
            images: (B, C, H, W).
            targets: (B,) class indices, or (B, classes) dense.
        """
        session, cursor = self.session, self.cursor
        group_size, completes = self._group()
        images, targets = session.place(images), targets.to(session.world.device)
        if session.tweo is not None:
            session.tweo.set_progress(min(cursor.updates / self._num_updates, 1.0))
            if session.gradients_apart and cursor.batch == self._num_batches // 2:
                session.tweo.measure_gradients()
        if self._fp8_health is not None and completes and cursor.updates % session.options.fp8_health_interval == 0:
            self._fp8_health.arm()
        with contextlib.nullcontext() if completes else session.task.no_sync():
            # Only the forward pass is recorded: activation checkpointing repeats it during the backward pass.
            with self._recording(), session.autocast():
                result = session.task(images, targets)
            peaks = session.tweo.block_peaks if session.tweo is not None else None
            self.health.note(cursor.updates, result["loss"], peaks)
            self._check()
            divisor = group_size / session.data.loss_scale(len(targets))
            self._backward(result["loss"] if divisor == 1 else result["loss"] / divisor, completes)
        self.meters.update(result, peaks, len(targets))
        self.waiting += 1
        if session.tweo is not None and cursor.batch == self._num_batches // 2:
            self.meters.grad_ratio = session.tweo.grad_ratio
        cursor.batch += 1
        if completes:
            self._after_update()
        if not self._fp8_ran:
            check_fp8_ran(session.model)
            self._fp8_ran = True

    def _group(self) -> tuple[int, bool]:
        """How many micro-batches the present group holds, and whether this one is its last."""
        accumulate = self.session.options.grad_accum_steps
        start = self.cursor.batch - self.cursor.batch % accumulate
        size = self._group_from(start)
        return size, self.cursor.batch + 1 == start + size

    def _group_from(self, start: int) -> int:
        return min(self.session.options.grad_accum_steps, self._num_batches - start)

    def finish_group(self) -> None:
        """Update by the micro-batches of a group that the data did not complete, if there are any. A collective.

        The processes agree on how many there are in all: each of these weighs the same, as in any other update.
        """
        world = self.session.world
        total = sum(world.gather(self.waiting))
        if total == 0:
            return
        self._weigh_anew(total / world.size)
        self._backward(torch.zeros((), device=world.device, requires_grad=True), completes=True)  # adds no gradient
        self._after_update()

    def _weigh_anew(self, number: float) -> None:
        """Make the gradients those of a group of so many micro-batches, on average over the processes."""
        world, planned = self.session.world, self._group_from(self.cursor.batch - self.waiting)
        apart = world.distributed and not self.session.options.fsdp  # DDP exchanges the gradients of whole groups alone
        for parameter in (one for group in self.session.optimizer.param_groups for one in group["params"]):
            if not self.waiting:  # here, but for other processes
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is None:
                continue
            if apart:
                torch.distributed.all_reduce(parameter.grad)
            parameter.grad = parameter.grad * (planned / number / (world.size if apart else 1))

    def _recording(self) -> contextlib.AbstractContextManager[Any]:
        recorder = self.meters.recorder
        return recorder.recording() if recorder is not None and self._is_recorded() else contextlib.nullcontext()

    def _is_recorded(self) -> bool:
        """Whether this micro-batch is one of those of --outlier-interval: the middle one of each interval.

        The first one of the first epoch would show the model before it is trained.
        """
        interval = self.session.options.outlier_interval
        return interval > 0 and self.cursor.batch % interval == min(interval, self._num_batches) // 2

    def _backward(self, loss: Tensor, completes: bool) -> None:
        session, options = self.session, self.session.options
        if session.scaler is not None:
            session.scaler(
                loss,
                session.optimizer,
                clip_grad=options.clip_grad,
                clip_mode=options.clip_mode,
                parameters=self._parameters_to_clip(),
                create_graph=self._second_order,
                need_update=completes,
            )
            return
        loss.backward(create_graph=self._second_order)  # type: ignore[no-untyped-call]
        if completes:
            self._update()

    def _update(self) -> None:
        session, options = self.session, self.session.options
        self.health.note_gradients(self.cursor.updates)
        self._check()
        if options.clip_grad is not None:
            dispatch_clip_grad(self._parameters_to_clip(), options.clip_grad, mode=options.clip_mode)
        # A restored state shows only when it is used whether it holds all that the optimizer needs.
        with self.restored.giving("optimizer") if self.restored is not None else contextlib.nullcontext():
            session.optimizer.step()
        self.restored = None

    def _parameters_to_clip(self) -> Iterable[nn.Parameter]:
        parameters: Iterable[nn.Parameter] = self.session.task.get_clip_parameters(
            exclude_head="agc" in self.session.options.clip_mode
        )
        return parameters

    def _after_update(self) -> None:
        session, cursor = self.session, self.cursor
        session.optimizer.zero_grad()
        self.waiting = 0
        if self._fp8_health is not None:
            self.fp8_rows = list(self._fp8_health.rows(cursor.epoch, cursor.updates))
        cursor.updates += 1
        session.task.update_ema(step=cursor.updates)
        if session.scheduler is not None:
            session.scheduler.step_update(cursor.updates, metric=None)
        if session.options.synchronize_step and session.world.device.type == "cuda":
            torch.cuda.synchronize()
