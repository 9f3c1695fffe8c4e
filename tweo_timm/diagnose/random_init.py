"""A model as it was before training: the same architecture with freshly drawn parameters.

The stethoscope compares trained weights with random ones. Where timm's name of the architecture alone gives a model
with the same parameters, that model is it. Otherwise (a loaded model does not carry its constructor's arguments)
parameters are drawn again in place, by the initialisers that timm and PyTorch attach to the modules, after every one
has been filled with NaN: what is NaN afterwards had no initialiser of its own and is drawn by a stated rule, and
reported. The scale may then differ from that of a new model where a family keeps its initialiser inside its constructor
(Hiera, MaxViT). A factory given by the user avoids all this.
"""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import timm
import torch
from timm.layers import trunc_normal_
from torch import nn

from tweo_timm.clipped_softmax import alpha_of, clip_softmax

_GAMMA = re.compile(r"(^|\.)gamma_?\d*$")
_ONES = re.compile(r"(^|\.)(gamma_?\d*|temperature)$")
_SMALL = 0.1


def random_model(model: nn.Module, seed: int) -> tuple[nn.Module, str, dict[str, str]]:
    """Return the architecture with random weights, how it was made, and what was drawn by rule (parameter -> rule).

    Args:
        model: a timm model; it is not changed.
        seed: of the draw; the global random state is left alone.

    Returns:
        The model in float32 on the CPU or wherever `model` is, "created" or "drawn again", and the rules.
    """
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if architecture and timm.is_model(architecture):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            created = timm.create_model(architecture, num_classes=getattr(model, "num_classes", None))
        if _shapes(created) == _shapes(model):
            clip_softmax(created, alpha_of(model))
            return created, "created", {}
    fresh, rules = reinitialised(model, seed)
    return fresh, "drawn again", rules


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def reinitialised(model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, str]]:
    """Return a copy with freshly drawn parameters, and what was drawn by rule (parameter -> rule).

    Args:
        model: a timm model; it is not changed.
        seed: of the draw; the global random state is left alone.
    """
    fresh = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in fresh.parameters():
            parameter.fill_(float("nan"))
        for module in fresh.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        _initialise(fresh)
        rules = {}
        for name, parameter in fresh.named_parameters():
            if bool(parameter.isnan().any()):
                rules[name] = _draw(name, parameter)
    return fresh, rules


def _initialise(model: Any) -> None:
    """Run the model's own initialiser, under the two names that timm gives it."""
    if callable(getattr(model, "init_weights", None)):
        model.init_weights()
    elif (
        callable(getattr(model, "_init_weights", None)) and len(inspect.signature(model._init_weights).parameters) == 1
    ):
        model.apply(model._init_weights)


def _draw(name: str, parameter: nn.Parameter) -> str:
    if _ONES.search(name) or (parameter.ndim == 1 and name.endswith("weight")):
        parameter.fill_(1.0)
        return "1"
    if parameter.ndim == 1:
        parameter.zero_()
        return "0"
    trunc_normal_(parameter, std=0.02)
    return "truncated normal, std 0.02"


def open_blocks(model: nn.Module) -> list[str]:
    """Set every per-channel factor that is constant and at most 0.1 in size to 1, in place, and return their names.

    Such factors (LayerScale at 1e-5, the zero norms of residual post-norm blocks) make a fresh block an identity: its
    output then says nothing about what random weights do.
    """
    opened = []
    norms = {f"{name}.weight" for name, module in model.named_modules() if hasattr(module, "normalized_shape")}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and (name in norms or _GAMMA.search(name)):
                value = parameter[0]
                if bool((parameter == value).all()) and float(value.abs()) <= _SMALL:
                    parameter.fill_(1.0)
                    opened.append(name)
    return opened
