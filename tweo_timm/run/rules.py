"""Rules of settings that several commands have: each is a complaint per setting that cannot be honoured.

A complaint is one sentence that names the flag, the value and the remedy. The rules read any options object that has
the settings they name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tweo_timm.settings import flag_fields

# What float32 holds, and any count of images or updates; beyond it, arithmetic ends in infinities or tracebacks.
_LARGEST = 1e30

MODES = ("RGB", "L", "LA", "RGBA", "CMYK", "YCbCr", "HSV")
"""Of PIL's modes those with 8 bits per channel, which other images can be converted to."""


def option_name(dest: str) -> str:
    """The long option string of a field, for messages."""
    return f"--{dest.replace('_', '-')}"


def out_of_bounds(options: Any) -> Iterator[str]:
    """A complaint for each number that is not finite, too large for any use, or outside the bounds of its flag."""
    for item in flag_fields(options):
        value, bounds = getattr(options, item.name), item.metadata["flag"].bounds
        if isinstance(value, dict) and not all(-_LARGEST <= number <= _LARGEST for number in _numbers(value)):
            yield f"{option_name(item.name)} holds a number that is not finite, or not below {_LARGEST:g}"
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            if not -_LARGEST <= number <= _LARGEST:  # infinite and NaN included
                yield f"{option_name(item.name)} is {value}; it must be finite, and below {_LARGEST:g}"
            if bounds is not None and number not in bounds:
                each = "each" if isinstance(value, list) else "it"
                yield f"{option_name(item.name)} is {value}; {each} must be {bounds}"


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a value, at any depth."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def image_shape(options: Any) -> Iterator[str]:
    """A complaint for each flag that speaks of images of another shape than the others."""
    expected = options.in_chans or (options.input_size[0] if options.input_size else 3)
    if options.input_size is not None:
        channels, *size = options.input_size
        given = f"--input-size {channels} {' '.join(map(str, size))}"
        if channels != expected:
            yield f"--in-chans {expected} contradicts {given}, whose first number is the channels"
        if options.img_size is not None and size != [options.img_size] * 2:
            side = options.img_size
            yield f"--img-size {side} contradicts {given}, which timm takes; use --input-size {channels} {side} {side}"
    for dest in ("mean", "std"):
        values = getattr(options, dest)
        if values is not None and len(values) not in (1, expected):
            yield f"{option_name(dest)} has {len(values)} values; it needs one, or one for each of {expected} channels"


def image_mode(options: Any) -> Iterator[str]:
    """A complaint for images of a mode that a loader cannot pass on: others have no 8 bits per channel."""
    if options.input_img_mode not in (None, *MODES):
        yield f"--input-img-mode {options.input_img_mode} is none that timm's loaders take; use {', '.join(MODES)}"


def regular_expressions(dest: str, *patterns: str | None) -> Iterator[str]:
    """A complaint for each pattern that does not compile; None is no pattern."""
    for pattern in patterns:
        try:
            re.compile(pattern or "")
        except (re.error, OverflowError, RecursionError) as error:
            yield f"{option_name(dest)} {pattern!r} is no regular expression: {error}"


def pooling(options: Any) -> Iterator[str]:
    """A complaint for a pooling that leaves no logits."""
    if options.gp == "":
        yield "--gp '' would leave the features of every place unpooled; leave it out, or give avg, max, token or map"


def target_format(options: Any) -> Iterator[str]:
    """A complaint for a format of targets that the data does not have."""
    if options.target_format == "multihot" and (options.task != "multilabel" or not options.dataset):
        yield "--target-format multihot needs --task multilabel and a --dataset whose samples hold 0/1 vectors"


def scripting(options: Any) -> Iterator[str]:
    """A complaint for each flag of TorchScript, which neither command honours."""
    if options.torchscript:
        yield (
            "--torchscript cannot be honoured: a scripted model runs neither the hooks of TWEO nor FP8 layers; "
            "use --torchcompile (from a file: --no-torchscript)"
        )
    if options.fuser:
        yield f"--fuser {options.fuser} cannot be honoured: it belongs to --torchscript; use --torchcompile, --fuser ''"
