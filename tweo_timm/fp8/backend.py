"""Which backend can run a recipe here, and why not the others.

FP8 that was asked for and cannot run is an error with the remedy, never a silent downgrade. Only ``'auto'`` chooses,
and it says what it chose and why.
"""

from __future__ import annotations

import torch

from tweo_timm.fp8 import te
from tweo_timm.fp8.recipe import Fp8Recipe

_MIN_CAPABILITY = (8, 9)


def choose_backend(recipe: Fp8Recipe, device: torch.device) -> tuple[str, str]:
    """Return the backend to use on ``device`` and the reason for it.

    Raises:
        RuntimeError: the recipe names a backend that cannot run; the message says what would make it run.
    """
    obstacles = {name: _obstacle(name, recipe, device) for name in ("te", "native", "emulated")}
    if recipe.backend != "auto":
        obstacle = obstacles[recipe.backend]
        if obstacle:
            raise RuntimeError(
                f"FP8 backend {recipe.backend!r} cannot run: {obstacle}. Use backend='emulated' for the same numbers "
                "without the speed, or backend='auto' to take the best one that runs"
            )
        return recipe.backend, "asked for by name"
    chosen = next(name for name, obstacle in obstacles.items() if obstacle is None)
    passed_over = [f"{name}: {obstacle}" for name, obstacle in obstacles.items() if obstacle]
    return chosen, "; ".join(passed_over) or "Transformer Engine is installed and the GPU has FP8 units"


def _obstacle(name: str, recipe: Fp8Recipe, device: torch.device) -> str | None:
    if name == "emulated":
        return None
    hardware = _hardware_obstacle(device)
    if hardware or name == "native":
        return hardware
    return te.obstacle(recipe)


def _hardware_obstacle(device: torch.device) -> str | None:
    """Return why the FP8 units of ``device`` cannot be used, or None."""
    if not torch.cuda.is_available():
        return "FP8 matrix units need a CUDA GPU of compute capability 8.9 or newer, and PyTorch sees no GPU"
    if device.type != "cuda":
        return f"the model is on {device}; move it to a CUDA device before patching"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}; FP8 needs 8.9 or newer"
    return None
