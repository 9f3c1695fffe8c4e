"""What an epoch of train.py costs, against a plain loop over the same timm parts.

    python benchmarks/train_epoch.py                       # vit_small_patch16_224, bfloat16, batch 16
    python benchmarks/train_epoch.py --recipe recipes/quickstart_stress.yaml

All loops train the same model with the same optimizer, loader and data in turns, an epoch each, so that they differ in
nothing but the loop. A round is an epoch of a plain loop (timm's loader, task, optimizer, scheduler), one of train.py
without TWEO and without its statistics (`--outlier-interval 0`), one without TWEO, one with it, and one of the plain
loop again. Printed: the median time of each, and the median over rounds, with the quartiles, of its ratio to the mean
of the two plain epochs around it. The first plain epoch's ratio to that mean is 1 but for what disturbs the machine.
train.py does everything that it does between two validations: statistics of outliers, watching for values that are no
numbers, what an exact continuation needs, log lines.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from timm.utils import AverageMeter, dispatch_clip_grad
from torch import Tensor

from tweo_timm import TweoConfig, attach_tweo
from tweo_timm.outliers import OutlierRecorder
from tweo_timm.photos import write_photo_crops
from tweo_timm.train.build import Session, build_session
from tweo_timm.train.loop import Trainer
from tweo_timm.train.options import parse_train_options
from tweo_timm.train.watch import SignalWatch
from tweo_timm.train.world import World

DEFAULT = ["--model", "vit_small_patch16_224", "-b", "16", "--amp", "--amp-dtype", "bfloat16", "--opt", "adamw"]
CPU = World(torch.device("cpu"))
PLAIN = "plain timm loop"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="a recipe of train.py instead of the default settings")
    parser.add_argument("--crops", type=int, default=16, help="training images of each of the 14 photographs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, where other programs disturb")
    arguments, more = parser.parse_known_args()
    logging.disable(logging.INFO)
    chosen = ["-c", arguments.recipe] if arguments.recipe else DEFAULT
    with session_on_photos([*chosen, *more], arguments.crops) as session:
        kinds = {
            PLAIN: PlainLoop(session),
            "train.py, TWEO off, unwatched": OurLoop(session, outlier_interval=0),
            "train.py, TWEO off": OurLoop(session),
            "train.py, TWEO on": OurLoop(session, tweo_weight=0.01),
            f"{PLAIN} again": PlainLoop(session),
        }
        report(kinds, arguments.rounds, time.process_time if arguments.cpu_time else time.perf_counter)


@contextlib.contextmanager
def session_on_photos(words: list[str], crops: int) -> Iterator[Session]:
    """Build a run of train.py, without TWEO and without statistics, on so many crops of each of the 14 photographs."""
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photo_crops(Path(folder) / "photos", train=crops, validation=1)
        words = [*words, "--data-dir", str(photos), "--num-classes", "14", "--device", "cpu", "-j", "0"]
        yield build_session(parse_train_options([*words, "--tweo-weight", "0", "--outlier-interval", "0"]), CPU)


class PlainLoop:
    """Epochs of the plain loop."""

    def __init__(self, session: Session) -> None:
        self.session = session

    @contextlib.contextmanager
    def attached(self) -> Iterator[Callable[[int], object]]:
        """Give the function that trains one epoch; timm's loader goes without our memory of random states."""
        data = self.session.data
        inner = (data.train, "loader") if data.train is not data.replay else (data, "train")
        setattr(*inner, data.replay.loader)
        yield lambda epoch: plain_loop(self.session, epoch)
        setattr(*inner, data.replay)


class OurLoop:
    """Epochs of train.py with the given options."""

    def __init__(self, session: Session, tweo_weight: float = 0.0, outlier_interval: int = 50) -> None:
        options = replace(session.options, tweo_weight=tweo_weight, outlier_interval=outlier_interval)
        self.session = replace(session, options=options)

    @contextlib.contextmanager
    def attached(self) -> Iterator[Callable[[int], object]]:
        """Give the function that trains one epoch, with the hooks of these options on the task meanwhile."""
        session, options = self.session, self.session.options
        if options.outlier_interval:
            session.tweo = attach_tweo(session.task, TweoConfig(weight=options.tweo_weight))
            session.train_recorder = OutlierRecorder(session.model, standing=False)
        yield Trainer(session, SignalWatch()).train_epoch
        if session.tweo is not None:
            session.tweo.remove()


def plain_loop(session: Session, epoch: int) -> float:
    """The loop of timm's documentation, with its loss meter that reads the loss at every step."""
    options, losses = session.options, AverageMeter()
    loader = session.data.train
    update = epoch * session.updates_per_epoch
    session.model.train()
    session.optimizer.zero_grad()
    for index, (images, targets) in enumerate(loader):
        losses.update(plain_gradients(session, images, targets), len(targets))
        if (index + 1) % options.grad_accum_steps == 0 or index + 1 == len(loader):
            update += 1
            plain_update(session, update, losses.avg)
    return losses.avg


def plain_gradients(session: Session, images: Tensor, targets: Tensor) -> float:
    """Forward and backward pass of a micro-batch; returns its loss."""
    with session.autocast():
        loss = session.task(images, targets)["loss"]
    accumulate = session.options.grad_accum_steps
    (loss if accumulate == 1 else loss / accumulate).backward()
    return loss.item()


def plain_update(session: Session, update: int, loss: float) -> None:
    """What follows when the gradients are complete; `update` counts it, `loss` is what a scheduler may ask for."""
    options = session.options
    if options.clip_grad is not None:
        dispatch_clip_grad(session.model.parameters(), options.clip_grad, mode=options.clip_mode)
    session.optimizer.step()
    session.optimizer.zero_grad()
    session.task.update_ema(step=update)
    session.scheduler.step_update(update, metric=loss)


def report(kinds: dict[str, PlainLoop | OurLoop], rounds: int, clock: Callable[[], float]) -> None:
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for index in range(rounds + 1):
        for name, kind in kinds.items():
            with kind.attached() as epoch:
                begin = clock()
                epoch(0)
                if index:  # the first round warms up
                    times[name].append(clock() - begin)
    around = [(one + other) / 2 for one, other in zip(times[PLAIN], times[f"{PLAIN} again"], strict=True)]
    for name, seconds in times.items():
        ratios = [one / reference for one, reference in zip(seconds, around, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        spread = f"{middle:.3f} of the plain loop ({low:.3f} to {high:.3f})"
        print(f"{name:30s} {statistics.median(seconds):8.3f} s   {spread}")


if __name__ == "__main__":
    main()
