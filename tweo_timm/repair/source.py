"""The checkpoint that is repaired: its model, what the file says of itself, and which of its weights are taken.

A file may hold two sets of weights, raw and averaged (EMA). timm's loader takes the averaged ones, so these are
repaired, and the other set is dropped with the optimizer's state, which stands in the old basis: both are said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import create_model, get_pretrained_cfg, resolve_model_input_args
from torch import Tensor, nn

from tweo_timm.repair.options import RepairOptions
from tweo_timm.run.checkpoint_file import CheckpointFile, read
from tweo_timm.run.model import suggest_model
from tweo_timm.suggestion import suggest_path

_EMA = ("state_dict_ema", "model_ema")
_RAW = ("state_dict", "model")
_IMAGE_SETTINGS = ("mean", "std", "crop_pct", "interpolation")


@dataclass
class Source:
    """A model with its weights, and where they came from.

    Attributes:
        path: the file.
        digest: of its bytes, SHA-256.
        arch: timm's name of the architecture.
        arguments: what `timm.create_model` needs beside the name to build it.
        model: in evaluation mode, on the CPU, in the dtype of the weights.
        taken: which weights of the file these are: "state_dict_ema", "state_dict", or "" for a file of weights alone.
        dropped: what else the file holds that the output will not.
        settings: the training's own, as far as the file has them.
        class_names: if the file says.
    """

    path: Path
    digest: str
    arch: str
    arguments: dict[str, Any]
    model: nn.Module
    taken: str
    dropped: list[str]
    settings: dict[str, Any]
    class_names: Any

    def build(self, checkpoint: Path | None = None) -> nn.Module:
        """Build the architecture again, with plain timm, from a file of weights or with its initial ones."""
        file = {} if checkpoint is None else {"checkpoint_path": str(checkpoint)}
        model: nn.Module = create_model(self.arch, **self.arguments, **file)
        return model


def read_source(options: RepairOptions) -> Source:
    """Load the checkpoint into the architecture that it says, or that the options name.

    Raises:
        ValueError: if the file cannot be read, or its weights do not fit.
    """
    path = Path(options.checkpoint)
    if not path.is_file():
        raise ValueError(f"--checkpoint {path} does not exist: pass a file of weights{suggest_path(path)}")
    content, weights = _read(path)
    own = content.get("arch") or ""
    if own and options.model not in ("", own):
        raise ValueError(f"--checkpoint {path} holds a {own}, not a {options.model}: leave out --model, or name it so")
    if not own and not options.model:
        raise ValueError(f"--checkpoint {path} does not say its architecture: pass --model NAME")
    arch = options.model or own
    settings = content["args"]
    _refuse_clipped(path, settings)
    arguments = _arguments(arch, options, settings, weights)
    taken = next((key for key in (*_EMA, *_RAW) if content.get(key) is not None), "")
    found = {"another set of weights": [*_EMA, *_RAW], "the optimizer's state": ["optimizer"]}
    dropped = [what for what, keys in found.items() if any(content.get(k) is not None and k != taken for k in keys)]
    model = _load(arch, arguments, weights, path).to(_dtype(weights, options))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    names = content.get("class_names") or content.get("label_names")
    return Source(path, digest, arch, arguments, model.eval(), taken, dropped, settings, names)


def _refuse_clipped(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse weights whose attention plain timm, which is to load the output, computes in another way."""
    if settings.get("clipped_softmax"):
        raise ValueError(
            f"--checkpoint {path} was trained with --clipped-softmax {settings['clipped_softmax']}, which plain timm "
            "does not compute: measure its rotation by validate.py --quantize w8a8-tt+res+rot"
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what a file says of itself, as far as it can be believed, and its weights as timm's loader chooses them."""
    file = read(path, "weights")
    weights = file.ema or file.weights
    if not weights:
        raise ValueError(f"--checkpoint {path} holds no state dict of tensors")
    return {**file.fields.mapping, "arch": file.arch, "args": file.args}, weights


def _arguments(
    arch: str, options: RepairOptions, settings: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The arguments of `create_model`: the options, then the training's, then what the weights show."""
    recorded = settings.get("model_kwargs")
    kwargs = {**(recorded if isinstance(recorded, Mapping) else {}), **options.model_kwargs}
    given = {name: getattr(options, name) or settings.get(name) for name in ("img_size", "in_chans")}
    given["input_size"] = None if options.img_size else settings.get("input_size")
    pool = options.gp or settings.get("gp")
    try:
        arguments: dict[str, Any] = resolve_model_input_args(arch, given, pretrained=False, **kwargs)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"cannot create {arch}: {str(error)[:400]}{suggest_model(arch, error)}") from error
    arguments = {name: value for name, value in arguments.items() if name not in ("model_name", "pretrained")}
    if "num_classes" not in arguments:
        arguments["num_classes"] = _num_classes(arch, options, weights)
    return arguments | ({"global_pool": pool} if pool else {})


def _num_classes(arch: str, options: RepairOptions, weights: Mapping[str, Tensor]) -> int:
    if options.num_classes is not None:
        return options.num_classes
    config = get_pretrained_cfg(arch)
    head = config.classifier if config is not None else "head"
    head = head[0] if isinstance(head, (tuple, list)) else head
    weight = weights.get(f"{head}.weight")
    return 0 if weight is None else len(weight)


def _load(arch: str, arguments: dict[str, Any], weights: dict[str, Tensor], path: Path) -> nn.Module:
    try:
        model: nn.Module = create_model(arch, **arguments)
    except Exception as error:  # whatever an odd argument of an architecture leads to
        raise ValueError(f"cannot create {arch}: {str(error)[:400]}{suggest_model(arch, error)}") from error
    dtypes = {value.dtype for value in weights.values() if value.is_floating_point()}
    model.to(max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32))
    CheckpointFile(path, {}, "weights").check(weights, model.state_dict())
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {path} do not fit {arch} ({_shown(arguments)}): {str(error)[:400]}. Say how it was built "
            "with --model-kwargs, --img-size, --num-classes, --gp"
        ) from error
    return model


def _dtype(weights: Mapping[str, Tensor], options: RepairOptions) -> torch.dtype:
    """The dtype that was asked for, or the widest one among the weights."""
    if options.dtype:
        dtype: torch.dtype = getattr(torch, options.dtype)
        return dtype
    dtypes = [value.dtype for value in weights.values() if value.is_floating_point()]
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)


def image_settings(source: Source, options: RepairOptions) -> dict[str, Any]:
    """What timm's `resolve_input_data_config` reads of the preprocessing: the training's own settings."""
    found = {name: source.settings.get(name) for name in _IMAGE_SETTINGS}
    given = {"img_size": options.img_size or source.settings.get("img_size"), "in_chans": options.in_chans}
    return {**found, **given, "input_size": None if options.img_size else source.settings.get("input_size")}


def timm_version() -> str:
    """Version of timm, for the record."""
    return str(timm.__version__)


def _shown(arguments: Mapping[str, Any]) -> str:
    """The arguments of a model in a message; its pretrained configuration is long, and decides no shape."""
    given = {name: value for name, value in arguments.items() if not name.startswith("pretrained_cfg")}
    return ", ".join(f"{name}={value!r}" for name, value in given.items()) or "as timm builds it"
