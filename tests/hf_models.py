"""Tiny models of transformers with random weights, and images for them."""

import pytest
import torch

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
MLP = {"intermediate_size": 64}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}

# name -> class, class of its configuration, configuration, names of its blocks
MODELS = {
    "vit": ("ViTForImageClassification", "ViTConfig", {**SIZES, **MLP, "num_labels": 6}, "vit.layers.{}"),
    "dinov2": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {**SIZES, "mlp_ratio": 2, "num_labels": 6},
        "dinov2.encoder.layer.{}",
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**SIZES, **MLP, "num_register_tokens": 2}, "model.layer.{}"),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", {**SIZES, **MLP}, "encoder.layers.{}"),
    "siglip": (
        "SiglipVisionModel",
        "SiglipVisionConfig",
        {**SIZES, **MLP, "vision_use_head": False},
        "encoder.layers.{}",
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {**SWIN, "num_labels": 6, "drop_path_rate": 0.0},
        "swin.encoder.layers.{}.blocks.0",
    ),
}


def make(name, **kwargs):
    """A model in evaluation mode whose parameters are drawn again, so that gains, shifts and scales are not trivial."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install '.[transformers]'"
    )
    cls, config, sizes, _ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**{**sizes, **kwargs})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.15))
    return model


def images(count=4, seed=1):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def answer(output):
    """The tensor that a user of the model reads."""
    return output.logits if "logits" in output else output.last_hidden_state
