"""Checkpoints of side networks: the network is put together again beside the backbone that it was trained beside.

Such a checkpoint holds no weights of its backbone. --side-backbone names them; they are compared with the fingerprint
in the checkpoint, and the calibration images of a quantized backbone with theirs. Another backbone is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tweo_timm.evaluate.images import sample_images
from tweo_timm.evaluate.options import ValidateOptions, as_namespace
from tweo_timm.records import Fields
from tweo_timm.run.checkpoint_file import load_weights, read
from tweo_timm.run.dataset import preprocessing
from tweo_timm.run.model import refuse_clipped, without_classifier
from tweo_timm.settings import AT_LEAST_0, AT_LEAST_1, Bounds
from tweo_timm.side.backbone import CALIBRATION_BATCH, differences, prepare
from tweo_timm.side.config import SIDES
from tweo_timm.side.network import SideNetwork

_MOST_CLASSES = 1_000_000  # of a file from a stranger
PRETRAINED = "pretrained"
"""What --side-backbone is for the weights that timm downloads."""


def build_side(
    arch: str, options: ValidateOptions, entry: Fields, create: Callable[..., nn.Module], device: torch.device
) -> SideNetwork:
    """Create the network of a checkpoint, without its trained weights.

    Args:
        arch: the backbone's architecture, by the checkpoint.
        options: where the backbone's weights and the calibration images are, and the training's settings.
        entry: what the checkpoint says of network and backbone.
        create: makes the backbone: called with arch, options, and whether pretrained and headless.
        device: where the backbone goes.

    Raises:
        ValueError: the backbone is not given, or is another one.
    """
    backbone = _backbone(arch, options, entry, create).to(device)
    data_config = preprocessing(as_namespace(options), backbone)
    num_classes, record = entry.integer("num_classes", Bounds(1, _MOST_CLASSES)), entry.fields("backbone")
    precision = record.text("precision")

    def calibration() -> list[Tensor]:
        if not record.has("calibration"):
            record.refuse("calibration", None, f"that of a backbone in {precision}")
        found = record.fields("calibration")
        chosen = replace(options, seed=found.integer("seed", AT_LEAST_0))
        count, split = found.integer("images", AT_LEAST_1), options.calibration_split
        batches = sample_images(chosen, data_config, num_classes, split, count, CALIBRATION_BATCH)
        return [batch.to(device) for batch in batches]

    seed = record.fields("calibration").integer("seed", AT_LEAST_0) if record.has("calibration") else 0
    arguments = {"bn_eps": options.bn_eps, **options.model_kwargs}
    backbone, basis, mine = prepare(backbone, arch, precision, calibration, seed, options.tweo_blocks, arguments)
    theirs = dict(record.mapping)
    if mine != theirs:
        raise ValueError(
            f"{entry.where}: its side network was trained beside another backbone: {differences(theirs, mine)}. Give "
            "--side-backbone FILE, and for a quantized one the training split of then (--calibration-split)"
        )
    name, settings = entry.text("side"), entry.fields("settings")
    if name not in SIDES:
        entry.refuse("side", name, f"one of {', '.join(SIDES)}")
    sizes = {size: settings.integer(size, AT_LEAST_1) for size in ("rank", "gap", "modules_per_block", "num_heads")}
    net: SideNetwork = SIDES[name].load()(backbone, num_classes, blocks=options.tweo_blocks, basis=basis, **sizes)
    net.backbone_record = mine
    reads, read = net.describe()["reads"], list(entry.items("reads"))
    if reads != read:
        raise ValueError(
            f"{entry.where}: its side network was trained on what the blocks {read} return, and would read {reads}: "
            "leave out --tweo-blocks"
        )
    return net


def _backbone(arch: str, options: ValidateOptions, entry: Fields, create: Callable[..., nn.Module]) -> nn.Module:
    wanted = f"{arch} with the fingerprint {entry.fields('backbone').text('fingerprint')}"
    if not options.side_backbone:
        raise ValueError(
            f"{entry.where} holds a side network, and not its backbone: give --side-backbone FILE, the weights of "
            f"{wanted}"
        )
    if options.side_backbone == PRETRAINED:
        return create(arch, options, pretrained=True, headless=True)
    refuse_clipped(read(Path(options.side_backbone), "metadata"), "--side-backbone")
    backbone = create(arch, options, pretrained=False, headless=True)
    try:
        load_weights(backbone, Path(options.side_backbone), filter_fn=without_classifier)
    except RuntimeError as error:
        raise ValueError(f"--side-backbone {options.side_backbone} does not fit {arch}: {str(error)[:400]}") from error
    return backbone
