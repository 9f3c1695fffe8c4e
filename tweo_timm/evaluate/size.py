"""How large the images of a checkpoint are: as in its training, or as is asked for now.

Three settings of timm speak of it: --img-size, --input-size, which says the channels too, and the architecture's own
img_size among --model-kwargs. Where weights have the size in their shape (position embeddings), they fit only a model
of the training's, which is then resized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from timm.layers import to_2tuple
from timm.models import get_model_input_config

from tweo_timm.evaluate.options import ValidateOptions


def channels_of(settings: Mapping[str, Any]) -> int | None:
    """Return how many channels some settings give images; None if they do not say."""
    channels: int | None = settings.get("in_chans") or (settings.get("input_size") or [None])[0]
    return channels


def size_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some settings that say how large images are; empty if none does."""
    sizes = {name: settings[name] for name in ("img_size", "input_size") if settings.get(name)}
    inner = (settings.get("model_kwargs") or {}).get("img_size")
    return sizes | ({"model_kwargs": {"img_size": inner}} if inner else {})


def at_size(options: ValidateOptions, size: Mapping[str, Any]) -> ValidateOptions:
    """Return the options with images as large as `size_of` found, or, if that is empty, as the architecture says."""
    others = {name: value for name, value in options.model_kwargs.items() if name != "img_size"}
    unsized = replace(options, img_size=None, input_size=None, model_kwargs=others)
    return replace(unsized, **{**size, "model_kwargs": {**others, **size.get("model_kwargs", {})}})


def resize(model: Any, arch: str, options: ValidateOptions) -> None:
    """Let a model that is built for images of one size take those that the options ask for, as timm resizes it.

    Args:
        model: a timm model with its weights; one that takes images of any size is left as it is.
        arch: its name, for the message.
        options: what was asked for.

    Raises:
        ValueError: if timm cannot resize it.
    """
    size = size_of(vars(options))
    wanted = size.get("input_size", [])[1:] or size.get("img_size") or size.get("model_kwargs", {}).get("img_size")
    built = get_model_input_config(model)
    if not wanted or not built["fixed_input_size"] or to_2tuple(wanted) == tuple(built["input_size"][1:]):
        return
    height, width = to_2tuple(wanted)
    try:
        model.set_input_size(img_size=(height, width))
    except (AttributeError, AssertionError, TypeError, ValueError, RuntimeError) as error:
        before = "x".join(map(str, built["input_size"][1:]))
        raise ValueError(
            f"{arch} is built for images of {before} and cannot be changed to {height}x{width} ({error}): leave out "
            "--img-size and --input-size"
        ) from error
