"""Plug-in for timm's own train.py: TWEO with no edit to timm.

    TWEO_WEIGHT=0.01 TWEO_TAU=3 python train.py --model vit_small_patch16_224 ... --device-modules tweo_timm.upstream

Being imported is its interface: train.py imports device modules before it builds anything. By then it holds timm's
classes by name, so the classes themselves are extended, in place: every TrainingTask that is built afterwards gets
`attach_tweo`, the learning-rate scheduler tells where the training is, the checkpoint saver where the run folder is. A
second import changes nothing.

Settings come from the environment, because train.py refuses flags it does not know. Defaults are TweoConfig's:

    TWEO_WEIGHT  TWEO_TAU  TWEO_POWER  TWEO_REDUCTION  TWEO_SCHEDULE  TWEO_END_WEIGHT  TWEO_START  TWEO_END
    TWEO_BLOCKS  regular expression naming the blocks by hand

A schedule moves as often as timm's learning rate does: with every update under --sched-on-updates, otherwise once an
epoch. Its window is the learning rate's: cooldown epochs come after it, at the end weight. Schedulers without a length
(step, multistep, plateau, constant, none) are refused unless TWEO_SCHEDULE is constant.

Written beside timm's summary.csv: outliers.jsonl, one row an epoch and block, with the largest |A| in training
(train_peak_abs), over all processes. Without a scheduler (--sched none) it is that of the first process alone.

What this path cannot do, and tweo_timm's own train.py can: further columns in summary.csv, peaks of the validation
images, FP8, TensorBoard, exact resume.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import CheckpointSaver, world_info_from_env
from torch import Tensor

from tweo_timm.config import TweoConfig
from tweo_timm.records import append_rows, keep_rows_before
from tweo_timm.settings import SettingError
from tweo_timm.stats import nan_largest
from tweo_timm.suggestion import suggest
from tweo_timm.task import TweoHandle, attach_tweo

_logger = logging.getLogger(__name__)

# eps is a guard against tau = 0, which is refused anyway: it has no variable.
_SETTINGS = {f"TWEO_{it.name.upper()}": it.name for it in fields(TweoConfig) if it.name not in ("eps", "balance")}
_BLOCKS = "TWEO_BLOCKS"
VARIABLES = (*_SETTINGS, _BLOCKS)
"""Every environment variable that is read; another that begins with TWEO_ is an error."""

_INSTALLED = "tweo_timm_plugin"


def read_settings(environ: Mapping[str, str]) -> tuple[TweoConfig, str | None]:
    """Read the TWEO settings from environment variables.

    Args:
        environ: names -> values, as os.environ holds them.

    Returns:
        The configuration, and the regular expression that names the blocks (None: found by structure).

    Raises:
        ValueError: for an unknown variable or a value that is not accepted; the message names the variable.
    """
    given = {name: value for name, value in environ.items() if name.startswith("TWEO_")}
    for name, value in given.items():
        if name not in VARIABLES:
            known = ", ".join(VARIABLES)
            raise ValueError(f"unknown environment variable {name}; known: {known}{suggest(name, VARIABLES)}")
        if not value.strip():
            raise ValueError(f"the environment variable {name} is empty: give it a value, or unset it for the default")
    try:
        values: dict[str, Any] = {_SETTINGS[name]: _value(name, given[name]) for name in given if name in _SETTINGS}
        config = TweoConfig(**values)
    except SettingError as error:
        environment = " ".join(f"{name}={value}" for name, value in given.items())
        message = error.spelled(f"TWEO_{error.name.upper()}")
        raise ValueError(f"{message} (the environment has {environment})") from error
    return config, given.get(_BLOCKS)


def _value(name: str, text: str) -> float | str:
    """A variable's text as what its setting is: a number or a word."""
    default = getattr(TweoConfig, _SETTINGS[name])
    if isinstance(default, str):
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}={text} in the environment; accepted: a number, such as {default:g}") from None


class TimmPlugin:
    """TWEO inside timm's classes, from `install` to `uninstall`.

    Args:
        config: the penalty and its schedule.
        blocks: regular expression naming the blocks by hand; None finds them by structure.
    """

    def __init__(self, config: TweoConfig, blocks: str | None = None) -> None:
        self.config = config
        self.blocks = blocks
        self.handle: TweoHandle | None = None
        self._replaced: list[tuple[type, str, Any]] = []
        self._peaks: Tensor | None = None  # largest |A| of each block since the epoch began, on the device
        self._progress: float | None = None
        self._has_scheduler = False
        self._folder: Path | None = None
        self._first_row = True

    def install(self) -> None:
        """Extend timm's classes; where a plug-in is installed already, do nothing."""
        if hasattr(TrainingTask, _INSTALLED):
            return
        self._replace(TrainingTask, _INSTALLED, self)
        self._extend_tasks()
        self._extend_schedulers()
        self._extend_saver()
        if world_info_from_env()[1] == 0:
            _logger.info("TWEO in timm's training tasks: %s, blocks: %s", self.config, self.blocks or "by structure")

    def uninstall(self) -> None:
        """Give timm's classes back as they were; tasks that have TWEO keep it."""
        for cls, name, original in reversed(self._replaced):
            if original is None:
                delattr(cls, name)
            else:
                setattr(cls, name, original)
        self._replaced.clear()

    def _replace(self, cls: type, name: str, value: Any) -> None:
        self._replaced.append((cls, name, vars(cls).get(name)))
        setattr(cls, name, value)

    def _extend_tasks(self) -> None:
        for cls in _subclasses(TrainingTask):
            self._extend_task(cls)
        plugin = self

        def __init_subclass__(cls: type[TrainingTask], /, **kwargs: Any) -> None:  # noqa: N807
            super(TrainingTask, cls).__init_subclass__(**kwargs)
            plugin._extend_task(cls)

        self._replace(TrainingTask, "__init_subclass__", classmethod(__init_subclass__))

    def _extend_task(self, cls: type) -> None:
        if "__init__" not in vars(cls):
            return
        original = vars(cls)["__init__"]

        @functools.wraps(original)
        def __init__(task: TrainingTask, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            original(task, *args, **kwargs)
            if type(task).__init__ is __init__:  # not the base of a task that is still being built
                self._attach(task)

        self._replace(cls, "__init__", __init__)

    def _attach(self, task: TrainingTask) -> None:
        handle = self.handle = attach_tweo(task, self.config, self.blocks)
        self._peaks = None
        if self._progress is not None:
            handle.set_progress(self._progress)

        def before(module: TrainingTask, args: Any) -> None:
            if self._progress is None and self.config.schedule != "constant" and torch.is_grad_enabled():
                raise RuntimeError(
                    f"TWEO_SCHEDULE={self.config.schedule} follows timm's learning-rate schedule, and there is none: "
                    "choose --sched cosine, tanh, poly or wsd, or TWEO_SCHEDULE=constant"
                )

        def after(module: TrainingTask, args: Any, result: Mapping[str, Any]) -> None:
            if "tweo_loss" in result and (peaks := handle.block_peaks) is not None:
                self._peaks = peaks if self._peaks is None else torch.maximum(self._peaks, peaks)

        task.register_forward_pre_hook(before, prepend=True)
        task.register_forward_hook(after)

    def _extend_schedulers(self) -> None:
        build = Scheduler.__init__

        @functools.wraps(build)
        def __init__(scheduler: Scheduler, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            build(scheduler, *args, **kwargs)
            self._has_scheduler = True
            if self.config.schedule != "constant":
                self._set_progress(scheduler, 0)

        self._replace(Scheduler, "__init__", __init__)
        for cls in (Scheduler, *_subclasses(Scheduler)):
            if "step" in vars(cls):
                self._replace(cls, "step", self._step(vars(cls)["step"]))
            if "step_update" in vars(cls):
                self._replace(cls, "step_update", self._step_update(vars(cls)["step_update"]))

    def _step(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def step(scheduler: Scheduler, epoch: int, metric: float | None = None) -> None:
            original(scheduler, epoch, metric)
            if self.handle is None and epoch > 0:
                raise RuntimeError(
                    "TWEO did nothing in this epoch: the script built none of timm's training tasks, to which it "
                    "attaches. It takes the train.py of timm 1.0.31 or later, or this project's own"
                )
            self._end_epoch(epoch - 1)
            if scheduler.t_in_epochs and self.config.schedule != "constant":
                self._set_progress(scheduler, epoch)

        return step

    def _step_update(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def step_update(scheduler: Scheduler, num_updates: int, metric: float | None = None) -> None:
            original(scheduler, num_updates, metric)
            if not scheduler.t_in_epochs and self.config.schedule != "constant":
                self._set_progress(scheduler, num_updates)

        return step_update

    def _set_progress(self, scheduler: Scheduler, t: int) -> None:
        if not hasattr(scheduler, "get_cycle_length"):
            raise ValueError(
                f"TWEO_SCHEDULE={self.config.schedule} follows timm's learning-rate schedule, and a "
                f"{type(scheduler).__name__} has no length: choose --sched cosine, tanh, poly or wsd, or "
                "TWEO_SCHEDULE=constant"
            )
        # The length is not known while the scheduler is being built, and not needed.
        self._progress = min(t / scheduler.get_cycle_length(), 1.0) if t else 0.0
        if self.handle is not None:
            self.handle.set_progress(self._progress)

    def _extend_saver(self) -> None:
        build, save = CheckpointSaver.__init__, CheckpointSaver.save_checkpoint

        @functools.wraps(build)
        def __init__(saver: CheckpointSaver, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            build(saver, *args, **kwargs)
            self._folder, self._first_row = Path(saver.checkpoint_dir), True

        @functools.wraps(save)
        def save_checkpoint(saver: CheckpointSaver, epoch: int, metric: float | None = None) -> Any:
            # Only the first process saves: it must not wait for the others here.
            if not self._has_scheduler:
                self._end_epoch(epoch, everywhere=False)
            return save(saver, epoch, metric)

        self._replace(CheckpointSaver, "__init__", __init__)
        self._replace(CheckpointSaver, "save_checkpoint", save_checkpoint)

    def _end_epoch(self, epoch: int, everywhere: bool = True) -> None:
        """Record the peaks since the last call, if there was training since; the only place that waits."""
        if self.handle is None or self._peaks is None:
            return
        peaks, self._peaks = self._peaks, None
        if everywhere and torch.distributed.is_available() and torch.distributed.is_initialized():
            peaks = peaks.nan_to_num(nan=float("inf"))  # a NaN does not survive a maximum over processes
            torch.distributed.all_reduce(peaks, torch.distributed.ReduceOp.MAX)
        if self._folder is None:  # no saver: not the first process
            return
        by_block = dict(zip(self.handle.block_names, peaks.tolist(), strict=True))
        worst = max(by_block, key=lambda name: nan_largest(by_block[name]))
        _logger.info("TWEO: largest |A| of epoch %d: %.4g in %s", epoch, by_block[worst], worst)
        path = self._folder / "outliers.jsonl"
        if self._first_row:  # a resumed run repeats epochs, and timm drops their rows of summary.csv
            keep_rows_before(path, "epoch", epoch)
        self._first_row = False
        append_rows(path, [{"epoch": epoch, "block": name, "train_peak_abs": v} for name, v in by_block.items()])


def _subclasses(cls: type) -> list[type]:
    """Every class that derives from another, at any distance, once."""
    direct: list[type] = cls.__subclasses__()
    return list(dict.fromkeys([*direct, *(found for subclass in direct for found in _subclasses(subclass))]))


TimmPlugin(*read_settings(os.environ)).install()
