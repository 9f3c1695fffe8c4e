"""An optimizer's parameter groups, where torch keeps settings of the run and memory of the optimizer side by side.

Loading a checkpoint's state replaces both. A run goes on with the memory of its checkpoint under the settings of its
own command: what a newly built optimizer has in its groups was put there by the command, what it has not is memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_MEMORY = ("lookahead_step",)  # built with the groups, and counted up by every step
_RATES = ("initial_lr", "lr_scale")  # written by a schedule and by --layer-decay, which this run may not have


def under_settings(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, remembered_rates: bool = False
) -> dict[str, Any]:
    """Return an optimizer's state with the settings of another optimizer's groups.

    Args:
        state: what `state_dict` returned; it stays as it is.
        optimizer: newly built under the run's settings, its schedule included.
        remembered_rates: whether the rates are memory too, as under --sched plateau, which reduces them by what it
            saw. Where the command names another rate, the reductions made so far hold for that one.

    Returns:
        A state to load into `optimizer`.
    """
    groups = [_merged(group, new) for group, new in zip(state["param_groups"], optimizer.param_groups, strict=False)]
    if remembered_rates:
        for group, old in zip(groups, state["param_groups"], strict=False):
            before, now = old["initial_lr"], group["initial_lr"]
            group["lr"] = old["lr"] if before == now else old["lr"] * now / before
    return {**state, "param_groups": groups + state["param_groups"][len(groups) :]}


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in new.items() if key not in ("params", *_MEMORY)}
    return {key: value for key, value in old.items() if key not in _RATES} | settings


def scale_rates(optimizer: torch.optim.Optimizer) -> None:
    """Give every group its share of the rate, where no schedule does: timm leaves that to its schedules."""
    for group in optimizer.param_groups:
        group["lr"] *= group.get("lr_scale", 1.0)


def check_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Refuse a state whose tensors have other shapes than the parameters: torch would find that in its next step.

    Raises:
        ValueError: naming the entry.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    if len(indices) != len(parameters):
        return  # torch says how many there are
    for index, parameter in zip(indices, parameters, strict=True):
        entry = state["state"].get(index, {})
        if not isinstance(entry, Mapping):
            raise ValueError(f"state[{index}] must be a dictionary, not a {type(entry).__name__}")
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.dim() == parameter.dim() > 0 and not _is_of(value, parameter):
                found = f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
                raise ValueError(f"state[{index}].{name} is {found}; the parameter's is {tuple(parameter.shape)}")


def _is_of(value: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor may belong to a parameter: factored optimizers keep one value for some axes, others bytes."""
    axes = zip(value.shape, parameter.shape, strict=True)
    return (value.is_floating_point() or value.dtype == torch.uint8) and all(size in (1, full) for size, full in axes)
