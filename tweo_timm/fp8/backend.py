"""What a backend of FP8 is, and which of them can run a recipe here.

A backend is one class, with no arguments, and a line in `recipe.BACKENDS`. It says what stands in its way, and gives a
model its FP8 layers. FP8 that was asked for and cannot run is an error with the remedy, never a silent downgrade. Only
``'auto'`` chooses, and it says what it chose and why.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tweo_timm.fp8.recipe import BACKENDS, Fp8Recipe


class Region(Protocol):
    """The FP8 state of one patched model; copied with the model."""

    def attach(self, root: nn.Module) -> list[RemovableHandle]:
        """Hook the region to ``root``; the handles remove it again."""

    def close(self) -> None:
        """Leave whatever was entered and is still open."""

    def state(self) -> dict[str, Tensor]:
        """Return copies of scales and histories by layer, as `patch.fp8_state` has them."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned.

        Raises:
            ValueError: the state belongs to other layers, another history length or another scaling.
        """

    @property
    def all_layers_ran(self) -> bool:
        """Whether a training forward has run every converted layer in FP8."""


class Replaced(NamedTuple):
    """One place of a model that holds another module now.

    Attributes:
        parent: the module that holds it.
        name: under which name.
        original: what was there.
        face: what is there; it shares the original's parameters.
    """

    parent: nn.Module
    name: str
    original: nn.Module
    face: nn.Module


class Backend(Protocol):
    """One way to compute linear layers in FP8.

    Attributes:
        unshardable: why its layers cannot be sharded over processes, as the end of a sentence; "" if they can.
    """

    unshardable: str

    def obstacle(self, recipe: Fp8Recipe, device: torch.device) -> str | None:
        """Return why it cannot run ``recipe`` on ``device``, with the remedy; None if it can."""

    def convert(self, model: nn.Module, layers: tuple[str, ...], recipe: Fp8Recipe) -> tuple[Region, list[Replaced]]:
        """Replace the named linear layers of ``model`` in place."""


def backend_named(name: str) -> Backend:
    """Return the backend of a name in `BACKENDS`."""
    backend: Backend = BACKENDS[name].load()()
    return backend


def choose_backend(recipe: Fp8Recipe, device: torch.device) -> tuple[str, str]:
    """Return the name of the backend to use on ``device`` and the reason for it.

    Raises:
        RuntimeError: the recipe names a backend that cannot run; the message says what would make it run.
    """
    if recipe.backend != "auto":
        obstacle = backend_named(recipe.backend).obstacle(recipe, device)
        if obstacle:
            raise RuntimeError(
                f"FP8 backend {recipe.backend!r} cannot run: {obstacle}. Use backend='emulated' for the same numbers "
                "without the speed, or backend='auto' to take the best one that runs"
            )
        return recipe.backend, "asked for by name"
    obstacles = {name: backend_named(name).obstacle(recipe, device) for name in BACKENDS}
    chosen = next(name for name, obstacle in obstacles.items() if obstacle is None)
    passed_over = [f"{name}: {obstacle}" for name, obstacle in obstacles.items() if obstacle]
    return chosen, "; ".join(passed_over) or "the first choice, and nothing stands in its way"


_MIN_CAPABILITY = (8, 9)


def hardware_obstacle(device: torch.device) -> str | None:
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
