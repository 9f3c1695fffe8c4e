"""The span over which delayed scales hold still: one training forward of the patched model, and its backward.

Scales may only move between steps, never inside one, and all ranks must move alike. So a region belongs to the
patched root model: hooks on the root open it before a training forward and close it after, and a gradient hook on
the root's output finds the end of the backward. Hooks on the inner module keep running under DistributedDataParallel
and torch.compile; ``model.forward`` is never replaced.

Evaluation (root in eval mode, or gradients off) opens nothing: operands are scaled by their own maxima and no
training state is read or written, so the result depends on the weights alone. Activation checkpointing runs a layer
again inside the backward; the region then hands out the scales of the first run and records nothing twice. Where the
loss comes from elsewhere, from outputs of inner layers say, the gradients' scales move when the next forward begins. A
training call that bypasses the root would train on scales nobody updates: an error.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from tweo_timm.fp8.arithmetic import ARITHMETICS
from tweo_timm.fp8.cast import E4M3, E5M2, Fp8Format
from tweo_timm.fp8.recipe import Fp8Recipe
from tweo_timm.fp8.scaling import NOT_SEEN, DelayedScales, current_scale


class Observer(Protocol):
    """Whoever wants to look at the operands of an armed step."""

    def observe(self, layer: str, tensor: str, values: Tensor, scale: Tensor, fmt: Fp8Format) -> None:
        """Look at one operand before it is rounded with ``scale`` to ``fmt``."""


class Scales(NamedTuple):
    """The scales of one call of one layer.

    Attributes:
        x: float32 scalar.
        w: float32 scalar.
        dy: float32 scalar, or None to scale the gradient by its own maximum.
        dy_amax: where the gradient's maximum is recorded, shape ``[1]``; None to record nothing.
    """

    x: Tensor
    w: Tensor
    dy: Tensor | None
    dy_amax: Tensor | None


class Kernel(NamedTuple):
    """What one layer's products need to know beyond tensors; constants only, so that a compiled graph can hold it."""

    arithmetic: str
    forward_format: str
    backward_format: str
    margin: int


class Fp8Region:
    """The FP8 state of one patched model; kept beside its modules, outside ``state_dict``.

    Args:
        names: the converted layers, in a fixed order.
        recipe: how to scale.
        arithmetic: ``'native'`` or ``'emulated'``.
        device: where the state lives; it follows the model.
    """

    def __init__(self, names: tuple[str, ...], recipe: Fp8Recipe, arithmetic: str, device: torch.device):
        self.names = names
        self.recipe = recipe
        self.forward_format = E4M3
        self.backward_format = E5M2 if recipe.format == "hybrid" else E4M3
        self.kernel = Kernel(arithmetic, self.forward_format.name, self.backward_format.name, recipe.margin)
        self.observer: Observer | None = None
        self.is_open = False
        self._all_ran = False
        self._awaits_backward = False
        self._replays: list[Tensor] = []
        self._create(device)

    def _create(self, device: torch.device) -> None:
        self.forward = DelayedScales.create(2 * len(self.names), self.recipe, device)
        self.backward = DelayedScales.create(len(self.names), self.recipe, device)

    @property
    def is_delayed(self) -> bool:
        """Whether scales come from a history."""
        return self.recipe.scaling == "delayed"

    def site(self, name: str) -> LayerSite:
        """Return the handle through which the layer ``name`` reaches its state."""
        return LayerSite(self, self.names.index(name))

    def attach(self, root: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Hook the region to ``root``; the handles remove it again."""
        return [root.register_forward_pre_hook(self._enter), root.register_forward_hook(self._exit)]

    def close(self) -> None:
        """Close the region, as the end of a forward does that was not interrupted."""
        self.is_open = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(self, root: nn.Module, args: Any) -> None:
        if self._replays and _inside_backward():  # a checkpoint around the root: its layers run again, on their scales
            return
        self._replays.clear()  # left over where an exception ended a backward
        self.is_open = root.training and torch.is_grad_enabled()
        if self.is_open:
            self._follow(next(root.parameters()).device)
            if self._awaits_backward:  # a loss that did not pass through the root's output; no-op without a backward
                self._finish_backward()
            self._awaits_backward = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _exit(self, root: nn.Module, args: Any, output: Any) -> None:
        if not self.is_open:
            return
        self.is_open = False
        self._check_first_forward()
        used = self.forward.scale
        if self.is_delayed:
            _reduce_over_ranks(self.forward.amax)
            self.forward.update(self.recipe, self.forward_format.max)
        else:
            self.forward.amax.fill_(NOT_SEEN)
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(functools.partial(self._start_backward, used))  # type: ignore[no-untyped-call]

    def _start_backward(self, used: Tensor, grad: Tensor) -> None:
        if not self._replays:
            Variable._execution_engine.queue_callback(self._finish_backward)
        if not any(known is used for known in self._replays):
            self._replays.append(used)

    def _finish_backward(self) -> None:
        self._replays.clear()
        self._awaits_backward = False
        if self.is_delayed:
            _reduce_over_ranks(self.backward.amax)
            self.backward.update(self.recipe, self.backward_format.max)

    def replayed_scale(self) -> Tensor | None:
        """Return the forward scales of the step whose backward is running, or None outside a backward.

        Raises:
            RuntimeError: several forwards share this backward, so which scales a recomputed layer had is unknown.
        """
        if len(self._replays) > 1:
            raise RuntimeError(
                "activation checkpointing cannot recompute FP8 layers when one backward spans several forwards of the "
                "model: call backward once per forward, or turn gradient checkpointing off"
            )
        return self._replays[0] if self._replays else None

    def layers_not_run(self) -> list[str]:
        """Return the converted layers that recorded nothing since the last update."""
        ran = (self.forward.amax.view(-1, 2) > NOT_SEEN).all(1).tolist()
        return [name for name, it_ran in zip(self.names, ran, strict=True) if not it_ran]

    def _check_first_forward(self) -> None:
        if self._all_ran or self.forward.amax.is_meta:
            return
        missing = self.layers_not_run()
        if missing:
            raise RuntimeError(
                f"{len(missing)} converted layers did not run in FP8 during the first training forward: {missing[:8]}. "
                "Their weights are "
                "used without calling the layer, or not at all; leave them out with Fp8Recipe(exclude=[...])"
            )
        self._all_ran = True

    @property
    def all_layers_ran(self) -> bool:
        """Whether a training forward has run every converted layer in FP8."""
        return self._all_ran

    def _follow(self, device: torch.device) -> None:
        if self.forward.scale.device == device:
            return
        if self.forward.scale.is_meta:
            self._create(device)
        self.forward.to(device)
        self.backward.to(device)

    def state(self) -> dict[str, Tensor]:
        """Return copies of scales and histories, four tensors a layer; empty where scaling keeps no state."""
        return {key: tensor.detach().clone() for key, tensor in self._views().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned.

        Raises:
            ValueError: the state belongs to other layers, another history length or another scaling.
        """
        views = self._views()
        check_same_layout(views, state)
        # Copies, so that tensors held by someone else (a pending backward) do not change.
        self.forward = dataclasses.replace(self.forward, scale=self.forward.scale.clone())
        self.backward = dataclasses.replace(self.backward, scale=self.backward.scale.clone())
        for key, view in self._views().items():
            view.copy_(state[key])

    def _views(self) -> dict[str, Tensor]:
        if not self.is_delayed:
            return {}
        views = {}
        for index, name in enumerate(self.names):
            for direction, state, width in (("fwd", self.forward, 2), ("bwd", self.backward, 1)):
                columns = slice(width * index, width * (index + 1))
                views[f"{name}.scaling_{direction}.scale"] = state.scale[columns]
                views[f"{name}.scaling_{direction}.amax_history"] = state.history[:, columns]
        return views


def check_same_layout(expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Raise ValueError unless ``state`` has the keys and shapes of ``expected``."""
    missing, foreign = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or foreign:
        raise ValueError(
            f"the saved FP8 state does not fit this model: {len(missing)} entries missing, such as {missing[:2]}; "
            f"{len(foreign)} that belong to no layer here, such as {foreign[:2]}. Patch with the recipe the run was "
            "started with"
        )
    for key, tensor in expected.items():
        if tensor.shape != state[key].shape:
            raise ValueError(
                f"the saved FP8 state of {key} has shape {tuple(state[key].shape)}, this run needs "
                f"{tuple(tensor.shape)}: resume with the same amax_history_len"
            )


class LayerSite:
    """One layer's columns of its region's state."""

    def __init__(self, region: Fp8Region, index: int):
        self.region = region
        self.index = index

    @property
    def name(self) -> str:
        """The layer's name in the patched model."""
        return self.region.names[self.index]

    def scales(self, x: Tensor, weight: Tensor, training: bool) -> Scales:
        """Return the scales of one call, recording the operands' maxima where this call is part of a training step.

        Args:
            x: the layer's input.
            weight: its weight.
            training: whether the layer is in training mode.

        Raises:
            RuntimeError: a training call outside the forward of the patched model.
        """
        region = self.region
        if region.recipe.scaling == "unit":
            return self._unit_scales(x)
        first, last = 2 * self.index, 2 * self.index + 1
        if not region.is_open and region.is_delayed:
            replayed = region.replayed_scale()
            if replayed is not None:
                return Scales(replayed[first], replayed[last], *self._gradient_state())
            if training and torch.is_grad_enabled():
                raise RuntimeError(
                    f"FP8 layer {self.name!r} was trained outside the forward of the patched model, where its delayed "
                    "scales are never updated: call the model itself, patch the module that is called, or use "
                    "Fp8Recipe(scaling='current')"
                )
        arithmetic = ARITHMETICS[region.kernel.arithmetic]
        if region.is_open:
            arithmetic.record(region.forward.amax[first], x)
            arithmetic.record(region.forward.amax[last], weight)
            if region.is_delayed:
                return Scales(region.forward.scale[first], region.forward.scale[last], *self._gradient_state())
        amax = torch.stack([arithmetic.absolute_maximum(x), arithmetic.absolute_maximum(weight)])
        scale = current_scale(amax, fp8_max=region.forward_format.max, margin=region.recipe.margin)
        return Scales(scale[0], scale[1], None, None)

    def observe(self, tensor: str, values: Tensor, scale: Tensor, fmt: Fp8Format) -> None:
        """Show an operand to the observer, if there is one."""
        if self.region.observer is not None:
            self.region.observer.observe(self.name, tensor, values, scale, fmt)

    def _gradient_state(self) -> tuple[Tensor, Tensor]:
        state = self.region.backward
        return state.scale[self.index], state.amax[self.index : self.index + 1]

    def _unit_scales(self, x: Tensor) -> Scales:
        if self.region.is_open:
            self.region.forward.amax[2 * self.index : 2 * self.index + 2].clamp_min_(0.0)
        one = torch.ones((), device=x.device)
        return Scales(one, one, one, None)


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks


def _reduce_over_ranks(amax: Tensor) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(amax, dist.ReduceOp.MAX)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in a model's output, whatever it is nested in."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
