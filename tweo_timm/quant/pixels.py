"""Between the pixels of an image and the normalized images that models take, in timm's arithmetic, both ways.

A file that takes uint8 pixels holds the normalization: who deploys it passes an image on as it was decoded. So that the
same images can be scored by such a file, normalized images are turned back; they are whole numbers but for rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tweo_timm.artefact import Preprocessing

_ROUNDING = 0.25
"""How far from a whole number a pixel may be: float16 images are off by 0.07, bfloat16 ones by 0.6."""


class FromPixels(nn.Module):
    """A model with the normalization before it: takes uint8 images (B, H, W, C), as an image file is decoded.

    Args:
        model: takes normalized images (B, C, H, W).
        preprocessing: of its images.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        for name, values in (("shift", preprocessing.mean), ("scale", preprocessing.std)):
            self.register_buffer(name, _per_channel(values))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the model's logits, (B, classes)."""
        images = pixels.permute(0, 3, 1, 2).float()
        logits: Tensor = self.model(images.sub(self.shift).div(self.scale))
        return logits


def to_pixels(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return the pixels of normalized images.

    Args:
        images: (B, C, H, W), floating-point, on any device.
        preprocessing: how they were normalized.

    Returns:
        The same, uint8 (B, C, H, W), on the CPU.

    Raises:
        ValueError: if they are no pixels from 0 to 255, normalized in this way.
    """
    mean, std = _per_channel(preprocessing.mean), _per_channel(preprocessing.std)
    exact = images.detach().cpu().float() * std + mean
    pixels = exact.round()
    if bool(((exact - pixels).abs() > _ROUNDING).any()) or bool((pixels < 0).any()) or bool((pixels > 255).any()):
        raise ValueError(
            "the images are no pixels from 0 to 255 but for their normalization, and the file takes uint8: give images "
            "of 8 bits in float32 or float16, or export for float32 input"
        )
    return pixels.to(torch.uint8)


def _per_channel(values: tuple[float, ...]) -> Tensor:
    """Of pixels from 0 to 255, as timm's loader has it."""
    return torch.tensor([255 * value for value in values], dtype=torch.float32).view(-1, 1, 1)
