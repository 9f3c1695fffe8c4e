"""One pass over the validation split: accuracy, which images were right, and whatever watches the activations."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator
from torch import Tensor

from tweo_timm.evaluate.compare import packed
from tweo_timm.evaluate.images import Images
from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.run.dataset import place
from tweo_timm.run.passes import batches
from tweo_timm.run.progress import ProgressLine
from tweo_timm.run.world import World

_logger = logging.getLogger(__name__)

NO_CLASSES = "the model has no head, so there are no classes to score"


@dataclass
class Score:
    """The outcome of one pass.

    Attributes:
        metrics: loss, top1 and top5, percent; with --metrics-avg macro, say, macro_precision, macro_recall and
            macro_f1_score. With --task multilabel loss, map, micro_f1, macro_f1 and sample_f1. All None where logits
            are not finite: the largest of what is no number is no guess, and timm's validate.py counts it as one.
        correct: whether each image's first guess was right, in the dataset's order, bool (N,); with ReaL labels, of
            the images that have any; with several labels, whether all of them were right.
        not_finite: how many images have logits that are not finite.
        unscored: why there is nothing to score; None where there is.
    """

    metrics: dict[str, float | None]
    correct: Tensor
    not_finite: int = 0
    unscored: str | None = None

    @property
    def count(self) -> int:
        """How many images were scored."""
        return int(self.correct.numel())

    def fields(self) -> dict[str, Any]:
        """The fields of `Scored` that it knows: the metrics, one bit per image, how many have no finite logits."""
        correct = None if self.not_finite or self.unscored else packed(self.correct)
        return {
            **self.metrics,
            "correct": correct,
            "not_finite": self.not_finite or None,
            "unscored": self.unscored,
        }


@torch.inference_mode()
def score(model: Callable[[Tensor], Any], images: Images, options: ValidateOptions, world: World, label: str) -> Score:
    """Run a model over the split.

    Args:
        model: takes (B, C, H, W) and returns logits (B, classes).
        images: the split.
        options: precision, label spaces and metrics.
        world: device and rank.
        label: for the progress line.
    """
    several = options.task == "multilabel"
    evaluator = (
        MultiLabelClassificationEvaluator(device=world.device, threshold=options.multilabel_threshold)
        if several
        else ClassificationEvaluator(device=world.device)
    )
    keep = None if images.valid_labels is None else torch.tensor(images.valid_labels, device=world.device)
    real_labels = images.real_labels() if images.real_labels is not None else None
    guesses: list[Tensor] = []
    truths: list[Tensor] = []
    finite: list[Tensor] = []
    with ProgressLine(label, len(images.loader), world.primary) as bar:
        share = batches(images.loader, lambda batch: place(batch, options, world.device))
        for number, (batch, targets, real) in enumerate(share, start=1):
            if not real:
                continue
            with _autocast(options, world):
                output = model(batch)
            logits = output[0] if isinstance(output, (tuple, list)) else output
            logits = logits.float() if keep is None else logits.float()[:, keep]
            logits = logits if images.classes else logits.flatten(1)
            if real_labels is not None:
                real_labels.add_result(logits)
            finite.append(logits.isfinite().all(-1))
            if images.classes:
                evaluator.update(logits, targets)
            guesses.append(logits.sigmoid() >= options.multilabel_threshold if several else logits.argmax(-1))
            truths.append(targets >= 0.5 if several else targets)
            bar.advance()
            if images.classes and number % options.log_freq == 0:
                running = "  ".join(f"{name} {value:.4g}" for name, value in evaluator.summary().items())
                _logger.info("%s: [%4d/%d]  %s", label, number, len(images.loader), running)
    guess, truth, sound = (_in_order(torch.cat(parts), world) for parts in (guesses, truths, finite))
    correct = (guess == truth).view(len(guess), -1).all(-1)
    if not images.classes:
        return Score(dict.fromkeys(("loss", "top1", "top5")), correct, int((~sound).sum()), NO_CLASSES)
    metrics: dict[str, float | None] = dict(evaluator.compute(distributed=world.distributed))
    if real_labels is not None:
        metrics |= {f"top{k}": real_labels.get_accuracy(k=k) for k in (1, 5)}
        correct = torch.tensor(real_labels.is_correct[1])
    if options.metrics_avg:
        metrics |= _averaged(guess, truth, options.metrics_avg)
    if not sound.all():
        return Score(dict.fromkeys(metrics), correct, int((~sound).sum()))
    return Score(metrics, correct)


def _autocast(options: ValidateOptions, world: World) -> contextlib.AbstractContextManager[Any]:
    if not options.amp:
        return contextlib.nullcontext()
    return torch.autocast(device_type=world.device.type, dtype=getattr(torch, options.amp_dtype))


def _in_order(values: Tensor, world: World) -> Tensor:
    """Bring the values of all processes into the dataset's order: process r holds every world.size-th, from r on."""
    if not world.distributed:
        return values.cpu()
    parts: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(parts, values.cpu())
    whole = torch.empty(sum(len(part) for part in parts), *values.shape[1:], dtype=values.dtype)
    for rank, part in enumerate(parts):
        whole[rank :: world.size] = part
    return whole


def _averaged(guess: Tensor, truth: Tensor, average: str) -> dict[str, float | None]:
    try:
        from sklearn.metrics import precision_recall_fscore_support
    except ImportError as error:
        raise ValueError(f"--metrics-avg needs scikit-learn ({error}): pip install scikit-learn") from error
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth.numpy(), guess.numpy(), average=average, zero_division=0
    )
    found = {"precision": precision, "recall": recall, "f1_score": f1}
    return {f"{average}_{name}": 100 * float(value) for name, value in found.items()}
