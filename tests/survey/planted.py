"""Tiny models with faults planted in them, and a judge who wants what the planted model itself says in float."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from tests.quant.families import make_images, make_model
from tweo_timm.survey.bench import Bench

FIRST = {"vit": "blocks.0", "swin": "layers.1.blocks.0"}
SECOND = {"vit": "blocks.1", "swin": "layers.1.blocks.1"}


def value(model, family):
    """A stored value of 9e4."""
    model.get_submodule(SECOND[family]).mlp.fc2.bias[3] = 9e4


def square(model, family):
    """A value whose square float16 does not hold."""
    model.get_submodule(FIRST[family]).mlp.fc2.bias[3] = 300.0


def residual(model, family):
    """A channel of the stream that stands out between two blocks."""
    size = {"vit": 30.0, "swin": 80.0}[family]
    model.get_submodule(FIRST[family]).mlp.fc2.bias[3] += size
    model.get_submodule(SECOND[family]).mlp.fc2.bias[3] -= size


BAD = {"vit": "blocks.1", "swin": "layers.1.blocks.0"}


def felt_layer(model, family):
    """A bad layer of an attention that looks somewhere, and that the model feels."""
    attention = model.get_submodule(BAD[family]).attn
    width = attention.proj.weight.shape[1]
    attention.qkv.weight[: 2 * width] *= 10.0
    attention.proj.weight *= {"vit": 1.0, "swin": 16.0}[family]
    attention.qkv.weight[2 * width :] *= 2.0**10
    attention.qkv.bias[2 * width :] *= 2.0**10
    attention.proj.weight *= 2.0**-10


def bad_layer(model, family, exponent=10):
    """Rows of v times 2^k, columns of proj times 2^-k: the same function."""
    attention = model.get_submodule(SECOND[family]).attn
    width = attention.proj.weight.shape[1]
    attention.qkv.weight[2 * width :] *= 2.0**exponent
    attention.qkv.bias[2 * width :] *= 2.0**exponent
    attention.proj.weight *= 2.0**-exponent


def worse_layer(model, family):
    """The same, far enough for float16."""
    bad_layer(model, family, 17)


def inner(model, family):
    """A value of 9e4 inside an MLP."""
    mlp = model.get_submodule(SECOND[family]).mlp
    mlp.fc1.bias[3] = 9e4
    mlp.fc2.weight[:, 3] = 1e-6


def embedding(model, family):
    """A value of 7e4 where the images enter; Swin's own norm follows, before anything is added to it."""
    model.patch_embed.proj.bias[3] = 7e4


def logits(model, family):
    """Logits of an attention that is not fused, above what float16 holds; q and k are not."""
    attention = model.get_submodule(SECOND[family]).attn
    width = attention.proj.weight.shape[1]
    attention.fused_attn = False
    attention.qkv.weight[: 2 * width] *= 2.0**9
    attention.qkv.bias[: 2 * width] *= 2.0**9


def sound(model, family):
    """Nothing."""


def bench(plant, family, max_drop=4.0, num_images=64, **how):
    """A bench with a planted model."""
    model, images = make_model(family), make_images(family, num_images)
    with torch.no_grad():
        plant(model, family)
        wanted = model(images).argmax(-1)

    def judge(judged, label):
        with torch.inference_mode():
            outputs = torch.cat([judged(part) for part in images.split(64)])
        finite = outputs.isfinite().all(-1)
        return SimpleNamespace(correct=outputs.argmax(-1) == wanted, not_finite=int((~finite).sum()))

    samples = [images[:16], images[16:32]]
    return Bench(model=model, judge=judge, calibration=samples, samples=samples, max_drop=max_drop, **how)
