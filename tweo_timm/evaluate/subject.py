"""What is validated: a model with weights, its preprocessing, and what its training left behind."""

from __future__ import annotations

import fnmatch
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import apply_test_time_pool, set_fast_norm
from timm.models import create_model, list_models, resolve_model_input_args
from timm.utils import reparameterize_model
from torch import nn

from tweo_timm.artefact import Preprocessing
from tweo_timm.evaluate.inheritance import inherit, recorded_settings
from tweo_timm.evaluate.options import ValidateOptions, as_namespace
from tweo_timm.evaluate.side import build_side
from tweo_timm.evaluate.size import at_size, channels_of, resize, size_of
from tweo_timm.records import Fields, read_rows
from tweo_timm.run.checkpoint_file import load_weights, read
from tweo_timm.run.class_map import find_class_map
from tweo_timm.run.class_names import recorded_names
from tweo_timm.run.dataset import preprocessing
from tweo_timm.run.model import check_compiler, check_image_size, clip_as_asked, suggest_model
from tweo_timm.run.precision import precision_of
from tweo_timm.suggestion import suggest_path

_logger = logging.getLogger(__name__)

# What timm leaves out of --model all: pretrained weights named after other classes than ImageNet's 1000, or none.
_NOT_IMAGENET_1K = ["*_in21k", "*_in22k", "*in12k", "*_dino", "*fcmae", "*seer"]
_CHECKPOINTS = ("*.pth.tar", "*.pth", "*.safetensors")
# File names that say nothing of what is in them: those of a run, and of a model's repository.
_NAMELESS = re.compile(r"(last|checkpoint|recovery|milestone)([-.].*)?|model_best|model|pytorch_model|weights")


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
        losses: rows of its losses.jsonl, likewise.
        class_names: by index, as the checkpoint has them; None if it does not say.
        precision: of its forward passes, for the record.
        param_count: how many numbers it holds.
    """

    name: str
    arch: str
    model: nn.Module
    data_config: dict[str, Any]
    options: ValidateOptions
    path: Path | None
    training: list[dict[str, Any]]
    losses: list[dict[str, Any]]
    class_names: list[str | None] | None
    precision: str
    param_count: int

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are prepared, as the files that are made of it say."""
        options, usual = self.options, "RGB" if self.data_config["input_size"][0] == 3 else "L"
        mode = None if options.input_img_mode == usual else options.input_img_mode
        rarely = {"exif": options.exif, "crop_border_pixels": options.crop_border_pixels}
        return Preprocessing.of(self.data_config, image_mode=mode, **rarely)

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


def stands_for_several(options: ValidateOptions) -> bool:
    """Whether the options name a folder of checkpoints, or a pattern or a file of models, as timm has them."""
    if options.checkpoint:
        return any(Path(given).is_dir() for given in options.checkpoint)
    return options.model == "all" or any(sign in options.model for sign in "*?[") or Path(options.model).is_file()


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


def _stem(path: Path) -> str:
    return re.sub(r"(\.pth)?\.(tar|pth|pt|bin|safetensors|npz|npy)$", "", path.name)


def _names(paths: Sequence[Path]) -> list[str]:
    """Name each checkpoint by its file, or by its folder where the file's name says nothing; by more if need be."""
    folders = [path.resolve().parent.name for path in paths]
    stems = [_stem(path) for path in paths]
    pairs = list(zip(folders, stems, strict=True))
    names = [folder if _NAMELESS.fullmatch(stem) else stem for folder, stem in pairs]
    if len(set(names)) < len(names):
        names = [f"{folder}/{stem}" for folder, stem in pairs]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return names


def load_subject(source: Source, options: ValidateOptions, device: torch.device) -> Subject:
    """Build a model as its checkpoint's training did, and load the weights strictly.

    Args:
        source: what to load.
        options: win over what the checkpoint says, where they were given or are not the defaults.
        device: where the model goes.

    Raises:
        ValueError: if the file cannot be read, its weights do not fit, or its training had what cannot be had here.
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
        try:
            model = _with_weights(arch, loadable, content, source.path, device)
        except ValueError as error:
            own = content.get("arch") or arch
            remedy = f". The checkpoint holds a {own}: leave out --model" if own != arch else ""
            raise ValueError(f"{error}{remedy}") from error
        resize(model, arch, options)
    data_config = preprocessing(as_namespace(options), model, use_test_size=not options.use_train_size)
    if source.path is not None:
        _say_test_size(source.path, data_config, preprocessing(as_namespace(options), model, use_test_size=False))
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
    losses = _loss_rows(source.path.parent / "losses.jsonl") if source.path is not None else []
    return Subject(
        name=source.name,
        arch=arch,
        model=model,
        data_config=data_config,
        options=options,
        path=source.path,
        training=training,
        losses=losses,
        class_names=recorded_names(content),
        precision=precision_of(options),
        param_count=sum(parameter.numel() for parameter in model.parameters()),
    )


def _say_test_size(path: Path, now: dict[str, Any], trained: dict[str, Any]) -> None:
    """Say where an architecture prepares images for testing in another way than its training validated them."""
    pairs = [(name, now[name], trained[name]) for name in now]
    differing = [f"{name} {mine}, where the training had {theirs}" for name, mine, theirs in pairs if mine != theirs]
    if differing:
        _logger.warning("%s: %s: --use-train-size takes that", path, "; ".join(differing))


def _describe(content: dict[str, Any], source: Source, options: ValidateOptions) -> tuple[str, list[ValidateOptions]]:
    """Fill in what the checkpoint says about its model, images and labels, where the command line is silent.

    Returns:
        The architecture, and the options under which the weights may fit, those to validate under first: with images
        as large as now asked for, which is what timm does and what models without a size of their own need; as in the
        training; and as the architecture has them, for weights that do not say.
    """
    arch = _architecture(content, source, options)
    recorded = recorded_settings(content.get("args"), source.path)
    changes = inherit(recorded, options, source.path)
    if "class_map" in changes and find_class_map(changes["class_map"], options.data_dir, options.split) is None:
        _check_lost_map(content, source, changes.pop("class_map"))
    changes["in_chans"] = channels_of(vars(options)) or channels_of(recorded)
    try:
        unsized = at_size(replace(options, **changes), {})
    except ValueError as error:
        raise ValueError(f"checkpoint {source.path}, with the options of its training: {error}") from error
    trained, asked = size_of(recorded), size_of(vars(options))
    sizes = [asked or trained, trained, {}]
    return arch, [at_size(unsized, size) for i, size in enumerate(sizes) if size not in sizes[:i]]


def _architecture(content: dict[str, Any], source: Source, options: ValidateOptions) -> str:
    """The name that the command line gives, as timm has it, or else the checkpoint's own."""
    own = content.get("arch")
    default = {field.name: field for field in fields(ValidateOptions)}["model"].default
    if source.path is None or "model" in options.given or source.model != default:
        if own and own != source.model:
            _logger.warning("%s: trained as a %s, validated as the %s of --model", source.path, own, source.model)
        return source.model
    if not isinstance(own, str):
        raise ValueError(f"checkpoint {source.path} does not say its architecture: pass --model NAME")
    return own


def _check_lost_map(content: dict[str, Any], source: Source, class_map: str) -> None:
    """Refuse to go on without the class map of a training, unless class names will tell whether it is needed."""
    if recorded_names(content) is None:
        raise ValueError(
            f"checkpoint {source.path} was trained with --class-map {class_map}, which is not here: give --class-map "
            "FILE, or --class-map '' if the data numbers its classes in the same way"
        )


def _with_weights(
    arch: str, loadable: list[ValidateOptions], content: dict[str, Any], path: Path, device: torch.device
) -> nn.Module:
    """Build the model under the first options that its weights fit."""
    mismatch: ValueError | None = None
    for options in loadable:
        try:
            model = _bare(arch, options, content, path, device)
            _load(model, content, path, arch, options.use_ema)
        except ValueError as error:
            if "size mismatch" not in str(error):
                raise
            mismatch = mismatch or error
        else:
            return model
    assert mismatch is not None
    raise mismatch


def _bare(arch: str, options: ValidateOptions, content: dict[str, Any], path: Path, device: torch.device) -> nn.Module:
    """The model of a checkpoint before its weights are loaded: the architecture, or a side network beside it."""
    if content.get("side") is None:
        return _create(arch, options, pretrained=False)
    return build_side(arch, options, Fields(content["side"], f"checkpoint {path}", "side"), _create, device)


def _create(arch: str, options: ValidateOptions, pretrained: bool, headless: bool = False) -> nn.Module:
    try:
        arguments = resolve_model_input_args(
            arch,
            vars(as_namespace(options)),
            pretrained=pretrained or options.pretrained,
            num_classes=0 if headless else options.num_classes,
            global_pool=options.gp,
            bn_eps=options.bn_eps,
            pretrained_cfg_overlay=options.pretrained_cfg_overlay or None,
            **options.model_kwargs,
        )
        model: nn.Module = create_model(**arguments)
    except (RuntimeError, TypeError, ValueError, AssertionError, OSError) as error:
        raise ValueError(f"cannot create {arch}: {str(error)[:400]}{suggest_model(arch, error)}") from error
    clip_as_asked(model, arch, options.clipped_softmax)
    return model


def _metadata(path: Path) -> dict[str, Any]:
    """Read what a checkpoint says of itself, as far as it can be believed; files of weights alone say nothing."""
    file = read(path, "metadata")
    return {**file.fields.mapping, "arch": file.arch, "args": file.args}


def _load(model: nn.Module, content: dict[str, Any], path: Path, arch: str, use_ema: bool) -> None:
    """Load weights strictly, when they are whole and finite."""
    if use_ema and content.get("state_dict_ema") is None and content.get("model_ema") is None:
        _logger.warning("checkpoint %s has no EMA weights: --use-ema takes its plain ones, as timm does", path)
    try:
        load_weights(model, path, use_ema, _without_split_statistics)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300].rstrip(". ")
        headless = ". A model without a head takes --num-classes 0" if "Missing key" in reason else ""
        of_head = re.search(
            r"size mismatch for (head|fc|classifier)\b[^:]*: copying a param with shape [^\d]*(\d+)", reason
        )
        classes = f". The file has {of_head[2]} classes: leave out --num-classes" if of_head else ""
        raise ValueError(f"the weights in {path} do not fit {arch}: {reason}{headless}{classes}") from error


def _without_split_statistics(weights: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The weights but for the batch norms that --split-bn has of further augmentation splits: of no use outside."""
    return {name: value for name, value in weights.items() if ".aux_bn." not in name}


def _training_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a run's outliers.jsonl with a number for an epoch and a peak that can be drawn, or none."""
    return [row for row in read_rows(path) if type(row.get("epoch")) is int and _is_peak(row.get("train_peak_abs"))]


def _loss_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a run's losses.jsonl with whole numbers for update, epoch and samples, and a loss that can be drawn."""
    whole = ("update", "epoch", "samples")
    rows = (row for row in read_rows(path) if all(type(row.get(name)) is int and row[name] >= 0 for name in whole))
    return [row for row in rows if _is_peak(row.get("task_loss"))]


def _is_peak(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value))
