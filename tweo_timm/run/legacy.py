"""Names that timm's training script once used, and what they are now.

args.yaml files outlive the script that wrote them, and those on the model hub go back to 2020. What only changed its
name is renamed, what the run no longer needs is dropped and reported, and what belonged to the process that wrote the
file (its rank, its device count) never enters another run.

Source: timm's training script through its releases; the equivalences are stated beside each name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

Values = dict[str, Any]

# What the launcher and the device decide, written by scripts that saved their arguments after start-up.
_OF_THE_PROCESS = (
    *("local_rank", "rank", "world_size", "distributed", "dist_backend", "dist_url", "num_gpu", "gpu"),
    *("prefetcher", "use_amp", "amp_impl", "config", "config_unknown", "print_config"),
)
# Options of libraries or experiments that timm has dropped; none changes what is trained.
_RETIRED = ("aot_autograd", "bench_labeler", "eval_checkpoint")
# What a file of timm 1.0.31 leaves to the task by a null.
_LEFT_OPEN = ("eval_metric", "smoothing")
_OLD_VALUES = {("eval_metric", "prec1"): "top1", ("eval_metric", "prec5"): "top5"}


@dataclass
class Modernized:
    """The values under today's names, and what happened to the others."""

    values: Values
    renamed: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def modernize(values: Values, known: Container[str]) -> Modernized:
    """Translate the keys of an older args.yaml.

    Args:
        values: What the file holds.
        known: The keys that a file may set today.
    """
    result = Modernized(dict(values))
    if "world_size" in values and re.fullmatch(r"cuda:\d+", str(values.get("device"))):
        # The device that start-up gave to one of several processes.
        result.values["device"] = "cuda"
        result.renamed.append(f"device={values['device']} -> cuda")
    for (key, old_value), value in _OLD_VALUES.items():
        if values.get(key) == old_value:
            result.values[key] = value
            result.renamed.append(f"{key}={old_value} -> {value}")
    for key in _LEFT_OPEN:
        if key in values and values[key] is None:
            del result.values[key]
    for old in sorted(_TRANSLATIONS.keys() & values.keys()):
        _translate(old, result, known)
    for old in (*_OF_THE_PROCESS, *_RETIRED):
        if old in result.values and old not in known:
            del result.values[old]
            result.ignored.append(old)
    return result


def _translate(old: str, result: Modernized, known: Container[str]) -> None:
    value = result.values.pop(old)
    switched_on = value not in (None, False)
    updates = _TRANSLATIONS[old](value, result.values) if switched_on else {}
    result.values.update(updates)
    if updates:
        result.renamed.append(f"{old} -> {', '.join(updates)}")
    elif switched_on or old not in known:
        result.ignored.append(old)


def _rename(new: str) -> Callable[[Any, Values], Values]:
    def translate(value: Any, values: Values) -> Values:
        return {} if values.get(new) else {new: value}

    return translate


def _bn_tf(value: Any, values: Values) -> Values:
    # TensorFlow's batch normalization, as timm defined the flag.
    defaults = {"bn_momentum": 1 - 0.99, "bn_eps": 1e-3}
    return {key: default for key, default in defaults.items() if values.get(key) is None}


def _validation_batch(value: Any, values: Values) -> Values:
    if value == 1 or values.get("validation_batch_size") is not None or not isinstance(values.get("batch_size"), int):
        return {}
    return {"validation_batch_size": value * values["batch_size"]}


_TRANSLATIONS: dict[str, Callable[[Any, Values], Values]] = {
    "native_amp": lambda value, values: {} if values.get("amp") else {"amp": True},
    # Apex is gone; autocast is what timm itself put in its place.
    "apex_amp": lambda value, values: {} if values.get("amp") else {"amp": True},
    "jsd": _rename("jsd_loss"),
    "mixup_elem": lambda value, values: {"mixup_mode": "elem"},
    "drop_connect": _rename("drop_path"),
    "validation_batch_size_multiplier": _validation_batch,
    "bn_tf": _bn_tf,
    # Loader processes start anew every epoch here, whatever timm's default.
    "persistent_workers": lambda value, values: {},
}
