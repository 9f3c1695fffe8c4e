"""attach_tweo: add the TWEO penalty to any timm training task, without wrapping it.

A task is an nn.Module whose forward returns a dict with a `loss`. A hook before it, a hook after it and a hook on each
transformer block of the model that is trained are all that is needed: checkpoints, EMA, DDP, compilation, distillation
and timm's own train.py see the task they know. (A wrapper would have to forward some 14 methods, a criterion wrapper
would get the wrong weight under distillation.) A bare model in another loop takes `Tweo` (penalty.py).
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from tweo_timm.balance import Balance, Norms, gradient_norms
from tweo_timm.config import TweoConfig
from tweo_timm.measurement import Measurement, Scheduled

_logger = logging.getLogger(__name__)


def attach_tweo(task: TrainingTask, config: TweoConfig, blocks: str | None = None) -> TweoHandle:
    """Add `weight * L_TWEO` to the loss of a timm training task.

    In training, the dict that the task returns gains `task_loss` (what the task alone returned), `tweo_loss` (L_TWEO,
    unweighted), `tweo_weight` (float; a scalar tensor where gradients decide it) and `peak_abs` (max |A| over all
    blocks), all detached; `loss` is their sum.
    Without gradients or with the model in eval mode the task's result is passed on untouched. A weight of 0 measures,
    and leaves the loss bit for bit as it was.

    Args:
        task: any timm TrainingTask, on its device, before compile() and prepare_distributed(). In distillation the
            student is the model that is trained.
        config: the penalty and its schedule. Unless the schedule is constant, call `handle.set_progress` every update.
        blocks: regular expression naming the blocks by hand; None finds them by structure.

    Returns:
        A handle with `.remove()`, `.set_progress(fraction)` and `.block_peaks`.

    Raises:
        ValueError: if the model has no transformer blocks, or the task has TWEO already.
        RuntimeError: if the model checkpoints activations with reentrant checkpoints, in which a penalty gets no
            gradient.
    """
    return TweoHandle(task, config, blocks)


class TweoHandle(Scheduled):
    """The TWEO term attached to a task; made by `attach_tweo`.

    Attributes:
        config: the TweoConfig in force.
        block_names: names of the blocks, in forward order.
        block_peaks: max |A| of each block in the latest training step, float32 (L,) on the device; 0 for blocks in
            eval mode; None before the first step.
        balance: what lowers the weight, with `config.balance`; else None.
        grad_ratio: the norm of the weighted penalty's gradient over that of the task's, float32 scalar on the device,
            in the latest step that `measure_gradients` asked for; None before.
        apart: makes the context of the extra backward passes that find gradients; it is to undo what else they do.
    """

    def __init__(self, task: TrainingTask, config: TweoConfig, blocks: str | None = None) -> None:
        if not isinstance(task, TrainingTask):
            raise TypeError(
                f"attach_tweo takes a timm TrainingTask, not a {type(task).__name__}; for a bare model in a loop of "
                "your own use Tweo(model, config), and add its penalty() to the loss"
            )
        if _is_attached(task):
            raise ValueError(
                "this task has TWEO attached already: call remove() on the first handle before attaching again"
            )
        super().__init__(config)
        self.block_peaks: Tensor | None = None
        self.balance = Balance(config.balance) if config.balance else None
        self.grad_ratio: Tensor | None = None
        self.apart: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self._is_asked = False
        self._model: nn.Module = unwrap_model(task.get_eval_model())
        self._measurement = Measurement(self._model, config, blocks)
        self.block_names = self._measurement.names
        self._handles = self._hook_task(task)
        acts = config.weight > 0 or config.end_weight > 0
        _logger.info(
            "%s %d blocks, %s to %s%s",
            "TWEO on" if acts else "No penalty: L_TWEO and peaks are measured only, on",
            len(self.block_names),
            self.block_names[0],
            self.block_names[-1],
            f": {config}" if acts else "",
        )

    def measure_gradients(self) -> None:
        """Find `grad_ratio` in the coming step, by two more backward passes; the step itself is as it would be.

        Nothing is found where the penalty has no weight. Not for compiled or sharded models, whose graphs allow one
        backward pass only.
        """
        self._is_asked = True

    def remove(self) -> None:
        """Take every hook off the task and its blocks; a second call does nothing."""
        self._measurement.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook_task(self, task: TrainingTask) -> list[Any]:
        warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is not task:
                if module.training and torch.is_grad_enabled() and not _is_attached(module) and module not in warned:
                    warned.add(module)
                    _logger.warning("A copy of a task trains without TWEO: hooks are not copied, attach_tweo(copy) too")
                return
            if self._measurement.open(self._weight > 0):
                _refuse_padding((*args, *kwargs.values()))
                self._require_progress()

        def after(module: nn.Module, args: Any, result: Any) -> Any:
            return self._finish(result) if module is task else result

        before.tweo = task  # type: ignore[attr-defined]
        return [task.register_forward_pre_hook(before, with_kwargs=True), task.register_forward_hook(after)]

    def _finish(self, result: dict[str, Any]) -> dict[str, Any]:
        found = self._measurement.close()
        if found is None:
            return result
        self.block_peaks = found.peaks
        acting, task_loss = self._weight > 0, result["loss"]
        weight = self._found_weight(task_loss, found.tweo) if acting else self._weight
        if self._is_asked:  # no penalty, no gradient of it
            self.grad_ratio, self._is_asked = None, False
        values = {
            # A copy where it is the loss itself: training loops divide that in place when they accumulate gradients.
            "task_loss": task_loss.detach() if acting else task_loss.detach().clone(),
            "tweo_loss": found.tweo.detach(),
            "tweo_weight": weight,
            "peak_abs": found.peaks.amax(),
        }
        if isinstance(weight, Tensor):
            values["loss"] = task_loss + weight * found.tweo
        elif acting:
            values["loss"] = torch.add(task_loss, found.tweo, alpha=weight)
        return {**result, **values}

    def _found_weight(self, task_loss: Tensor, tweo: Tensor) -> float | Tensor:
        """The weight of this step, from the gradients where they decide it, which are measured now and then."""
        asked, self._is_asked = self._is_asked, False
        due = self.balance is not None and self.balance.due()
        norms = self._norms(task_loss, tweo) if asked or due else None
        if norms is not None and due and self.balance is not None:
            self.balance.note(norms)
        weight = self._weight if self.balance is None else self.balance.weight(self._weight)
        if norms is not None and asked:
            self.grad_ratio = weight * norms.penalty / norms.task
        return weight

    def _norms(self, task_loss: Tensor, tweo: Tensor) -> Norms:
        """The norms of both gradients, as one process with the batches of all would find them."""
        together = dist.is_available() and dist.is_initialized()
        with self.apart():
            return gradient_norms(task_loss, tweo, self._model.parameters(), _average if together else None)


def _average(gradient: Tensor) -> Tensor:
    """The mean of a gradient over the processes."""
    total = gradient.contiguous().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _is_attached(task: nn.Module) -> bool:
    """Whether a task has TWEO of its own: deepcopy gives a copy the hooks of its original, which do nothing there."""
    return any(getattr(hook, "tweo", None) is task for hook in task._forward_pre_hooks.values())


def _refuse_padding(values: tuple[Any, ...]) -> None:
    if any(isinstance(value, dict) for value in values):
        raise RuntimeError(
            "TWEO's mean would count the padding tokens of a NaFlex batch: train NaFlexViT on plain image tensors, "
            "without --naflex-loader"
        )
