"""What a run trains with --side: a side network beside a frozen backbone, in place of the model itself.

The backbone is built without a head, with the weights that --pretrained or --initial-checkpoint name. A checkpoint
holds the side network and its head alone, and the entry `side`: the network's settings and what names its backbone. A
run continues only beside the same backbone.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from timm.layers import set_fast_norm
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from tweo_timm.run.checkpoint_file import CheckpointFile
from tweo_timm.run.dataset import preprocessing
from tweo_timm.run.world import World
from tweo_timm.side.backbone import CALIBRATION_BATCH, differences, prepare
from tweo_timm.side.config import SIDES
from tweo_timm.side.network import SideNetwork
from tweo_timm.train.data import calibration_images
from tweo_timm.train.model import create, initialise_head
from tweo_timm.train.options import TrainOptions, as_namespace

_logger = logging.getLogger(__name__)

KEY = "side"
"""Name of the checkpoint's entry."""


def build_side(options: TrainOptions, world: World) -> nn.Module:
    """Create the side network that is trained, beside a frozen backbone in its precision.

    Args:
        options: the run's options.
        world: its device is where the network goes.

    Raises:
        ValueError: if timm does not know the backbone, or the settings do not fit it.
    """
    if options.fast_norm:
        set_fast_norm()
    if not (options.pretrained or options.initial_checkpoint):
        _logger.warning("The frozen backbone has random weights: give --initial-checkpoint FILE or --pretrained")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(options.seed)  # the same in every process
        backbone = create(options, headless=True).to(world.device)
    num_classes = int(options.num_classes or _as_trained(backbone))
    data_config = preprocessing(as_namespace(options), backbone)

    def calibration() -> list[Tensor]:
        count = options.side_calibration_images
        batches = calibration_images(options, data_config, num_classes, count, CALIBRATION_BATCH)
        return [batch.to(world.device) for batch in batches]

    arguments = {"bn_eps": options.bn_eps, **options.model_kwargs}
    backbone, basis, record = prepare(
        backbone, options.model, options.side_precision, calibration, options.seed, options.tweo_blocks, arguments
    )
    try:
        settings = options.side_config(options.drop, options.drop_path or 0.0).to_json()
        kind = SIDES[options.side].load()
        net: SideNetwork = kind(backbone, num_classes, blocks=options.tweo_blocks, basis=basis, **settings)
    except ValueError as error:
        raise ValueError(f"--side {options.side} beside {options.model}: {error}") from error
    net.backbone_record = record
    initialise_head(net, options)
    net.to(device=world.device)
    if options.channels_last:
        net.to(memory_format=torch.channels_last)
    trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    _logger.info(
        "Side network %s: %.3f M parameters, beside %s in %s (%.2f M, frozen, fingerprint %s)",
        options.side,
        trained / 1e6,
        options.model,
        options.side_precision,
        sum(parameter.numel() for parameter in backbone.parameters()) / 1e6,
        record["fingerprint"],
    )
    return net


def _as_trained(backbone: Any) -> int:
    return int(backbone.pretrained_cfg.get("num_classes", 0))


def share_backbone(average: nn.Module, task: TrainingTask) -> None:
    """Let the EMA of a side network read the frozen backbone that the network reads, in place of a copy of its own.

    Args:
        average: the EMA's model, on the device of the network; models of other kinds stay as they are.
        task: whose network it averages.
    """
    net = unwrap_model(task.get_eval_model())
    if isinstance(average, SideNetwork) and isinstance(net, SideNetwork):
        average.backbone = net.backbone


def side_entry(task: TrainingTask) -> dict[str, Any]:
    """Return what a checkpoint says of a side network, under `KEY`; nothing of other models."""
    model = unwrap_model(task.get_eval_model())
    return {KEY: model.describe()} if isinstance(model, SideNetwork) else {}


def check_side_entry(file: CheckpointFile, task: TrainingTask) -> None:
    """Refuse a checkpoint of another side network or backbone, and one of a whole model beside a side network.

    Raises:
        ValueError: saying what differs.
    """
    mine = side_entry(task).get(KEY)
    theirs = dict(file.fields.fields(KEY).mapping) if file.fields.has(KEY) else None
    if (mine is None) != (theirs is None):
        one, other = ("a whole model", "--side is given") if theirs is None else ("a side network", "--side is not")
        raise ValueError(f"checkpoint {file.path} is of {one} and {other}: go on with the settings of before")
    if mine is not None and theirs is not None and mine != theirs:
        raise ValueError(
            f"checkpoint {file.path} is of another side network or backbone: {differences(theirs, mine)}. Go on with "
            "the settings, weights and images of before"
        )
