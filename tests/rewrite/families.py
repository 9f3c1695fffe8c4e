"""One tiny model of every family that can be rewritten, with weights that make folding matter, and images for it.

Gains go down to 1e-3 and are of both signs, shifts are about 1, LayerScales as small as gains: with timm's initial
values (ones and zeros) a fold that is left out changes nothing.
"""

from __future__ import annotations

from functools import partial

import timm
import torch
from timm.layers import RmsNorm
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, ParallelThingsBlock
from torch import Tensor, nn

_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
_SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": (1, 2, 2),
    "num_heads": (2, 2, 4),
    "window_size": 4,
}
_ARCH = "vit_tiny_patch16_224"

FAMILIES = {
    "vit": (_ARCH, _VIT),
    "vit, averaged": (_ARCH, {**_VIT, "global_pool": "avg"}),
    "vit, averaged after the norm": (_ARCH, {**_VIT, "global_pool": "avg", "fc_norm": False}),
    "vit, all tokens": (_ARCH, {**_VIT, "global_pool": ""}),
    "vit without a last norm": (_ARCH, {**_VIT, "final_norm": False}),
    "vit without biases": (_ARCH, {**_VIT, "qkv_bias": False, "proj_bias": False}),
    "vit with QK norm": (_ARCH, {**_VIT, "qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True}),
    "vit with RmsNorm": (_ARCH, {**_VIT, "norm_layer": RmsNorm}),
    "vit of any size": (_ARCH, {**_VIT, "dynamic_img_size": True}),
    "vit with differential attention": (_ARCH, {**_VIT, "attn_layer": "diff"}),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}),
    "deit": ("deit_tiny_patch16_224", _VIT),
    "distilled": ("deit_tiny_distilled_patch16_224", _VIT),
    "deit3": ("deit3_small_patch16_224", _VIT),
    "registers": ("vit_small_patch14_reg4_dinov2", {**_VIT, "num_classes": 10}),
    "dinov2": ("vit_small_patch14_dinov2", _VIT),
    "dinov2 giant": ("vit_giant_patch14_dinov2", _VIT),
    "siglip": ("vit_base_patch16_siglip_224", _VIT),
    "siglip without a head": ("vit_base_patch16_siglip_224", {**_VIT, "num_classes": 0}),
    "parallel scaling": (_ARCH, {**_VIT, "block_fn": ParallelScalingBlock, "init_values": 1e-5}),
    "parallel scaling, fused": (_ARCH, {**_VIT, "block_fn": partial(ParallelScalingBlock, fuse_out_proj=True)}),
    "parallel scaling without biases": (_ARCH, {**_VIT, "block_fn": ParallelScalingBlock, "qkv_bias": False}),
    "parallel scaling, differential": (_ARCH, {**_VIT, "block_fn": DiffParallelScalingBlock}),
    "parallel things": (_ARCH, {**_VIT, "block_fn": ParallelThingsBlock, "init_values": 1e-5}),
    "relative positions": ("vit_relpos_small_patch16_224", _VIT),
    "eva": ("eva_large_patch14_196", _VIT),
    "eva02": ("eva02_tiny_patch14_224", _VIT),
    "eva02 base": ("eva02_base_patch14_224", _VIT),
    "eva, unfused, no rope": ("eva02_base_patch14_224", {**_VIT, "use_rot_pos_emb": False}),
    "eva with plain attention": ("eva02_tiny_patch14_224", {**_VIT, "attn_type": "rope"}),
    "beit": ("beit_base_patch16_224", _VIT),
    "beitv2": ("beitv2_base_patch16_224", _VIT),
    "dinov3": ("vit_small_patch16_dinov3", _VIT),
    "dinov3 plus": ("vit_small_plus_patch16_dinov3", _VIT),
    "dinov3 with qkv biases": ("vit_small_patch16_dinov3_qkvb", _VIT),
    "cait": ("cait_xxs24_224", _VIT),
    "swin": ("swin_tiny_patch4_window7_224", _SWIN),
    "swin, padded windows": ("swin_tiny_patch4_window7_224", {**_SWIN, "img_size": 36, "window_size": 5}),
    "swin, odd grids": ("swin_tiny_patch4_window7_224", {**_SWIN, "img_size": 36, "always_partition": True}),
    "swin of any size": ("swin_tiny_patch4_window7_224", {**_SWIN, "strict_img_size": False}),
    "swin base": ("swin_base_patch4_window7_224", _SWIN),
}


def make_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: object) -> nn.Module:
    """The tiny model of a family, evaluation mode, ten classes unless the family says otherwise."""
    arch, kwargs = FAMILIES[family]
    model = timm.create_model(arch, **{"num_classes": 10, **kwargs, **overrides}).eval()
    scramble(model, seed)
    return model.to(dtype)


def scramble(model: nn.Module, seed: int = 0) -> None:
    """Random weights under which every gain, shift and scale matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "gamma" in name or (parameter.ndim == 1 and name.endswith("weight")):
                size = 10 ** (-3 * torch.rand(parameter.shape, generator=generator))
                parameter.copy_(size * noise.sign())
            elif parameter.ndim <= 1:
                parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.3 * noise)
            else:
                parameter.copy_(noise * (1 / parameter[0].numel() ** 0.5))


def make_images(family: str, num_images: int = 3, seed: int = 1) -> Tensor:
    """Preprocessed images, Gaussian, float64, of the size that the family's model takes."""
    size = FAMILIES[family][1]["img_size"]
    return torch.randn(num_images, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
