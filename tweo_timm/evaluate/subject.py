"""What is validated: a model with weights, its preprocessing, and what its training left behind."""

from __future__ import annotations

import fnmatch
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import apply_test_time_pool, set_fast_norm
from timm.models import create_model, list_models, resolve_model_input_args
from timm.utils import reparameterize_model
from torch import nn

from tweo_timm.evaluate.options import ValidateOptions, as_namespace
from tweo_timm.evaluate.size import at_size, channels_of, resize, size_of
from tweo_timm.records import read_rows
from tweo_timm.run.checkpoint_file import load_weights, read
from tweo_timm.run.dataset import preprocessing
from tweo_timm.run.model import check_compiler, check_image_size, suggest_model
from tweo_timm.suggestion import suggest_path

_logger = logging.getLogger(__name__)

# What timm leaves out of --model all: pretrained weights named after other classes than ImageNet's 1000, or none.
_NOT_IMAGENET_1K = ["*_in21k", "*_in22k", "*in12k", "*_dino", "*fcmae", "*seer"]
_CHECKPOINTS = ("*.pth.tar", "*.pth", "*.safetensors")
# What a checkpoint's own training options say about the model and its images, where the command line says nothing.
_INHERITED = (
    "num_classes",
    "gp",
    "mean",
    "std",
    "crop_pct",
    "interpolation",
)


@dataclass
class Subject:
    """One model under validation.

    Attributes:
        name: how it is called in tables and pictures; unique among the subjects of a run.
        arch: timm's name of the architecture.
        model: in eval mode, on its device.
        data_config: timm's resolved preprocessing.
        options: the options with what the checkpoint says about itself filled in.
        path: its file; None for timm's pretrained weights.
        training: rows of the run's outliers.jsonl; empty where there is none beside the checkpoint.
    """

    name: str
    arch: str
    model: nn.Module
    data_config: dict[str, Any]
    options: ValidateOptions
    path: Path | None
    training: list[dict[str, Any]]

    @property
    def training_peak_abs(self) -> float | None:
        """The largest activation seen while training; None if unknown."""
        peaks = [row["train_peak_abs"] for row in self.training if row.get("train_peak_abs") is not None]
        return max(peaks) if peaks else None


@dataclass(frozen=True)
class Source:
    """Where a subject comes from: a name for it, and a checkpoint file or one of timm's pretrained models."""

    name: str
    path: Path | None
    model: str


def find_sources(options: ValidateOptions) -> list[Source]:
    """List what the options ask to validate.

    Args:
        options: checkpoints (files, or folders that stand for all in them) or model names ('all' but those that timm
            leaves out, a wildcard, a text file of names).

    Raises:
        ValueError: if a checkpoint does not exist, a folder holds none, or no model matches.
    """
    if options.checkpoint:
        paths = [path for given in options.checkpoint for path in _files(Path(given))]
        return [Source(name, path, options.model) for name, path in zip(_names(paths), paths, strict=True)]
    if Path(options.model).is_file():
        models = Path(options.model).read_text().split()
    elif options.model == "all" or any(sign in options.model for sign in "*?["):
        pattern, others = ("*", _NOT_IMAGENET_1K) if options.model == "all" else (options.model, [])
        names = list_models(pretrained=True, exclude_filters=others)
        models = [name for name in names if fnmatch.fnmatch(name, pattern)]
    else:
        models = [options.model]
    if not models:
        raise ValueError(f"--model {options.model} matches none of timm's pretrained models")
    return [Source(name, None, name) for name in models]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise ValueError(
            f"--checkpoint {path} does not exist: pass a checkpoint, or a folder of them{suggest_path(path)}"
        )
    found = sorted(file for pattern in _CHECKPOINTS for file in path.glob(pattern))
    if not found:
        raise ValueError(f"--checkpoint {path} is a folder without {' or '.join(_CHECKPOINTS)} files")
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """Name each checkpoint by its folder, with as much of its file name and path as tells it from the others."""
    names = [path.resolve().parent.name for path in paths]
    if len(set(names)) < len(names):
        stems = [path.name.split(".")[0] for path in paths]
        names = [f"{name}/{stem}" for name, stem in zip(names, stems, strict=True)]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return names


def load_subject(source: Source, options: ValidateOptions, device: torch.device) -> Subject:
    """Build a model from its checkpoint's own architecture and options, and load the weights strictly.

    Args:
        source: what to load.
        options: win over what the checkpoint says.
        device: where the model goes.

    Raises:
        ValueError: if the file cannot be read, is of another architecture than `--model`, or has no EMA weights.
    """
    content = _metadata(source.path) if source.path is not None else {}
    arch, loadable = _describe(content, source, options)
    options = loadable[0]
    check_compiler(options.torchcompile)
    if options.fast_norm:
        set_fast_norm()
    if source.path is None:
        model = _create(arch, options, pretrained=True)
    else:
        model = _with_weights(arch, loadable, content, source.path)
        resize(model, arch, options)
    data_config = preprocessing(as_namespace(options), model, use_test_size=not options.use_train_size)
    if options.test_pool:
        model, pooled = apply_test_time_pool(model, data_config)
        data_config |= {"crop_pct": 1.0} if pooled else {}
    if options.reparam:
        model = reparameterize_model(model)
    dtype = getattr(torch, options.model_dtype) if options.model_dtype else None
    model.to(device=device, dtype=dtype).eval()
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    check_image_size(arch, model, data_config["input_size"])
    training = _training_rows(source.path.parent / "outliers.jsonl") if source.path is not None else []
    return Subject(source.name, arch, model, data_config, options, source.path, training)


def _describe(content: dict[str, Any], source: Source, options: ValidateOptions) -> tuple[str, list[ValidateOptions]]:
    """Fill in what the checkpoint says about its architecture, model and images, where the command line is silent.

    Returns:
        The architecture, and the options under which the weights may fit, those to validate under first: with images
        as large as now asked for, which is what timm does and what models without a size of their own need; as in the
        training; and as the architecture has them, for weights that do not say.
    """
    default = {field.name: field for field in fields(ValidateOptions)}["model"].default
    own = content.get("arch")
    if own and source.model not in (default, own):
        raise ValueError(
            f"checkpoint {source.path} holds a {own}, not a {source.model}: leave out --model, or name it so"
        )
    if source.path is not None and not own and source.model == default:
        raise ValueError(f"checkpoint {source.path} does not say its architecture: pass --model NAME")
    args = content.get("args")
    recorded = dict(args) if isinstance(args, Mapping) else dict(getattr(args, "__dict__", {}))
    if recorded.get("task") == "multilabel" and options.task != "multilabel":
        raise ValueError(f"checkpoint {source.path} was trained with --task multilabel: give it here too")
    inherited = {
        name: recorded[name] for name in _INHERITED if recorded.get(name) is not None and not getattr(options, name)
    }
    inherited["in_chans"] = channels_of(vars(options)) or channels_of(recorded)
    inherited["model_kwargs"] = {**(recorded.get("model_kwargs") or {}), **options.model_kwargs}
    unsized = at_size(replace(options, **inherited), {})
    trained, asked = size_of(recorded), size_of(vars(options))
    sizes = [asked or trained, trained, {}]
    return own or source.model, [at_size(unsized, size) for i, size in enumerate(sizes) if size not in sizes[:i]]


def _with_weights(arch: str, loadable: list[ValidateOptions], content: dict[str, Any], path: Path) -> nn.Module:
    """Build the model under the first options that its weights fit."""
    mismatch: ValueError | None = None
    for options in loadable:
        model = _create(arch, options, pretrained=False)
        try:
            _load(model, content, path, arch, options.use_ema)
        except ValueError as error:
            if "size mismatch" not in str(error):
                raise
            mismatch = mismatch or error
        else:
            return model
    assert mismatch is not None
    raise mismatch


def _create(arch: str, options: ValidateOptions, pretrained: bool) -> nn.Module:
    try:
        arguments = resolve_model_input_args(
            arch,
            vars(as_namespace(options)),
            pretrained=pretrained or options.pretrained,
            num_classes=options.num_classes,
            global_pool=options.gp,
            **options.model_kwargs,
        )
        return create_model(**arguments)  # type: ignore[no-any-return]
    except (RuntimeError, TypeError, ValueError, AssertionError, OSError) as error:
        raise ValueError(f"cannot create {arch}: {str(error)[:400]}{suggest_model(arch, error)}") from error


def _metadata(path: Path) -> dict[str, Any]:
    """Read what a checkpoint says of itself, as far as it can be believed; files of weights alone say nothing."""
    file = read(path, "metadata")
    return {**file.fields.mapping, "arch": file.arch, "args": file.args}


def _load(model: nn.Module, content: dict[str, Any], path: Path, arch: str, use_ema: bool) -> None:
    """Load weights strictly, when they are whole and finite."""
    if use_ema and content.get("state_dict_ema") is None and content.get("model_ema") is None:
        raise ValueError(f"checkpoint {path} has no EMA weights: leave out --use-ema")
    try:
        load_weights(model, path, use_ema)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit {arch}: {str(error)[:400]}") from error


def _training_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a run's outliers.jsonl with a number for an epoch and a peak that can be drawn, or none."""
    return [row for row in read_rows(path) if type(row.get("epoch")) is int and _is_peak(row.get("train_peak_abs"))]


def _is_peak(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value))
