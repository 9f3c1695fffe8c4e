"""Tiny models of timm's own classes, seeded, and the penalised step by plain autograd in float64."""

import copy

import timm
import torch
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import nn

from tweo_timm import TweoConfig, find_blocks

NUM_CLASSES = 6
VIT_ARCH, SWIN_ARCH, MAXVIT_ARCH = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "maxvit_nano_rw_256"
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
MAXVIT = {"img_size": 64, "embed_dim": (32, 32), "depths": (1, 1)}


def build(arch, sizes, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(arch, **{**sizes, "num_classes": NUM_CLASSES, **kwargs})


def tiny_vit(seed=0, **kwargs):
    return build(VIT_ARCH, VIT, seed, **kwargs)


def tiny_swin(seed=0, **kwargs):
    return build(SWIN_ARCH, SWIN, seed, **{"drop_path_rate": 0.0, **kwargs})


def tiny_maxvit(**kwargs):
    """A MaxViT whose blocks return B, C, H, W."""
    return build(MAXVIT_ARCH, MAXVIT, **{"drop_path_rate": 0.0, **kwargs})


def tiny_deit(**kwargs):
    """A ViT with a distillation token, as TokenDistillationTask needs it."""
    return build("deit_tiny_distilled_patch16_224", VIT, **kwargs)


def as_words(sizes):
    """Settings of a model as --model-kwargs takes them."""
    return [f"{name}={value}" for name, value in sizes.items()]


BUILDERS = {"vit": tiny_vit, "swin": tiny_swin, "maxvit": tiny_maxvit}
IMG_SIZES = {"vit": 32, "swin": 32, "maxvit": 64}


def tiny_task(model, **kwargs):
    """timm's classification task in training mode, without its log lines."""
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False, **kwargs)
    task.trainable_module.train()
    return task


def batch(size=4, img_size=32, seed=1):
    """Seeded images and class indices."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, img_size, img_size, generator=generator)
    return images, torch.randint(0, NUM_CLASSES, (size,), generator=generator)


def gradients(module):
    """Gradients by name, as float64 copies."""
    return {name: p.grad.double().clone() for name, p in module.named_parameters() if p.grad is not None}


def largest_relative_error(got, expected):
    """The largest |got - expected| / |expected| over the tensors of two dicts of gradients.

    A gradient that is zero but for rounding (a bias in front of a batch norm) is held against a thousandth of the
    largest one.
    """
    assert got.keys() == expected.keys()
    floor = 1e-3 * max(float(e.norm()) for e in expected.values())
    return max(float((got[name] - e).norm()) / max(float(e.norm()), floor) for name, e in expected.items())


def penalty(outputs, config: TweoConfig):
    """L_TWEO as the paper writes it, by autograd, in float64."""
    powers = [((output.double().abs() / (config.tau + config.eps)) ** config.power) for output in outputs]
    if config.reduction == "element":
        return torch.cat([power.flatten() for power in powers]).mean()
    return torch.stack([power.mean() for power in powers]).mean()


def store_outputs(model):
    """Hook every block to append its output to the list that is returned."""
    outputs = []
    for block in find_blocks(model).values():
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    return outputs


def definition(task, images, targets, config, weight=None, dtype=torch.float64):
    """Do the step that TWEO defines on a copy of a task without TWEO.

    Returns:
        The loss, L_TWEO, the peak, and the gradients of the trained module by name.
    """
    task = copy.deepcopy(task).to(dtype)
    outputs = store_outputs(unwrap_model(task.get_eval_model()))
    targets = targets.to(dtype) if targets.is_floating_point() else targets
    task_loss = task(images.to(dtype), targets)["loss"]
    tweo = penalty(outputs, config)
    (task_loss + (config.weight if weight is None else weight) * tweo).backward()
    peak = max(float(output.detach().abs().max()) for output in outputs)
    return float(task_loss.detach()), float(tweo.detach()), peak, gradients(task.get_trainable_module())
