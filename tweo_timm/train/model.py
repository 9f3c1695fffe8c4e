"""The model of a training run: timm's create_model with the run's options, on its device."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import DropPath, convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import create_model, resolve_model_input_args
from torch import nn

from tweo_timm.run.checkpoint_file import CheckpointFile, WeightsFilter, check_finite, load_weights, read
from tweo_timm.run.model import (
    check_image_size,
    clip_as_asked,
    clipped_in,
    refuse_clipped,
    suggest_model,
    without_classifier,
)
from tweo_timm.run.world import World
from tweo_timm.suggestion import suggest_path
from tweo_timm.train.options import TrainOptions, as_namespace
from tweo_timm.train.pretrained import build_from_file

_logger = logging.getLogger(__name__)


def build_model(options: TrainOptions, world: World) -> nn.Module:
    """Create the model that is trained, with checkpointing, head initialisation and batch norm as asked for.

    Args:
        options: the run's options.
        world: its device is where the model goes; synchronised batch norm needs `world.distributed`.

    Raises:
        ValueError: if timm does not know the model, or the model does not accept the options.
    """
    if options.fast_norm:
        set_fast_norm()
    model = create(options)
    if options.drop_path_rule == "constant":
        _drop_everywhere(model, float(options.drop_path or 0))
    initialise_head(model, options)
    if options.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)  # type: ignore[operator]
    if options.split_bn:
        model = convert_splitbn_model(model, max(options.aug_splits, 2))
    dtype = getattr(torch, options.model_dtype) if options.model_dtype else None
    model.to(device=world.device, dtype=dtype)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    if world.distributed and options.sync_bn:
        if world.device.type == "cpu":
            raise ValueError("--sync-bn needs GPUs: torch synchronises batch norm on CUDA only; use --dist-bn reduce")
        options_bn = "" if options.split_bn else options.dist_bn
        _logger.info("Synchronised batch norm%s", f"; --dist-bn {options_bn} has nothing to do" if options_bn else "")
        model = convert_sync_batchnorm(model)
    count = sum(parameter.numel() for parameter in model.parameters())
    _logger.info("Model %s: %.2f M parameters", options.model, count / 1e6)
    return model


def create(options: TrainOptions, headless: bool = False) -> nn.Module:
    """Create timm's model with its initial weights.

    Args:
        options: the run's options.
        headless: without a classifier and without regularization, for a frozen backbone; a classifier among the
            weights is left out.

    Raises:
        ValueError: if timm does not know the model, or it does not accept the options or the weights.
    """
    given = _file_of_weights(options)
    _compare_clipping(options, headless)
    build = functools.partial(_built, options, headless)
    bare = functools.partial(_built, replace(options, pretrained=False, pretrained_path=None), headless)
    model = build() if given is None else build_from_file(given, build, bare)
    if given is not None:
        check_finite(model, given.path)
    if options.initial_checkpoint:
        _load_initial(model, options, without_classifier if headless else None)
    return model


def _built(options: TrainOptions, headless: bool, file: Mapping[str, Any] | None = None) -> nn.Module:
    """Let timm make the model; `file` says in its pretrained configuration which weights it begins with."""
    weights = {**file, "num_classes": -1} if file is not None else {}
    overlay = {**weights, **options.pretrained_cfg_overlay}
    try:
        arguments = resolve_model_input_args(
            options.model,
            vars(as_namespace(options)),
            pretrained=options.pretrained,
            num_classes=0 if headless else options.num_classes,
            drop_rate=0.0 if headless else options.drop,
            drop_path_rate=None if headless else options.drop_path,
            drop_block_rate=options.drop_block,
            global_pool=options.gp,
            bn_momentum=options.bn_momentum,
            bn_eps=options.bn_eps,
            pretrained_cfg_overlay=overlay or None,
            **options.model_kwargs,
        )
        model: nn.Module = create_model(**arguments)
    except Exception as error:  # whatever odd weights or an odd argument of an architecture lead to
        raise ValueError(_why_not(options, error)) from error
    clip_as_asked(model, options.model, options.clipped_softmax)
    return model


def _compare_clipping(options: TrainOptions, frozen: bool) -> None:
    """Say where the weights that a run begins with were trained under another softmax; a frozen one cannot adapt."""
    flag, path = _beginning(options)
    if not path or Path(path).suffix in (".npz", ".npy"):
        return
    file = read(Path(path), "metadata")
    if frozen:
        refuse_clipped(file, flag)
    trained = clipped_in(file)
    if trained is not None and trained != options.clipped_softmax:
        _logger.warning(
            "%s %s was trained with --clipped-softmax %g, and this model computes with %g: it begins as another "
            "function",
            *(flag, path, trained, options.clipped_softmax),
        )


def _drop_everywhere(model: nn.Module, rate: float) -> None:
    """Give every drop path of the model the same rate; timm's grow with the depth, and the first is none at all."""
    names, kinds = ("drop_path", "drop_path1", "drop_path2"), (DropPath, nn.Identity, type(None))
    places = [(module, n) for module in model.modules() for n in names if isinstance(getattr(module, n, 0), kinds)]
    if not places:
        raise ValueError("--drop-path-rule constant: this model has no drop path; leave it out")
    for module, name in places:
        setattr(module, name, DropPath(rate))


def _load_initial(model: nn.Module, options: TrainOptions, filter_fn: WeightsFilter | None) -> None:
    try:
        load_weights(model, Path(options.initial_checkpoint), filter_fn=filter_fn)
    except RuntimeError as error:
        raise ValueError(_why_not(options, error)) from error


def _beginning(options: TrainOptions) -> tuple[str, str]:
    """The flag that names the weights that a run begins with, and their file; "" for none."""
    if options.initial_checkpoint:
        return "--initial-checkpoint", options.initial_checkpoint
    return "--pretrained-path", options.pretrained_path or ""


def _file_of_weights(options: TrainOptions) -> CheckpointFile | None:
    """Look at the file of --pretrained-path, which timm loads, and whether one of the two flags names none."""
    flag, path = _beginning(options)
    if path and not Path(path).is_file():
        raise ValueError(f"{flag} {path} does not exist: pass a file of weights{suggest_path(path)}")
    return read(Path(path), "weights") if path and not options.initial_checkpoint else None


def _why_not(options: TrainOptions, error: Exception) -> str:
    text = str(error) or type(error).__name__
    if "Unknown model" in text:
        near = suggest_model(options.model, error)
        return f"--model {options.model}: timm knows no such model; timm.list_models('*vit*') lists names{near}"
    weights = options.initial_checkpoint or options.pretrained_path
    if options.pretrained and isinstance(error, OSError):
        return f"--pretrained: no weights of {options.model} to be had; give --pretrained-path FILE. {text[:400]}"
    if "state_dict" in text or "size mismatch" in text:
        reason = " ".join(text.split())[:300]
        return f"the weights in {weights} do not fit {options.model}: {reason}{_how_to_adapt(options)}"
    if "Conflicting input" in text:
        return f"{text} To let --img-size and --input-size decide, leave img_size out of --model-kwargs"
    return f"{options.model} does not accept these options (--model-kwargs {options.model_kwargs}): {text[:400]}"


def _how_to_adapt(options: TrainOptions) -> str:
    if not options.initial_checkpoint:
        return ""
    return (
        f". --pretrained --pretrained-path {options.initial_checkpoint} adapts them: other classes get a new head, "
        "images of another size resized embeddings"
    )


def initialise_head(model: Any, options: TrainOptions) -> None:
    """Scale the head's weights and set its bias, as --head-init-scale and --head-init-bias say."""
    if options.head_init_scale is None and options.head_init_bias is None:
        return
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
    with torch.no_grad():
        for head in heads:
            if options.head_init_scale is not None:
                head.weight.mul_(options.head_init_scale)
                head.bias.mul_(options.head_init_scale)
            if options.head_init_bias is not None:
                nn.init.constant_(head.bias, options.head_init_bias)


def check_image_sizes(options: TrainOptions, model: nn.Module, input_size: Sequence[int]) -> None:
    """Try the model at the size of the run and at each of --train-img-sizes.

    Raises:
        ValueError: if it does not accept one of them.
    """
    check_image_size(options.model, model, input_size)
    for size in options.train_img_sizes or ():
        try:
            check_image_size(options.model, model, (input_size[0], size, size))
        except ValueError as error:
            remedy = "a ViT needs --model-kwargs dynamic_img_size=true"
            raise ValueError(f"--train-img-sizes {size}: {error}; {remedy}") from error
