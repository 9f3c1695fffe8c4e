"""What an epoch of train.py costs, against a plain loop over the same timm parts.

    python benchmarks/train_epoch.py                                   # vit_small_patch16_224, bfloat16, batch 16
    python benchmarks/train_epoch.py --recipe recipes/quickstart_stress.yaml --device cuda

All loops train the same model with the same optimizer, loader and data in turns, an epoch each, in an order drawn anew
every round: a plain loop (timm's loader, task, optimizer, scheduler) twice, and train.py without TWEO and without its
statistics (`--outlier-interval 0`), without TWEO, and with it. train.py does all that it does between two validations.
Printed of each: the median over rounds of its time, and of its ratio to the mean of the two plain epochs of the round,
with the smallest and the largest. How far a plain loop is from 1 itself tells what the machine can resolve.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from timm.utils import AverageMeter, dispatch_clip_grad

from tweo_timm import TweoConfig, attach_tweo
from tweo_timm.outliers import OutlierRecorder
from tweo_timm.photos import write_photo_crops
from tweo_timm.run.world import join_world
from tweo_timm.train.build import Session, build_session
from tweo_timm.train.loop import Trainer
from tweo_timm.train.options import parse_train_options
from tweo_timm.train.signals import SignalWatch

DEFAULT = ["--model", "vit_small_patch16_224", "-b", "16", "--amp", "--amp-dtype", "bfloat16", "--opt", "adamw"]
PLAIN = ("plain timm loop", "plain timm loop again")
OURS = {"TWEO off, unwatched": (0.0, 0), "TWEO off": (0.0, 50), "TWEO on": (0.01, 50)}  # weight, interval of statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="a recipe of train.py instead of the default settings")
    parser.add_argument("--crops", type=int, default=16, help="training images of each of the 14 photographs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments, more = parser.parse_known_args()
    words = [*(["-c", arguments.recipe] if arguments.recipe else DEFAULT), *more]
    logging.disable(logging.INFO)
    with session_on_photos(words, arguments.crops, arguments.device) as session:
        report(measure(session, arguments.rounds))


@contextlib.contextmanager
def session_on_photos(words: list[str], crops: int, device: str) -> Iterator[Session]:
    """Build a run of train.py, without TWEO and without statistics, on so many crops of each of the 14 photographs."""
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photo_crops(Path(folder) / "photos", train=crops, validation=1)
        words = [*words, "--data-dir", str(photos), "--num-classes", "14", "--device", device, "-j", "0"]
        options = parse_train_options([*words, "--tweo-weight", "0", "--outlier-interval", "0"])
        yield build_session(options, join_world(device))


def plain_epoch(session: Session) -> None:
    """The loop of timm's documentation, with its loss meter that reads the loss at every step."""
    options, losses, loader = session.options, AverageMeter(), session.data.train
    session.model.train()
    for index, (images, targets) in enumerate(loader):
        with session.autocast():
            loss = session.task(session.place(images), targets.to(session.world.device))["loss"]
        (loss / options.grad_accum_steps).backward()
        losses.update(loss.item(), len(targets))
        if (index + 1) % options.grad_accum_steps and index + 1 < len(loader):
            continue
        if options.clip_grad is not None:
            dispatch_clip_grad(session.model.parameters(), options.clip_grad, mode=options.clip_mode)
        session.optimizer.step()
        session.optimizer.zero_grad()
        session.task.update_ema(step=index)
        session.scheduler.step_update(index, metric=losses.avg)


def our_epoch(session: Session, weight: float, interval: int) -> float:
    """An epoch of train.py; the seconds it took, without those of attaching."""
    session = replace(session, options=replace(session.options, tweo_weight=weight, outlier_interval=interval))
    if interval:
        session.tweo = attach_tweo(session.task, TweoConfig(weight=weight))
        session.train_recorder = OutlierRecorder(session.model)
    trainer = Trainer(session, SignalWatch())
    start = time.perf_counter()
    trainer.train_epoch(0)
    seconds = time.perf_counter() - start
    for hooked in (session.tweo, session.train_recorder):
        if hooked is not None:
            hooked.remove()
    return seconds


def measure(session: Session, rounds: int) -> dict[str, list[float]]:
    """Return of each kind of loop the seconds of an epoch, round by round; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in (*PLAIN, *OURS)}
    for _ in range(rounds + 1):
        for name in random.sample(list(seconds), len(seconds)):
            gc.collect()
            if name in OURS:
                seconds[name].append(our_epoch(session, *OURS[name]))
                continue
            start = time.perf_counter()
            plain_epoch(session)
            seconds[name].append(time.perf_counter() - start)
    return {name: found[1:] for name, found in seconds.items()}


def report(seconds: dict[str, list[float]]) -> None:
    plain = [statistics.mean(pair) for pair in zip(*(seconds[name] for name in PLAIN), strict=True)]
    for name, found in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(found, plain, strict=True)]
        spread = f"({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{name:24s}{statistics.median(found):9.3f} s   {statistics.median(ratios):.3f} {spread}")


if __name__ == "__main__":
    main()
