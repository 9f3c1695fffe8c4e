"""What an epoch of train.py costs, against a plain loop over the same timm parts.

    python benchmarks/train_epoch.py                       # vit_small_patch16_224, bfloat16, batch 16
    python benchmarks/train_epoch.py --recipe recipes/quickstart_stress.yaml

An epoch of each kind takes turns, round by round: a plain loop (timm's loader, task, optimizer, scheduler), train.py
without TWEO and without its statistics (`--outlier-interval 0`), without TWEO, and with it. Printed: the median time of
each, and the median over rounds of its ratio to the plain loop of that round. train.py does everything that it does
between two validations: statistics of outliers, watching for values that are no numbers, random states for an exact
continuation, log lines.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timm.task import ClassificationTask
from timm.utils import AverageMeter, dispatch_clip_grad

from tweo_timm.photos import write_photo_crops
from tweo_timm.train.build import Session, build_session
from tweo_timm.train.loop import Trainer
from tweo_timm.train.options import TrainOptions, parse_train_options
from tweo_timm.train.watch import SignalWatch
from tweo_timm.train.world import World

DEFAULT = ["--model", "vit_small_patch16_224", "-b", "16", "--amp", "--amp-dtype", "bfloat16", "--opt", "adamw"]
CPU = World(torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="a recipe of train.py instead of the default settings")
    parser.add_argument("--crops", type=int, default=4, help="training images of each of the 14 photographs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, where other programs disturb")
    arguments, more = parser.parse_known_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photo_crops(Path(folder) / "photos", train=arguments.crops, validation=1)
        chosen = ["-c", arguments.recipe] if arguments.recipe else DEFAULT
        words = [*chosen, "--data-dir", str(photos), "--num-classes", "14", "--device", "cpu", "-j", "0", *more]
        kinds = {
            "plain timm loop": plain_epoch(parse_train_options([*words, "--tweo-weight", "0"])),
            "train.py, TWEO off, unwatched": our_epoch(
                parse_train_options([*words, "--tweo-weight", "0", "--outlier-interval", "0"])
            ),
            "train.py, TWEO off": our_epoch(parse_train_options([*words, "--tweo-weight", "0"])),
            "train.py, TWEO on": our_epoch(parse_train_options([*words, "--tweo-weight", "0.01"])),
        }
        report(kinds, arguments.rounds, time.process_time if arguments.cpu_time else time.perf_counter)


def our_epoch(options: TrainOptions) -> Callable[[int], object]:
    session = build_session(options, CPU)
    session.wrap()
    return Trainer(session, SignalWatch()).train_epoch


def plain_epoch(options: TrainOptions) -> Callable[[int], object]:
    session = build_session(options, CPU)
    for recorder in (session.recorder, session.train_recorder, session.tweo):
        if recorder is not None:
            recorder.remove()
    if session.data.train is not session.data.replay:  # timm's loader without our memory of random states
        session.data.train.loader = session.data.replay.loader
    return lambda epoch: plain_loop(session, session.task, epoch)


def plain_loop(session: Session, task: ClassificationTask, epoch: int) -> float:
    """The loop of timm's documentation, with its loss meter that reads the loss at every step."""
    options, losses = session.options, AverageMeter()
    loader = session.data.train
    update = epoch * session.updates_per_epoch
    session.model.train()
    session.optimizer.zero_grad()
    for index, (images, targets) in enumerate(loader):
        with session.autocast():
            loss = task(images, targets)["loss"]
        (loss / options.grad_accum_steps).backward()
        losses.update(loss.item(), len(targets))
        if (index + 1) % options.grad_accum_steps == 0 or index + 1 == len(loader):
            if options.clip_grad is not None:
                dispatch_clip_grad(session.model.parameters(), options.clip_grad, mode=options.clip_mode)
            session.optimizer.step()
            session.optimizer.zero_grad()
            update += 1
            task.update_ema(step=update)
            session.scheduler.step_update(update, metric=losses.avg)
    return losses.avg


def report(kinds: dict[str, Callable[[int], object]], rounds: int, clock: Callable[[], float]) -> None:
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for index in range(rounds + 1):
        for name, epoch in kinds.items():
            begin = clock()
            epoch(0)
            if index:  # the first round warms up
                times[name].append(clock() - begin)
    reference = times[next(iter(kinds))]
    for name, seconds in times.items():
        ratio = statistics.median(one / other for one, other in zip(seconds, reference, strict=True))
        print(f"{name:30s} {statistics.median(seconds):8.3f} s   {ratio:6.3f} of the plain loop", flush=True)


if __name__ == "__main__":
    main()
