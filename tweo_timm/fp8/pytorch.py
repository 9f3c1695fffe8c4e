"""The backends that PyTorch alone can run: the FP8 units of a GPU, and their emulation on any device.

They differ in their arithmetic and in nothing else: the layers (linear.py) and the region of scales (region.py) are the
same. LayerNorm modules stay as they are, because their output is precisely what the next FP8 layer rounds.
"""

from __future__ import annotations

import torch
from torch import nn

from tweo_timm.fp8.backend import Replaced, hardware_obstacle
from tweo_timm.fp8.linear import Fp8Linear
from tweo_timm.fp8.recipe import Fp8Recipe
from tweo_timm.fp8.region import Fp8Region


class Emulated:
    """FP8 on any device, with the numbers of the unit and not its speed."""

    unshardable = ""
    arithmetic = "emulated"

    def obstacle(self, recipe: Fp8Recipe, device: torch.device) -> str | None:
        """Nothing stands in its way."""
        return None

    def convert(self, model: nn.Module, layers: tuple[str, ...], recipe: Fp8Recipe) -> tuple[Fp8Region, list[Replaced]]:
        """Replace the named linear layers, wherever they stand, by layers that share their parameters."""
        linears: dict[nn.Module, str] = {model.get_submodule(name): name for name in layers}
        device = next(iter(linears)).weight.device
        assert isinstance(device, torch.device)
        region = Fp8Region(layers, recipe, self.arithmetic, device)
        faces = {linear: Fp8Linear.from_float(linear, region.site(name)) for linear, name in linears.items()}  # type: ignore[arg-type]
        places = [
            Replaced(parent, attribute, child, faces[child])
            for parent in model.modules()
            for attribute, child in parent._modules.items()
            if child in faces
        ]
        for place in places:
            place.parent._modules[place.name] = place.face
        return region, places


class Native(Emulated):
    """FP8 on the matrix units of a GPU."""

    arithmetic = "native"

    def obstacle(self, recipe: Fp8Recipe, device: torch.device) -> str | None:
        """Return why the units cannot be used, or None."""
        return hardware_obstacle(device)
