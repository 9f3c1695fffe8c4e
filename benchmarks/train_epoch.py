r"""What an epoch of train.py costs, against a plain loop over the same timm parts.

    python benchmarks/train_epoch.py                       # vit_small_patch16_224, bfloat16, batch 16
    OMP_NUM_THREADS=1 TIMM_FUSED_ATTN=0 python benchmarks/train_epoch.py --recipe recipes/quickstart_stress.yaml \
        --processes 10 --rounds 3

All loops train the same model with the same optimizer, loader and data in turns, an epoch each, so that they differ in
nothing but the loop. A round is two epochs of a plain loop (timm's loader, task, optimizer, scheduler), one of train.py
without TWEO and without its statistics (`--outlier-interval 0`), one without TWEO, and one with it, in an order drawn
anew, because what came before decides what heap and caches hold. Printed of each, against both plain ones together:

    epochs   the median over rounds, with the quartiles, of its time to the mean of the two plain epochs of the round;
    batches  the epoch made of the lower quartile over rounds of the time of each of its batches, which leaves out what
             disturbs the machine for less than a few rounds, as other programs do.

How far the plain loop is from 1 itself tells what the machine can resolve. Rounds of one process share its layout of
memory, which moves the ratios of a small model by 0.01 or more: `--processes` measure one after the other, each is
printed, and the last lines are over the rounds of all of them.

train.py does all that it does between two validations: statistics of outliers, watching for values that are no numbers,
what an exact continuation needs, log lines.

Large tensors on a CPU come with fresh pages, whose cost varies more than what is measured here. With glibc, the
variables MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_, both at 8589934592, say, let it keep them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from timm.utils import AverageMeter, dispatch_clip_grad
from torch import Tensor

from tweo_timm import TweoConfig, attach_tweo
from tweo_timm.outliers import OutlierRecorder
from tweo_timm.photos import write_photo_crops
from tweo_timm.run.world import World
from tweo_timm.train.build import Session, build_session
from tweo_timm.train.loop import Trainer
from tweo_timm.train.options import parse_train_options
from tweo_timm.train.watch import SignalWatch

DEFAULT = ["--model", "vit_small_patch16_224", "-b", "16", "--amp", "--amp-dtype", "bfloat16", "--opt", "adamw"]
CPU = World(torch.device("cpu"))
PLAIN = "plain timm loop"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="a recipe of train.py instead of the default settings")
    about_crops = "training images of each of the 14 photographs; 16, and with a recipe the quickstart's 128"
    parser.add_argument("--crops", type=int, help=about_crops)
    parser.add_argument("--rounds", type=int, default=5, help="of each process")
    parser.add_argument("--processes", type=int, default=1, help="how many measure, one after the other")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, where other programs disturb")
    arguments, more = parser.parse_known_args()
    words = [*(["-c", arguments.recipe] if arguments.recipe else DEFAULT), *more]
    try:
        parse_train_options(words)  # what is wrong with them is told here, in one line
    except ValueError as error:
        parser.error(str(error))
    crops = arguments.crops or (128 if arguments.recipe else 16)
    runs = []
    # A process that has measured ends: the next one has a memory of its own.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as one_by_one:
        for _ in range(arguments.processes):
            each = one_by_one.submit(measured, words, crops, arguments.rounds, arguments.cpu_time).result()
            runs.append({name: torch.tensor(epochs, dtype=torch.float64) for name, epochs in each.items()})
            if arguments.processes > 1:
                print(*(f"{name} {ratios.median():.3f}" for name, ratios in epoch_ratios(runs[-1]).items()), sep=", ")
    report({name: torch.cat([run[name] for run in runs]) for name in runs[0]})


def measured(words: list[str], crops: int, rounds: int, cpu_time: bool) -> dict[str, list[list[float]]]:
    """What one process measures, as numbers, which outlive it."""
    logging.disable(logging.INFO)
    with session_on_photos(words, crops) as session:
        kinds = {
            PLAIN: PlainLoop(session),
            "train.py, TWEO off, unwatched": OurLoop(session, outlier_interval=0),
            "train.py, TWEO off": OurLoop(session),
            "train.py, TWEO on": OurLoop(session, tweo_weight=0.01),
            f"{PLAIN} again": PlainLoop(session),
        }
        seconds = measure(session, kinds, rounds, time.process_time if cpu_time else time.perf_counter)
        return {name: epochs.tolist() for name, epochs in seconds.items()}


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
        if outlier_interval:
            self.session.train_recorder = OutlierRecorder(session.model, standing=False)

    @contextlib.contextmanager
    def attached(self) -> Iterator[Callable[[int], object]]:
        """Give the function that trains one epoch, with the hooks of these options on the task meanwhile."""
        session, options = self.session, self.session.options
        if options.outlier_interval:
            session.tweo = attach_tweo(session.task, TweoConfig(weight=options.tweo_weight))
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


class ClockedLoader:
    """The innermost loader of both loops, which notes when each batch was asked for."""

    def __init__(self, loader: Any, clock: Callable[[], float]) -> None:
        self.loader = loader
        self.clock = clock
        self.marks: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        for _ in range(len(self.loader)):
            self.marks.append(self.clock())
            yield next(batches)


def measure(
    session: Session, kinds: dict[str, PlainLoop | OurLoop], rounds: int, clock: Callable[[], float]
) -> dict[str, Tensor]:
    """Return of each kind the seconds between one batch and the next, with what is before and after: (rounds, n)."""
    loader = session.data.replay.loader = ClockedLoader(session.data.replay.loader, clock)
    seconds: dict[str, list[Tensor]] = {name: [] for name in kinds}
    for index in range(rounds + 1):
        for name in random.sample(list(kinds), len(kinds)):
            with kinds[name].attached() as epoch:
                gc.collect()  # what attaching has left behind
                loader.marks = [clock()]
                epoch(0)
                loader.marks.append(clock())
                if index:  # the first round warms up
                    seconds[name].append(torch.tensor(loader.marks, dtype=torch.float64).diff())
    return {name: torch.stack(epochs) for name, epochs in seconds.items()}


def epoch_ratios(seconds: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return of each kind, and each round, the time of its epoch to the mean of the two plain epochs."""
    plain_R = (seconds[PLAIN] + seconds[f"{PLAIN} again"]).sum(1) / 2
    return {name: each_RN.sum(1) / plain_R for name, each_RN in seconds.items()}


def report(seconds: dict[str, Tensor]) -> None:
    quiet = torch.cat([seconds[PLAIN], seconds[f"{PLAIN} again"]]).quantile(0.25, dim=0).sum()
    for name, ratios_R in epoch_ratios(seconds).items():
        low, middle, high = ratios_R.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        each_RN = seconds[name]
        batches = each_RN.quantile(0.25, dim=0).sum() / quiet
        epochs = f"epochs {middle:.3f} ({low:.3f} to {high:.3f})"
        print(f"{name:30s} {each_RN.sum(1).median():8.3f} s   {epochs}   batches {batches:.3f}")


if __name__ == "__main__":
    main()
