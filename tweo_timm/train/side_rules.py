"""What the settings of a run with --side must satisfy: complaints, one sentence each.

The model of such a run is a frozen backbone: what changes how a model is trained, and has nothing to change there, is
refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tweo_timm.quant.scheme import Scheme
from tweo_timm.run.rules import option_name
from tweo_timm.settings import flag_fields
from tweo_timm.side.config import PRECISIONS, SideOptions

# Setting -> its value when it is off, and why it does not go with a frozen backbone.
_OF_A_TRAINED_BACKBONE = {
    "tweo_weight": (0.0, "the frozen backbone's activations do not change, so there is nothing to penalize"),
    "tweo_end_weight": (0.0, "the frozen backbone's activations do not change, so there is nothing to penalize"),
    "stop_on_peak": (None, "the frozen backbone's activations do not change"),
    "fp8": ("off", "FP8 is for training a model; for a frozen one give --side-precision bfloat16 or a scheme"),
    "model_dtype": (None, "the side network is trained in float32; for the backbone give --side-precision"),
    "grad_checkpointing": (False, "no activation of the frozen backbone is kept that could be computed again"),
    "layer_decay": (None, "the frozen backbone's layers have no learning rate"),
    "fsdp": (False, "the side network is small, and the frozen backbone has no gradients to share"),
    "drop_block": (None, "the frozen backbone is in eval mode"),
    "drop_path_rule": ("linear", "every attention module of the side network has the rate of --drop-path"),
    "clipped_softmax": (0.0, "a backbone is known by its weights, which do not show it"),
    "bn_momentum": (None, "the frozen backbone is in eval mode"),
    "sync_bn": (False, "the frozen backbone is in eval mode"),
    "split_bn": (False, "the frozen backbone is in eval mode"),
}

# What is done to batches of images -> its value when it is off.
_OF_IMAGES = {
    "mixup": 0.0,
    "cutmix": 0.0,
    "cutmix_minmax": None,
    "aug_splits": 0,
    "aug_repeats": 0.0,
    "train_img_sizes": None,
    "save_images": False,
    "kd_model_name": None,
}


def side_rules(options: Any) -> Iterator[str]:
    """A complaint for each setting that does not go with --side, or does nothing without it."""
    if options.side == "off":
        yield from _useless(options)
        return
    options.side_config(options.drop, options.drop_path or 0.0)
    for dest, (off, reason) in _OF_A_TRAINED_BACKBONE.items():
        value = getattr(options, dest)
        if value != off and not (dest == "model_dtype" and value == "float32"):
            given = "" if value is True else f" {value}"
            yield f"{option_name(dest)}{given} does not go with --side {options.side}: {reason}; leave it out"
    yield from _cache(options)
    if options.kd_model_name is not None and options.kd_distill_type != "logit":
        yield (
            f"--kd-distill-type {options.kd_distill_type} reads features of the model, and --side {options.side} has "
            "those of the frozen backbone; use --kd-distill-type logit"
        )
    if options.side_precision not in PRECISIONS:
        try:
            Scheme.parse(options.side_precision)
        except ValueError as error:
            yield f"--side-precision {options.side_precision} is not {' or '.join(PRECISIONS)}, and no scheme: {error}"


def _cache(options: Any) -> Iterator[str]:
    """A complaint for each setting that asks for images where there are only features."""
    if not (options.side_cache or options.side_grid):
        if options.side_augmentations:
            yield (
                f"--side-augmentations {options.side_augmentations} is about features that are computed once: give "
                "--side-cache DIR too"
            )
        return
    if options.side_grid and not options.experiment:
        yield "--side-grid makes a folder for each combination: name theirs by --experiment NAME"
    flag = "--side-cache" if options.side_cache else "--side-grid"
    if options.no_aug == bool(options.side_augmentations):
        yield (
            f"{flag} computes features once: give --no-aug for images as they are, or --side-augmentations N for "
            "N fixed augmentations of each, not both"
        )
    for dest, off in _OF_IMAGES.items():
        if getattr(options, dest) != off:
            yield f"{option_name(dest)} needs images, and {flag} has their features only; leave one out"


def _useless(options: Any) -> Iterator[str]:
    unset = SideOptions()
    for item in flag_fields(unset):
        if item.name != "side" and getattr(options, item.name) != getattr(unset, item.name):
            yield f"{option_name(item.name)} does nothing without --side; add --side last, or leave it out"
