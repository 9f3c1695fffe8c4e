"""Weights of an earlier training, of ours or of other code, as the beginning of a new one: --pretrained-path.

timm loads what fits and passes over the rest: a file of which nothing fits trains from random weights. Here it is said
how much was loaded, names that other code puts before those of the model are taken off, and a file of which nearly
nothing fits is refused. A head that knows the very classes of the data is kept; timm begins every head anew.

The data decide about the head, and the model is built before they are opened: hence `settle_head`.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tweo_timm.run.checkpoint_file import CheckpointFile, read
from tweo_timm.run.class_names import Names, check_same_names, recorded_names
from tweo_timm.train.options import TrainOptions

_logger = logging.getLogger(__name__)

WRAPPERS = ("teacher", "student", "module", "backbone", "encoder", "model", "visual")
"""What other code calls a model inside its own, as an entry of a file or before the names of tensors; teachers first,
as they are what self-supervised training is for."""
_WRAPPED = re.compile(rf"(?:(?:{'|'.join(WRAPPERS)})\.)+")
_LEAST = 0.1  # of the model's tensors, that a file has to have
_SHOWN = 4

Build = Callable[[Mapping[str, Any]], nn.Module]


def build_from_file(file: CheckpointFile, build: Build, bare: Callable[[], nn.Module]) -> nn.Module:
    """Build a model with the weights of a file, under timm's rules for pretrained weights, and say what was loaded.

    Args:
        file: read for its weights.
        build: makes the model, given further entries of its pretrained configuration.
        bare: makes it with initial weights; called for its names alone, where the file's may begin otherwise.

    Raises:
        ValueError: if nearly nothing of the file fits the model.
    """
    weights, entry = _found(file)
    wrapped = any(_WRAPPED.match(name) for name in weights)
    prefix = _prefix(weights, bare().state_dict()) if wrapped else ""
    if prefix:
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    model, missing = _built(build, {"state_dict": weights} if entry or prefix else {"file": str(file.path)})
    state = model.state_dict()
    file.check(weights, state)
    if missing is not None:  # else a format of the architecture's own, loaded whole or not at all
        _report(file.path, state, missing, weights, f"{entry}." * bool(entry) + prefix)
    return model


def _found(file: CheckpointFile) -> tuple[dict[str, Tensor], str]:
    """The weights of a file that timm's loader would take, or of the model inside it, with that entry's name."""
    content = file.fields.mapping
    known = any(name in content for name in ("state_dict", "model", "state_dict_ema", "model_ema"))
    entry = "" if known else next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), "")
    if entry:
        file = CheckpointFile(file.path, content[entry], "weights")
    return file.ema or file.weights, entry


def _built(build: Build, entries: Mapping[str, Any]) -> tuple[nn.Module, Collection[str] | None]:
    """The model, and which of its tensors are not from the file; None where timm does not load by name."""
    with _noting_loads() as missing:
        model = build(entries)
    configuration: Any = model.pretrained_cfg
    if "state_dict" in entries:
        configuration["state_dict"] = None  # as large as the model
    return model, missing[-1] if missing else None


@contextlib.contextmanager
def _noting_loads() -> Iterator[list[list[str]]]:
    """Note which tensors of a model each load_state_dict meanwhile does not find; timm says so in its log only."""
    original, found = nn.Module.load_state_dict, []

    def noting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        found.append(list(result.missing_keys))
        return result

    nn.Module.load_state_dict = noting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        nn.Module.load_state_dict = original  # type: ignore[method-assign]


def _prefix(weights: Collection[str], names: Collection[str]) -> str:
    """What to take off the names of a file so that more of them are a model's; empty if that would not help.

    timm's own loaders know some such names too (`visual.` of OpenCLIP), which lead to others than a model's.
    """
    wrapped = {match[0] for match in map(_WRAPPED.match, weights) if match}
    in_order = sorted(wrapped, key=lambda prefix: (WRAPPERS.index(prefix.split(".")[0]), prefix))  # of equals the first
    counts = {
        prefix: sum(name.startswith(prefix) and name.removeprefix(prefix) in names for name in weights)
        for prefix in in_order
    }
    best, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    return best if count > sum(name in names for name in weights) else ""


def _report(
    path: Path, names: Collection[str], missing: Collection[str], weights: Collection[str], taken_off: str
) -> None:
    loaded, size = len(names) - len(missing), len(names)
    if loaded < _LEAST * size:
        raise ValueError(
            f"--pretrained-path {path}: {loaded} of the model's {size} tensors are in it, so it would be trained from "
            f"random weights. The file has {_list(weights)}; pass weights of this architecture"
        )
    _logger.info(
        "Loaded %d of %d tensors from %s%s%s",
        *(loaded, size, path, f", whose names begin with {taken_off} there" if taken_off else ""),
        f"; these are new: {_list(dict.fromkeys(name.rpartition('.')[0] or name for name in missing))}" * bool(missing),
    )


def _list(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_SHOWN])
    return shown + f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN) if names else "nothing"


def settle_head(options: TrainOptions, model: nn.Module, now: Names | None) -> None:
    """Keep the head of a file of weights if its classes are those of the data, and say whether it was kept.

    Args:
        options: which file, if any.
        model: built from it.
        now: class names of the data, by index; None if they have none.
    """
    if options.initial_checkpoint:
        _compare(Path(options.initial_checkpoint), now)
    if not options.pretrained_path or Path(options.pretrained_path).suffix in (".npz", ".npy"):
        return
    path = Path(options.pretrained_path)
    trained = recorded_names(read(path, "metadata").fields.mapping)
    if trained is None:
        _logger.info("The head begins anew: %s names no classes", path)
    elif now is None or list(trained) != list(now):
        _logger.info("The head begins anew: the %d classes of %s are not those of the data", len(trained), path)
    elif options.head_init_scale is not None or options.head_init_bias is not None:
        _logger.info("The head begins anew, as --head-init-scale and --head-init-bias say")
    elif _keep_head(model, path):
        _logger.info("The head is kept: the classes of %s are those of the data, by name", path)
    else:
        _logger.info("The head begins anew: %s has none of this form", path)


def _compare(path: Path, now: Names | None) -> None:
    try:
        trained = recorded_names(read(path, "metadata").fields.mapping)
        check_same_names(trained, now, str(path), "its head is kept, and learns them anew")
    except ValueError as error:
        _logger.warning("%s", error)


def _keep_head(model: nn.Module, path: Path) -> bool:
    """Give a model the head of a file, if it has one of its shape."""
    configuration: Any = model.pretrained_cfg
    classifiers = configuration.get("classifier") or ()
    state = model.state_dict()
    weights, _ = _found(read(path, "weights"))
    prefix = _prefix(weights, state)
    parts = [classifiers] if isinstance(classifiers, str) else classifiers
    names = [name for part in parts for name in (f"{part}.weight", f"{part}.bias") if name in state]
    head = {name: weights[prefix + name] for name in names if prefix + name in weights}
    if not names or any(name not in head or head[name].shape != state[name].shape for name in names):
        return False
    model.load_state_dict(head, strict=False)
    return True
