"""The precision of a run: what --amp-dtype auto means here, and a word where a precision is slow."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from tweo_timm import machine
from tweo_timm.run.options import PrecisionOptions
from tweo_timm.run.world import World

_logger = logging.getLogger(__name__)

Options = TypeVar("Options", bound=PrecisionOptions)


def resolve_precision(options: Options, world: World, began: Mapping[str, Any] | None = None) -> Options:
    """Replace --amp-dtype auto by what it means on this machine, and warn where --amp makes a run slower.

    The first process decides for all, by timing a product. A run that is continued keeps the precision that it began
    with, on any machine: another one would not be the same run.

    Args:
        options: of a command.
        world: the processes; a collective where there are several.
        began: the settings of the run that is continued; None, or without these two, for a new one.

    Returns:
        The options with `amp` and `amp_dtype` as timm knows them.
    """
    if not options.amp:
        return replace(options, amp_dtype="float16") if options.amp_dtype == "auto" else options
    if options.amp_dtype != "auto":
        _warn_if_slow(options.amp_dtype, world)
        return options
    amp, dtype = (began.get("amp"), began.get("amp_dtype")) if began is not None else (None, None)
    if isinstance(amp, bool) and dtype in ("float16", "bfloat16"):
        why = "as this run began"
    else:
        fast, ratio = world.gather(machine.low_precision("bfloat16", str(world.device)) if world.primary else None)[0]
        amp, dtype = fast, "bfloat16" if fast else "float16"
        why = f"bfloat16 products take {ratio:.2g} times as long as float32 ones here"
    if world.primary:
        _logger.info("--amp-dtype auto: %s (%s)", dtype if amp else "float32, no autocast", why)
    return replace(options, amp=amp, amp_dtype=dtype)


def precision_of(options: Any) -> str:
    """Name the precision of the forward passes: 'bfloat16 autocast', 'float32', ..."""
    return f"{options.amp_dtype} autocast" if options.amp else options.model_dtype or "float32"


def _warn_if_slow(dtype: str, world: World) -> None:
    if not world.primary or world.device.type != "cpu":
        return
    fast, ratio = machine.low_precision(dtype)
    if not fast:
        _logger.warning(
            "--amp --amp-dtype %s: this processor multiplies %s matrices %.3g times slower than float32 ones; use "
            "--amp-dtype auto, or --no-amp",
            dtype,
            dtype,
            ratio,
        )
