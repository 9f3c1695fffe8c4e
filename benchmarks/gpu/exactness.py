"""Native against emulated FP8: bit for bit where both are exact, and how far apart where they are not.

Exact is, first, the rounding of an operand: every bfloat16 value, in both formats. Second, one step of one layer whose
products a matrix unit can only get right: operands are 1.75 times -1, 0 or 1, so that every scale is a power of two,
and sums of 64 such products fit the 14 bits that Hopper's units keep. Output, all gradients, scales and histories are
compared. Last, one step of a whole model, which is not exact: units accumulate with fewer bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.ledger import MeasurementError, Part
from benchmarks.gpu.plan import Plan, Workload
from benchmarks.gpu.speed import require
from benchmarks.gpu.worker import Worker
from tweo_timm import Fp8Recipe, fp8_state, patch_fp8
from tweo_timm.fp8.arithmetic import ARITHMETICS
from tweo_timm.fp8.cast import FORMATS

PREFIX = "native = emulated"
SCALINGS = ("delayed", "current", "unit")
LIMIT_S = 90
MODEL_STEPS = 3
# Powers of two, and one that is none: the product with the scale is rounded to float32 before it is rounded to FP8.
_SCALES = (1.0, 256.0, 0.3)


def measure(part: Part, plan: Plan, worker: Worker) -> None:
    """Compare roundings, layers and a model, one row each."""
    for name in FORMATS:
        title = f"{PREFIX}: rounding to {name}"
        part.attempt(title, lambda n=name: exact(worker.run(roundings, n, plan.device, limit_s=LIMIT_S)))
    for scaling in SCALINGS:
        title = f"{PREFIX}: one step of one layer, {scaling}"
        part.attempt(title, lambda s=scaling: exact(worker.run(layer_steps, s, plan.device, limit_s=LIMIT_S)))
    workload = plan.workloads[0]
    for scaling in SCALINGS:
        title = f"native to emulated: {workload.arch}, {scaling}"
        call = (model_steps, workload, scaling, plan.device)
        part.attempt(title, lambda c=call: worker.run(*c, limit_s=LIMIT_S))


def exact(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what was found, if all of it is equal.

    Raises:
        MeasurementError: something differs; the message says what, and in how many elements.
    """
    if found["different"]:
        raise MeasurementError(f"not the same bits: {found['different']}")
    return found


def roundings(fmt: str, device: str) -> dict[str, Any]:
    """Round every bfloat16 value by both arithmetics.

    Returns:
        compared: how many; different: how many of them differ, by scale.
    """
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(device)
    different = {}
    for number in _SCALES:
        scale = torch.tensor(number, device=device)
        native, emulated = (ARITHMETICS[one].quantize(values, scale, FORMATS[fmt]) for one in ("native", "emulated"))
        unequal = _unequal(native.float(), emulated.float())
        if unequal:
            different[f"scale {number}"] = unequal
    return {"compared": len(_SCALES) * len(values), "different": different}


def layer_steps(scaling: str, device: str) -> dict[str, Any]:
    """Do two steps of one linear layer with either backend, on numbers that leave nothing to round.

    Returns:
        compared: the tensors' names; different: by name, how many elements differ.

    Raises:
        NotRunError: without a unit for FP8.
    """
    native, emulated = (_layer_steps(backend, scaling, device) for backend in ("native", "emulated"))
    unequal = {name: _unequal(native[name], emulated[name]) for name in emulated}
    return {"compared": list(emulated), "different": {name: count for name, count in unequal.items() if count}}


def _layer_steps(backend: str, scaling: str, device: str) -> dict[str, Tensor]:
    tokens, num_in, num_out = 64, 64, 64
    recipe = Fp8Recipe(backend=backend, scaling=scaling)
    require(recipe, torch.device(device))
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(num_in, num_out)).to(device)
    with torch.no_grad():
        model[0].weight.copy_(_ternary((num_out, num_in), generator))
        model[0].bias.zero_()
    patch_fp8(model, recipe)
    x, dy = (_ternary(shape, generator).to(device) for shape in ((tokens, num_in), (tokens, num_out)))
    x.requires_grad_()
    found: dict[str, Tensor] = {}
    for step in (1, 2):  # a delayed scale is used one step after it was measured
        x.grad = model[0].weight.grad = model[0].bias.grad = None
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            y = model(x)
        y.backward(dy.to(y.dtype))
        gradients = {"dx": x.grad, "dw": model[0].weight.grad, "db": model[0].bias.grad}
        found |= {f"{name} of step {step}": tensor for name, tensor in {"y": y.detach(), **gradients}.items()}
    return found | fp8_state(model)


def _ternary(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return 1.75 times -1, 0 or 1: the largest values of both formats, 448 and 57344, are 1.75 times a power of 2."""
    return 1.75 * torch.randint(-1, 2, shape, generator=generator).float()


def _unequal(one: Tensor, other: Tensor) -> int:
    """Count the elements that differ; NaN equals NaN, and a zero has no sign."""
    same = (one == other) | (one.isnan() & other.isnan())
    return int((~same).sum())


def model_steps(workload: Workload, scaling: str, device: str) -> dict[str, Any]:
    """Do a few steps of a model with either backend, from the same weights on the same images.

    Returns:
        loss_difference, relative, and gradient_error: the norm of the difference over the norm, of the last step.
    """
    (native, by_native), (emulated, by_emulated) = (
        _model_steps(workload, backend, scaling, device) for backend in ("native", "emulated")
    )
    error = (by_native - by_emulated).norm() / by_emulated.norm()
    return {
        "steps": MODEL_STEPS,
        "loss_difference": abs(native - emulated) / abs(emulated),
        "gradient_error": float(error),
    }


def _model_steps(workload: Workload, backend: str, scaling: str, device: str) -> tuple[float, Tensor]:
    """Return the loss and all gradients in one vector, of the last step; weights stay as they are."""
    recipe = Fp8Recipe(backend=backend, scaling=scaling)
    require(recipe, torch.device(device))
    torch.manual_seed(0)
    model = timm.create_model(workload.arch, **workload.kwargs).to(device).train()
    patch_fp8(model, recipe)
    images = torch.randn(16, 3, workload.img_size, workload.img_size, device=device)
    targets = torch.randint(0, model.num_classes, (16,), device=device)
    for _ in range(MODEL_STEPS):
        model.zero_grad()
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = F.cross_entropy(model(images).float(), targets)
        loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return loss.item(), torch.cat(gradients)
