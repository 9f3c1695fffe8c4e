"""FSDP2: parameters, gradients and optimizer state spread over the processes, checkpoints whole.

Every transformer block is a unit of its own, the rest of the model another. A checkpoint holds whole tensors under the
names and in the order that timm gives them, so that a run can go on with another number of processes, or without
sharding, and any timm program can read it.

An EMA is sharded as the model is. FP8 layers see whole weights, gathered for the forward pass, and so the very scales
they would have without sharding. Refuses what has no counterpart here: Transformer Engine, torch.compile, adaptive
gradient clipping (its norms are of whole units), channels-last weights, tasks of two models, an EMA on the CPU or in
half precision.

Source: torch.distributed.fsdp.fully_shard, torch.distributed.tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tweo_timm.fp8.backend import backend_named

if TYPE_CHECKING:
    from tweo_timm.fp8.patch import Fp8Report
    from tweo_timm.run.world import World
    from tweo_timm.train.options import TrainOptions


def check_sharding(options: TrainOptions, world: World, fp8: Fp8Report | None) -> None:
    """Refuse settings that do not go with --fsdp.

    Args:
        options: the resolved options.
        world: device and rank.
        fp8: what the FP8 conversion said; None in full precision.

    Raises:
        ValueError: naming the flag and the reason.
    """
    compiled, agc = bool(options.torchcompile), options.clip_mode == "agc"
    half_ema = options.model_ema and options.model_dtype not in (None, "float32")
    unshardable = backend_named(fp8.backend).unshardable if fp8 is not None else ""
    complaints = [
        (not world.distributed, "a single process, which has nobody to share with: start with torchrun"),
        (options.model_ema_force_cpu, "--model-ema-force-cpu: the EMA is sharded as the model is"),
        (half_ema, f"--model-ema of a {options.model_dtype} model: its rounding at random is not for shards"),
        (unshardable, f"--fp8 {fp8 and fp8.backend}: {unshardable}"),
        (compiled, "--torchcompile: the hooks of TWEO and of FSDP would break the graph at every block"),
        (agc, "--clip-mode agc: its norms are those of whole units"),
        (options.channels_last, "--channels-last: torch cuts weights only along their first axis, laid out in order"),
        (options.kd_model_name is not None, "--kd-model-name: only one model is sharded"),
        (world.device.type not in ("cuda", "cpu"), f"--device {world.device}: only cuda and cpu are known"),
    ]
    for holds, complaint in complaints:
        if holds:
            raise ValueError(f"--fsdp cannot be used with {complaint}")


def shard(model: nn.Module, blocks: Iterable[nn.Module], world: World) -> None:
    """Shard a model in place, from the weights of the first process.

    Args:
        model: on its device; every process has built it.
        blocks: its transformer blocks.
        world: the processes.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        torch.distributed.broadcast(tensor.detach(), src=0)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(value: Any) -> Any:
    """Replace every sharded tensor in a nested state by the whole one. A collective, if there are any."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()  # a checkpoint's worth of tensors does not belong on one device
    if isinstance(value, dict):
        return type(value)((key, whole(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(whole(item) for item in value)
    return value


def shard_like(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut whole tensors as those of the same name are cut; what is not sharded passes."""
    return {name: _cut(value, reference.get(name)) for name, value in state.items()}


def shard_optimizer_like(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Cut an optimizer's whole state as its parameters are cut."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    if len(indices) != len(parameters) or not any(isinstance(parameter, DTensor) for parameter in parameters):
        return state
    by_index = dict(zip(indices, parameters, strict=True))
    cut = {
        index: {key: _cut(value, by_index[index]) for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": cut}


def _cut(value: Any, reference: Tensor | None) -> Any:
    if not (isinstance(reference, DTensor) and isinstance(value, Tensor) and value.shape == reference.shape):
        return value
    return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)
