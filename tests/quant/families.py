"""One tiny model of every family, with random weights that make no block an identity, and images for it."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from tests.models import SWIN, SWIN_ARCH, VIT, VIT_ARCH

_SWIN = {**SWIN, "patch_size": 2, "depths": (2, 2), "num_heads": (2, 4)}

FAMILIES = {
    "vit": (VIT_ARCH, VIT),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", VIT),
    "deit3": ("deit3_small_patch16_224", VIT),
    "beit": ("beitv2_base_patch16_224", VIT),
    "eva02": ("eva02_tiny_patch14_224", VIT),
    "dinov3": ("vit_small_patch16_dinov3", VIT),
    "cait": ("cait_xxs24_224", VIT),
    "xcit": ("xcit_nano_12_p8_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}),
    "hiera": ("hiera_tiny_224", {"img_size": 64, "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 2, 1)}),
    "swin": (SWIN_ARCH, _SWIN),
    "swinv2": ("swinv2_tiny_window8_256", _SWIN),
    "swinv2_cr": ("swinv2_cr_tiny_224", _SWIN),
    "maxvit": (
        "maxvit_tiny_rw_224",
        {
            "img_size": 32,
            "embed_dim": (8, 16),
            "depths": (1, 2),
            "stem_width": 8,
            "transformer_dim_head": 8,
            "transformer_window_size": (4, 4),
            "transformer_grid_size": (4, 4),
        },
    ),
    "naflex": ("naflexvit_base_patch16_gap", {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}),
}


def make_model(family: str, seed: int = 0, **overrides: object) -> nn.Module:
    """The tiny model of a family, evaluation mode, ten classes; the same weights for the same seed."""
    arch, kwargs = FAMILIES[family]
    return randomize(timm.create_model(arch, num_classes=10, **{**kwargs, **overrides}).eval(), seed)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model random weights that make no block an identity, in place; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 or "gamma" in name:
                parameter.copy_(0.1 * noise + (1.0 if name.endswith(("weight", "gamma")) or "gamma" in name else 0.0))
            else:
                parameter.copy_(noise * (0.5 / parameter[0].numel() ** 0.5))
    return model


def make_images(family: str, num_images: int = 4, seed: int = 1) -> Tensor:
    """Preprocessed images, Gaussian, of the size that the family's model takes."""
    size = FAMILIES[family][1].get("img_size", 32)
    return torch.randn(num_images, 3, size, size, generator=torch.Generator().manual_seed(seed))
