"""Validation inside a training run: accuracy by timm's evaluator, activations by the recorder, in one pass."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from timm.task.evaluator import evaluation_sample_limit
from torch.nn.parallel import DistributedDataParallel

from tweo_timm.outliers import OutlierRecorder
from tweo_timm.run.passes import batches
from tweo_timm.run.progress import ProgressLine
from tweo_timm.train.build import Session
from tweo_timm.train.signals import Interrupted, SignalWatch

_logger = logging.getLogger(__name__)


@torch.no_grad()
def evaluate(
    session: Session,
    model: Any,
    recorder: OutlierRecorder | None,
    label: str,
    signals: SignalWatch,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Run a model over the validation split.

    Args:
        session: the run: data, device, precision, and the task that knows how to score.
        model: what to evaluate: the trained model or its EMA.
        recorder: counts that model's block outputs anew; None without blocks.
        label: for the log.
        signals: a signal ends the pass where there is one process; several finish it together.
        dtype: of the images; None is that of the trained model.

    Returns:
        The evaluator's metrics: loss, top1 and top5 in percent for single labels.

    Raises:
        Interrupted: by such a signal.
    """
    world = session.world
    if isinstance(model, DistributedDataParallel):
        model = model.module  # its collectives would wait for processes with fewer batches
    evaluator = session.task.create_evaluator(max_samples=evaluation_sample_limit(session.data.val))
    model.eval()
    if recorder is not None:
        recorder.reset()
    recording = recorder.recording() if recorder is not None else contextlib.nullcontext()
    with recording, ProgressLine(label, len(session.data.val), world.primary) as bar:
        for images, targets, real in batches(session.data.val, lambda images: session.place(images, dtype)):
            if recorder is not None:
                recorder.armed = real > 0
            with session.autocast():
                output = model(images)
            evaluator.update(output[0] if isinstance(output, (tuple, list)) else output, targets)
            bar.advance()
            if signals.received is not None and not world.distributed:
                raise Interrupted(signals.received)
    metrics = dict(evaluator.compute(distributed=world.distributed))
    if recorder is not None:
        recorder.gather()
    _logger.info("%s: %s", label, "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return metrics
