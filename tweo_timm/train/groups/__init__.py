"""The flags of train.py by subject, and all of them as one class: names, types and defaults, nothing checked."""

from __future__ import annotations

from dataclasses import dataclass

from tweo_timm.config import TweoOptions
from tweo_timm.fp8.recipe import Fp8Options
from tweo_timm.run.options import ConfigOptions
from tweo_timm.side.config import SideOptions
from tweo_timm.train.groups.data import AugmentOptions, DatasetOptions, ImageSizeOptions, NaflexOptions
from tweo_timm.train.groups.model import DeviceOptions, EmaOptions, ModelOptions, NormOptions
from tweo_timm.train.groups.optimizer import DistillationOptions, LossOptions, OptimizerOptions, ScheduleOptions
from tweo_timm.train.groups.run import RunOptions


@dataclass(frozen=True)
class TrainSettings(
    ConfigOptions,
    TweoOptions,
    Fp8Options,
    SideOptions,
    DatasetOptions,
    ModelOptions,
    DeviceOptions,
    OptimizerOptions,
    ScheduleOptions,
    LossOptions,
    AugmentOptions,
    RunOptions,
    EmaOptions,
    NormOptions,
    DistillationOptions,
    ImageSizeOptions,
    NaflexOptions,
):
    """The settings of one training run, one field per flag; `TrainOptions` are those that passed the checks."""
