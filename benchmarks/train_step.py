"""What a training step of train.py costs, against that of a plain loop over the same timm parts, batch by batch.

    OMP_NUM_THREADS=1 TIMM_FUSED_ATTN=0 python benchmarks/train_step.py                  # the quickstart ViT

All kinds of step train one model on the same batches, in an order drawn anew in every round, so that whatever else the
machine does hits all of them alike: ratios are good to some tenths of a percent, those of benchmarks/train_epoch.py to
a few percent. Left out is what an epoch has beside its steps: the loader and the log lines. `recorded` is the one step
in --outlier-interval (50) in which the statistics of every block are counted.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import time
from dataclasses import dataclass, replace

from train_epoch import plain_gradients, plain_update, session_on_photos

from tweo_timm import TweoConfig, attach_tweo
from tweo_timm.outliers import OutlierRecorder
from tweo_timm.train.build import Session
from tweo_timm.train.loop import Trainer
from tweo_timm.train.watch import SignalWatch


@dataclass(frozen=True)
class Kind:
    """One kind of step: the plain loop's, or train.py's with a weight of the penalty; None leaves the blocks alone."""

    name: str
    plain: bool = False
    weight: float | None = None
    recorded: bool = False


KINDS = (
    Kind("plain timm loop", plain=True),
    Kind("plain timm loop again", plain=True),
    Kind("train.py, TWEO off, unwatched"),
    Kind("train.py, TWEO off", weight=0.0),
    Kind("train.py, TWEO off, recorded", weight=0.0, recorded=True),
    Kind("train.py, TWEO on", weight=0.01),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/quickstart_stress.yaml")
    parser.add_argument("--rounds", type=int, default=500)
    arguments, more = parser.parse_known_args()
    logging.disable(logging.INFO)
    with session_on_photos(["-c", arguments.recipe, *more], crops=32) as session:
        report(measure(session, arguments.rounds))


def measure(session: Session, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each kind of step, in every round."""
    session.train_recorder = OutlierRecorder(session.model, standing=False)
    session.options = replace(session.options, outlier_interval=50)
    trainer = Trainer(session, SignalWatch())
    batches = [(images.clone(), targets.clone()) for images, targets in session.data.train]
    session.model.train()
    seconds: dict[str, list[float]] = {kind.name: [] for kind in KINDS}
    for index in range(rounds + 10):
        for kind in random.sample(KINDS, len(KINDS)):
            # For the plain loop too: what comes before a step decides what the caches hold.
            handle = attach_tweo(session.task, TweoConfig(weight=kind.weight or 0.0))
            if kind.weight is None:
                handle.remove()
            session.tweo = None if kind.weight is None else handle
            trainer.step.cursor.batch = len(batches) // 2 if kind.recorded else 0
            trainer.step.cursor.updates = 1
            images, targets = random.choice(batches)
            begin = time.perf_counter()
            if kind.plain:
                plain_update(session, 1, plain_gradients(session, images, targets))
            else:
                trainer.step(images, targets)
            if index >= 10:  # the first rounds warm up
                seconds[kind.name].append(time.perf_counter() - begin)
            handle.remove()
            session.train_recorder.reset()
    return seconds


def report(seconds: dict[str, list[float]]) -> None:
    plain = [sum(pair) / 2 for pair in zip(seconds[KINDS[0].name], seconds[KINDS[1].name], strict=True)]
    for name, each in seconds.items():
        ratios = [one / other for one, other in zip(each, plain, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        error = 0.93 * (high - low) / len(ratios) ** 0.5  # of a median: 1.25 sigma / sqrt(n), sigma from the quartiles
        print(f"{name:30s} {1e3 * statistics.median(each):8.2f} ms   {middle:.4f} +- {error:.4f} of the plain step")


if __name__ == "__main__":
    main()
