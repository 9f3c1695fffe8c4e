"""What a checkpoint decides about its validation: the options of its training without which its weights mean nothing.

Every option of training says what it decides (`tweo_timm.settings.Decides`). Those that decide the model, its input or
its labels are taken over under the same name, and a few under another, unless the command line gives them. All others
do not matter to a validation, which asks for its data anew, computes in its own precision and writes elsewhere.

timm's validate.py takes nothing over. Checkpoints of other code hold options of timm's names and other meanings: what
does not parse is left out, with a line.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.evaluate.size import channels_of
from tweo_timm.run import options as shared
from tweo_timm.run.flags import Option, convert, freeze, option_table
from tweo_timm.run.legacy import modernize
from tweo_timm.run.rules import option_name
from tweo_timm.settings import Decides

_logger = logging.getLogger(__name__)

KINDS = (Decides.MODEL, Decides.INPUT, Decides.LABELS)
_GROUPS = (
    shared.DatasetOptions,
    shared.TargetOptions,
    shared.ModelOptions,
    shared.NormOptions,
    shared.ImageOptions,
)
OTHERS = {"val_split": "split", "val_num_samples": "num_samples", "tweo_blocks": "tweo_blocks"}
"""What is taken over besides: training's name -> validate.py's."""
ELSEWHERE = {
    "model": "is the architecture, which a checkpoint says by itself",
    **dict.fromkeys(
        ("side", "side_rank", "side_gap", "side_modules", "side_heads", "side_precision", "side_calibration_images"),
        "is what a checkpoint's entry `side` says",
    ),
    "split_bn": "leaves the auxiliary statistics of other splits out when loading",
}
"""What decides the model, its input or its labels and is not taken over as an option, and what becomes of it."""
# Where in a dataset something is: of no use for another one.
_OF_THE_DATASET = ("input_key", "target_key", "target_format", "val_split", "val_num_samples")
_OF_SEVERAL_LABELS = ("multilabel_threshold", "target_format")


def inheritable() -> dict[str, str]:
    """Return the options of training that are taken over: training's name -> validate.py's."""
    shared_names = [
        name for group in _GROUPS for name, option in option_table(group).items() if option.decides in KINDS
    ]
    return {**{name: name for name in shared_names}, **OTHERS}


def recorded_settings(args: Any, path: Path | None) -> dict[str, Any]:
    """Read the options that a training has left in its checkpoint.

    Args:
        args: the entry `args` of a checkpoint: a namespace, a mapping, or whatever other code puts there.
        path: of the checkpoint, for messages.

    Returns:
        What may be taken over, under training's names and of the types of their flags, unset ones left out. The values
        of foreign code that are no values of these flags are left out too, with a line.
    """
    raw = dict(args) if isinstance(args, Mapping) else dict(getattr(args, "__dict__", {}))
    table, names = option_table(ValidateOptions), inheritable()
    recorded: dict[str, Any] = {}
    for name, value in _in_timms_way(modernize(raw, table).values).items():
        unset = value is None or (isinstance(value, str | list | tuple | dict) and not value)
        if unset or name not in (*names, "dataset"):
            continue
        option = table[names.get(name, name)]
        try:
            recorded[name] = _read(option, value)
        except ValueError as error:
            _logger.warning(
                "checkpoint %s says %s = %r, which %s does not take (%s): left out",
                *(path, name, value, option_name(option.dest), error),
            )
    return recorded


def _read(option: Option, value: Any) -> Any:
    """A recorded value as its flag has it."""
    read = freeze(convert(option, list(value) if isinstance(value, tuple) else value))
    for number in read if isinstance(read, tuple) else [read]:
        bounds = option.flag.bounds
        if bounds is not None and number not in bounds:
            raise ValueError(f"it must be {bounds}")
    return list(read) if option.is_list else read


def _in_timms_way(values: dict[str, Any]) -> dict[str, Any]:
    """Say image sizes as timm does: DeiT and MAE write input_size=224, others img_size=[224, 224]."""
    size, shape = values.get("img_size"), values.get("input_size")
    changed: dict[str, Any] = {}
    if isinstance(shape, int):
        changed = {"input_size": None, "img_size": shape}
    elif isinstance(size, list | tuple) and len(size) == 2:
        changed = {"img_size": None, "input_size": [channels_of({**values, "input_size": shape}) or 3, *size]}
    return {**values, **changed}


def inherit(recorded: Mapping[str, Any], options: ValidateOptions, path: Path | None) -> dict[str, Any]:
    """Return what a training's settings change in the options of its checkpoint's validation, sizes apart.

    Args:
        recorded: as `recorded_settings` returns them.
        options: those of the command.
        path: of the checkpoint, for messages.
    """
    changes: dict[str, Any] = {}
    default = ValidateOptions()
    foreign = recorded.get("dataset", "") != options.dataset
    for name, dest in inheritable().items():
        if name not in recorded or dest in ("img_size", "input_size", "in_chans"):
            continue
        value, now = recorded[name], getattr(options, dest)
        if isinstance(now, dict):
            changes[dest] = {**value, **now}
        elif dest in options.given or now != getattr(default, dest) or now == value:
            if now != value and dest == "clipped_softmax":
                _logger.warning(
                    "%s was trained with %s %g, and is computed with %g", *(path, option_name(dest), value, now)
                )
            continue
        elif foreign and name in _OF_THE_DATASET:
            _logger.info("%s: %s %s of the training is left out: this is another dataset", path, name, value)
        else:
            changes[dest] = value
    if changes.get("task", options.task) != "multilabel":
        changes = {dest: value for dest, value in changes.items() if dest not in _OF_SEVERAL_LABELS}
    found = {dest: value for dest, value in changes.items() if value != getattr(options, dest)}
    if found:
        words = (f"{option_name(dest)} {value}" for dest, value in found.items())
        _logger.info("%s: as in its training: %s", path, ", ".join(words))
    return found
