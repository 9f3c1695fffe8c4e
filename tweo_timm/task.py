"""attach_tweo: add the TWEO penalty to any timm training task, without wrapping it.

A task is an nn.Module whose forward returns a dict with a `loss`. A hook before it, a hook after it and a hook on each
transformer block of the model that is trained are all that is needed: checkpoints, EMA, DDP, compilation, distillation
and timm's own train.py see the task they know. (A wrapper would have to forward some 14 methods, a criterion wrapper
would get the wrong weight under distillation.)

The penalty of a block is computed in its own hook, not at the end: autograd runs the youngest node first, so the
gradient of block l's penalty is made just before block l needs it, and only one of them is alive at a time. Outputs so
small that their memory does not matter are kept, and measured together when the step ends: there, what costs is not
arithmetic but the number of autograd nodes, and operators that find the caches filled by the model's own.
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
from tweo_timm.loss import block_shares, mean_power
from tweo_timm.peaks import Peaks, as_tensor, extremes, largest, peak_magnitudes
from tweo_timm.tap import BlockTap

_logger = logging.getLogger(__name__)
SMALL_BYTES = 1 << 18
"""Size of the largest block output that is kept until the step ends."""


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


class _Kept(NamedTuple):
    """A small output, to be measured when the step ends, and which version of the tensor it was."""

    name: str
    output: Tensor
    version: int

    @property
    def numel(self) -> int:
        return self.output.numel()

    def extremes(self) -> tuple[Tensor, Tensor]:
        if self.output._version != self.version:
            raise RuntimeError(
                f"the model overwrote the output of block {self.name!r} in place, and what TWEO measures is gone: "
                "replace that operation by one that is not in place, or name other modules with blocks=REGEX"
            )
        return extremes(self.output)


class _Measured(NamedTuple):
    """What a step keeps of another output: its size, its extremes and, where it was computed, its mean power."""

    name: str
    numel: int
    found: tuple[Tensor, Tensor]
    term: Tensor | None

    def extremes(self) -> tuple[Tensor, Tensor]:
        return self.found


class TweoHandle:
    """The TWEO term attached to a task; made by `attach_tweo`.

    Attributes:
        config: the TweoConfig in force.
        block_names: names of the blocks, in forward order.
        peaks: max |A| of each block in the latest training step, numbers on a CPU and a tensor elsewhere; 0 for blocks
            in eval mode; None before the first step.
        measuring: whether a step whose weight is 0 computes L_TWEO. Without, it finds the peaks alone, for half the
            time, and the result has no `tweo_loss`.
    """

    def __init__(self, task: TrainingTask, config: TweoConfig, blocks: str | None = None) -> None:
        if any(getattr(hook, "tweo", False) for hook in task._forward_pre_hooks.values()):
            raise ValueError(
                "this task has TWEO attached already: call remove() on the first handle before attaching again"
            )
        self.config = config
        self.peaks: Peaks | None = None
        self.measuring = True
        model = unwrap_model(task.get_eval_model())
        self._blocks = find_blocks(model, blocks)
        self.block_names = list(self._blocks)
        self._model = model
        self._refuse_reentrant_checkpoints()
        self._progress: float | None = 0.0 if config.schedule == "constant" else None
        self._weight = config.weight
        self._acting = config.weight > 0
        self._armed = False
        self._seen: list[_Kept | _Measured] = []
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

    @property
    def block_peaks(self) -> Tensor | None:
        """`peaks` as a tensor, float32 (L,), on the device."""
        return None if self.peaks is None else as_tensor(self.peaks)

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
        """Measure one block's output, or keep it until the step ends.

        Activation checkpointing repeats the forward during the backward pass and expects the same operations, so an
        output is measured then as well, for nothing: only an armed step keeps what was found.
        """
        if not (block.training and torch.is_grad_enabled()):
            return
        seen: _Kept | _Measured
        # A compiler fuses measurements with the model, whatever their size, and is not to look at it.
        if not torch.compiler.is_compiling() and output.nbytes <= SMALL_BYTES:
            seen = _Kept(name, output, output._version)
        else:
            term = self._mean_power([(output, 1.0)]) if self._acting or self.measuring else None
            seen = _Measured(name, output.numel(), extremes(output), term)
        if self._armed:
            self._seen.append(seen)

    def _finish(self, result: dict[str, Any]) -> dict[str, Any]:
        if not self._armed:
            return result
        seen, self._seen, self._armed = self._seen, [], False
        names = [one.name for one in seen]
        if names != self.block_names:
            self._check_every_block_reported(names)
        self.peaks = self._peak_of_each_block(names, peak_magnitudes([one.extremes() for one in seen]))
        task_loss = result["loss"]
        values = {
            # A copy where it is the loss itself: training loops divide that in place when they accumulate gradients.
            "task_loss": task_loss.detach() if self._acting else task_loss.detach().clone(),
            "tweo_weight": self._weight,
            "peak_abs": largest(self.peaks),
        }
        if self._acting or self.measuring:
            tweo = self._penalty(seen)
            values["tweo_loss"] = tweo.detach()
            if self._acting:
                values["loss"] = torch.add(task_loss, tweo, alpha=self._weight)
        return {**result, **values}

    def _penalty(self, seen: list[_Kept | _Measured]) -> Tensor:
        """L_TWEO of a step in which it was to be measured."""
        parts, kept = [], []
        for one, share in zip(seen, block_shares([one.numel for one in seen], self.config), strict=True):
            if isinstance(one, _Kept):
                kept.append((one.output, share))
            elif one.term is not None:
                parts.append(one.term * share)
        if kept:
            parts.append(self._mean_power(kept[-1:]))
        if len(kept) > 1:
            earlier = self._mean_power(kept[:-1])
            # As the youngest node it would begin the backward pass. As the oldest it waits until the block before the
            # last one needs its gradient, when what the last block kept is gone: so it never adds to the memory's peak.
            if earlier.grad_fn is not None:
                earlier.grad_fn._set_sequence_nr(0)  # type: ignore[attr-defined]
            parts.append(earlier)
        return sum(parts[1:], start=parts[0])

    def _mean_power(self, part: list[tuple[Tensor, float]]) -> Tensor:
        """The sum over some outputs of their mean power times their share, with gradients if it acts."""
        outputs = [output if self._acting else output.detach() for output, _ in part]
        return mean_power(outputs, [share for _, share in part], self.config)

    def _peak_of_each_block(self, names: list[str], peaks: Peaks) -> Peaks:
        """Peaks in the order of the blocks. A block may have been called twice, or, in eval mode, not at all."""
        if names == self.block_names:
            return peaks
        found = as_tensor(peaks)
        known: dict[str, Tensor] = {}
        for name, peak in zip(names, found, strict=True):
            known[name] = torch.maximum(known[name], peak) if name in known else peak
        unseen = found.new_zeros(())
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
