"""ONNX files under validation: by what they say of themselves, and by flags where they say nothing.

A file of ours needs no flag. One of a stranger has its layout and type in its input; how images are normalized cannot
be seen and is asked for. What is in the graph cannot be changed by a flag, and is refused.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config

from tweo_timm.artefact import Preprocessing
from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.evaluate.size import channels_of
from tweo_timm.evaluate.subject import Source, Subject
from tweo_timm.quant.onnx_file import OnnxModel, count_values
from tweo_timm.suggestion import suggest_path

_logger = logging.getLogger(__name__)

_CROP = ("crop_pct", "crop_mode", "interpolation")


def find_files(options: ValidateOptions) -> list[Source]:
    """List the files of --onnx, named by themselves.

    Raises:
        ValueError: if one does not exist.
    """
    paths = [Path(given) for given in options.onnx]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"--onnx {path} does not exist: pass an ONNX file{suggest_path(path)}")
    names = [path.name.removesuffix(".onnx") for path in paths]
    unique = len(set(names)) == len(names)
    return [Source(name if unique else str(path), path, "onnx") for name, path in zip(names, paths, strict=True)]


def load_file(source: Source, options: ValidateOptions, device: torch.device) -> Subject:
    """Open a file, and prepare images as it says, or as the flags say where they are given.

    Args:
        source: which file.
        options: win over what the file says.
        device: where images go to; files run on the CPU.

    Raises:
        ValueError: if the file cannot be used, does not say how, or says another thing than a flag that it has in its
            graph.
    """
    path = source.path
    assert path is not None
    try:
        model = OnnxModel(path)
    except RuntimeError as error:
        raise ValueError(f"--onnx {path}: {error}") from error
    said = model.artefact
    rarely = _rare_settings(said.preprocessing, options)
    data_config = _data_config(model, options, path)
    model.preprocessing = Preprocessing.of(data_config)
    classes = _classes_of(model, model.preprocessing, path)
    if options.num_classes not in (None, classes):
        raise ValueError(f"--num-classes {options.num_classes}: {path} has {classes}; leave it out")
    model.num_classes = classes
    return Subject(
        name=source.name,
        arch=said.arch or "onnx",
        model=model.eval(),
        data_config=data_config,
        options=replace(options, **rarely),
        path=path,
        training=[],
        losses=[],
        class_names=None if said.class_names is None else list(said.class_names),
        precision=said.scheme if said.version else "as the file has it",
        param_count=count_values(path),
    )


def _rare_settings(said: Preprocessing | None, options: ValidateOptions) -> dict[str, Any]:
    """What else decides an image: the file's where no flag is given."""
    if said is None:
        return {}
    return {
        "input_img_mode": options.input_img_mode or said.image_mode,
        "exif": options.exif or said.exif,
        "crop_border_pixels": said.crop_border_pixels
        if options.crop_border_pixels is None
        else options.crop_border_pixels,
    }


def _data_config(model: OnnxModel, options: ValidateOptions, path: Path) -> dict[str, Any]:
    """Preprocessing as timm resolves it: the flags', else the file's, else timm's own, with a line."""
    said = model.artefact.preprocessing
    known: dict[str, Any] = {} if said is None else said.data_config
    size = _input_size(model, known.get("input_size"), options, path)
    pixels = model.input.dtype == "uint8"
    for name in ("mean", "std"):
        flag = getattr(options, name)
        if pixels and flag:
            raise ValueError(
                f"--{name} {' '.join(map(str, flag))}: {path} takes pixels and has its normalization in the graph; "
                "leave it out"
            )
        if not (pixels or flag or known):
            raise ValueError(
                f"--onnx {path} does not say how its images are normalized: give --mean and --std, one number per "
                "channel, as in its training"
            )
    if pixels and not known:
        known = {"mean": (0.0,) * size[0], "std": (1 / 255,) * size[0]}
    flags = {name: getattr(options, name) or None for name in ("mean", "std", *_CROP)}
    try:
        found: dict[str, Any] = resolve_data_config({**flags, "input_size": size}, pretrained_cfg=known)
    except AssertionError as error:
        raise ValueError(
            f"--mean and --std take one number, or one per channel, of which {path} has {size[0]}"
        ) from error
    silent = [name for name in _CROP if name not in known and not flags[name]]
    if silent:
        words = ", ".join(f"{name} {found[name]}" for name in silent)
        _logger.warning("%s does not say how images are cropped, and no flag does: timm's %s", path, words)
    return found


def _input_size(
    model: OnnxModel, said: tuple[int, int, int] | None, options: ValidateOptions, path: Path
) -> tuple[int, int, int]:
    """Channels, height and width: of the graph; where it takes any, of the flags, else of the file's metadata."""
    edges = (options.img_size,) * 2 if options.img_size else None
    asked = options.input_size or ((channels_of(vars(options)) or model.input.size[0], *edges) if edges else None)
    size = []
    for fixed, flag, known, axis in zip(
        model.input.size, asked or (None,) * 3, said or (None,) * 3, ("channels", "height", "width"), strict=True
    ):
        if fixed and flag and fixed != flag:
            raise ValueError(f"--img-size and --input-size: {path} takes a {axis} of {fixed} alone, not {flag}")
        side = fixed or flag or known
        if not side:
            raise ValueError(f"--onnx {path} takes images of any {axis}: say it by --img-size N or --input-size C H W")
        size.append(side)
    return size[0], size[1], size[2]


def _classes_of(model: OnnxModel, preprocessing: Preprocessing, path: Path) -> int:
    """Try the file on one black image: how many logits it has, and whether it runs at all."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    black = (torch.zeros(1, *preprocessing.input_size) - mean) / std
    try:
        logits = model(black)
    except Exception as error:  # onnxruntime has a class for each status, none of them public
        raise ValueError(f"--onnx {path} does not run on one image: {' '.join(str(error).split())[:300]}") from error
    return int(logits.shape[1])
