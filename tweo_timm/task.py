"""attach_tweo: add the TWEO penalty to any timm training task, without wrapping it.

A task is an nn.Module whose forward returns a dict with a `loss`. A hook before it, a hook after it and a hook on each
transformer block of the model that is trained are all that is needed: checkpoints, EMA, DDP, compilation, distillation
and timm's own train.py see the task they know. (A wrapper would have to forward some 14 methods, a criterion wrapper
would get the wrong weight under distillation.)

The penalty of a block is computed in its own hook, not at the end: autograd runs the youngest node first, so the
gradient of block l's penalty is made just before block l needs it, and only one of them is alive at a time.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from timm.layers import use_reentrant_ckpt
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from tweo_timm.blocks import find_blocks
from tweo_timm.config import TweoConfig
from tweo_timm.loss import mean_over_blocks, mean_power
from tweo_timm.tap import BlockTap

_logger = logging.getLogger(__name__)


def attach_tweo(task: TrainingTask, config: TweoConfig, blocks: str | None = None) -> TweoHandle:
    """Add `weight * L_TWEO` to the loss of a timm training task.

    In training, the dict that the task returns gains `task_loss` (what the task alone returned), `tweo_loss` (L_TWEO,
    unweighted), `tweo_weight` (float) and `peak_abs` (max |A| over all blocks), all detached; `loss` is their sum.
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


class _Measured(NamedTuple):
    """What a step keeps of a block's output: its size, max |A| and mean power."""

    name: str
    numel: int
    peak: Tensor
    term: Tensor


class TweoHandle:
    """The TWEO term attached to a task; made by `attach_tweo`.

    Attributes:
        config: the TweoConfig in force.
        block_names: names of the blocks, in forward order.
        block_peaks: max |A| of each block in the latest training step, float32 (L,) on the device; 0 for blocks in
            eval mode; None before the first step.
    """

    def __init__(self, task: TrainingTask, config: TweoConfig, blocks: str | None = None) -> None:
        if any(getattr(hook, "tweo", False) for hook in task._forward_pre_hooks.values()):
            raise ValueError(
                "this task has TWEO attached already: call remove() on the first handle before attaching again"
            )
        self.config = config
        self.block_peaks: Tensor | None = None
        model = unwrap_model(task.get_eval_model())
        self._blocks = find_blocks(model, blocks)
        self.block_names = list(self._blocks)
        self._model = model
        self._refuse_reentrant_checkpoints()
        self._progress: float | None = 0.0 if config.schedule == "constant" else None
        self._weight = config.weight
        self._acting = config.weight > 0
        self._armed = False
        self._seen: list[_Measured] = []
        self._tap = BlockTap(self._blocks, self._observe)
        self._handles = self._hook_task(task)
        acts = config.weight > 0 or config.end_weight > 0
        _logger.info(
            "%s %d blocks, %s to %s%s",
            "TWEO on" if acts else "No TWEO; peaks are watched on",
            len(self._blocks),
            self.block_names[0],
            self.block_names[-1],
            f": {config}" if acts else "",
        )

    @property
    def weight(self) -> float:
        """The weight of the penalty in the coming step."""
        return self._weight

    def set_progress(self, progress: float) -> None:
        """Move the schedule to a point of the training.

        Args:
            progress: fraction of the optimizer updates done, 0 to 1.

        Raises:
            ValueError: if `progress` is outside [0, 1].
        """
        self._weight = self.config.weight_at(progress)
        self._acting = self._weight > 0
        self._progress = progress

    def remove(self) -> None:
        """Take every hook off the task and its blocks; a second call does nothing."""
        self._tap.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._seen.clear()

    def _hook_task(self, task: TrainingTask) -> list[Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is task:
                self._start(args, kwargs)

        def after(module: nn.Module, args: Any, result: Any) -> Any:
            return self._finish(result) if module is task else result

        before.tweo = True  # type: ignore[attr-defined]
        return [task.register_forward_pre_hook(before, with_kwargs=True), task.register_forward_hook(after)]

    def _start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen.clear()
        self._armed = torch.is_grad_enabled() and any([block.training for block in self._blocks.values()])
        if not self._armed:
            return
        for value in (*args, *kwargs.values()):
            if isinstance(value, dict):
                raise RuntimeError(
                    "TWEO's mean would count the padding tokens of a NaFlex batch: train NaFlexViT on plain image "
                    "tensors, without --naflex-loader"
                )
        if self._progress is None:
            raise RuntimeError(
                f"the {self.config.schedule} schedule needs to know where the training is: "
                "call handle.set_progress(updates_done / updates_in_all) before every step"
            )

    def _observe(self, name: str, block: nn.Module, output: Tensor) -> None:
        """Measure one block's output.

        Activation checkpointing repeats the forward during the backward pass and expects the same operations, so an
        output is measured then as well, for nothing: only an armed step keeps what was found.
        """
        if not (block.training and torch.is_grad_enabled()):
            return
        term = mean_power(output if self._acting else output.detach(), self.config)
        seen = _Measured(name, output.numel(), _largest_magnitude(output.detach()), term)
        if self._armed:
            self._seen.append(seen)

    def _finish(self, result: dict[str, Any]) -> dict[str, Any]:
        if not self._armed:
            return result
        seen, self._seen, self._armed = self._seen, [], False
        names = [one.name for one in seen]
        if names != self.block_names:
            self._check_every_block_reported(names)
        self.block_peaks = self._peak_of_each_block(seen)
        task_loss = result["loss"]
        tweo = mean_over_blocks([one.term for one in seen], [one.numel for one in seen], self.config)
        values = {
            # A copy where it is the loss itself: training loops divide that in place when they accumulate gradients.
            "task_loss": task_loss.detach() if self._acting else task_loss.detach().clone(),
            "tweo_loss": tweo.detach(),
            "tweo_weight": self._weight,
            "peak_abs": self.block_peaks.amax(),
        }
        if self._acting:
            values["loss"] = torch.add(task_loss, tweo, alpha=self._weight)
        return {**result, **values}

    def _peak_of_each_block(self, seen: list[_Measured]) -> Tensor:
        """Peaks in the order of the blocks. A block may have been called twice, or, in eval mode, not at all."""
        known: dict[str, Tensor] = {}
        for one in seen:
            known[one.name] = torch.maximum(known[one.name], one.peak) if one.name in known else one.peak
        unseen = torch.zeros_like(seen[0].peak)
        return torch.stack([known.get(name, unseen) for name in self.block_names])

    def _check_every_block_reported(self, names: list[str]) -> None:
        self._refuse_reentrant_checkpoints()  # switched on after attaching, they are why
        expected = [name for name, block in self._blocks.items() if block.training]
        seen = set(names)
        missing = [name for name in expected if name not in seen]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(expected)} blocks gave TWEO no output in this step, the first is "
                f"{missing[0]!r}: attach before torch.compile and before the first step, and checkpoint activations "
                "with use_reentrant=False; if the model skips blocks, name the others with blocks=REGEX"
            )

    def _refuse_reentrant_checkpoints(self) -> None:
        if use_reentrant_ckpt() and any(getattr(m, "grad_checkpointing", False) for m in self._model.modules()):
            raise RuntimeError(
                "TWEO needs non-reentrant activation checkpoints: a reentrant one runs the blocks without gradients, "
                "and the penalty would silently have none. Unset TIMM_REENTRANT_CKPT, or call "
                "timm.layers.set_reentrant_ckpt(False)"
            )


def _largest_magnitude(x: Tensor) -> Tensor:
    """Return max |x| as a float32 scalar, NaN if an element is; reads x once, and makes no tensor of its size."""
    low, high = torch.aminmax(x)
    return torch.maximum(low.abs(), high.abs()).float()
