"""Runs of 20 updates, and the program as somebody outside sees it: words in; a status, text and files out.

Only `train.main` and `validate.main`, the two scripts' own, are called: modules may move behind them.
"""

import io
import itertools
import os
import signal
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from torch.optim.optimizer import register_optimizer_step_post_hook

import train
import validate
from tests.train.runs import TINY

MAIN = {"train.py": train.main, "validate.py": validate.main}
SWIN = ["img_size=32", "window_size=4", "embed_dim=16", "depths=(1,1)", "num_heads=(2,2)"]
MAXVIT = ["img_size=64", "embed_dim=(32,32)", "depths=(1,1)"]
MODELS = {
    "vit": ["--model", "vit_tiny_patch16_224", "--input-size", "3", "32", "32", "--model-kwargs", *TINY],
    "swin": ["--model", "swin_tiny_patch4_window7_224", "--input-size", "3", "32", "32", "--model-kwargs", *SWIN],
    "maxvit": ["--model", "maxvit_nano_rw_256", "--input-size", "3", "64", "64", "--model-kwargs", *MAXVIT],
}
# A large epsilon: where a gradient is zero but for rounding, as that of a key's bias, Adam would make it a full step.
UPDATES = ["--device", "cpu", "-j", "0", "-b", "4", "--opt", "adamw", "--opt-eps", "1e-4", "--lr", "1e-3"]
UPDATES += ["--warmup-epochs", "0", "--num-classes", "3", "--epochs", "2"]
CHOICES = {
    "tweo": ["--tweo-weight", "0.5", "--tweo-tau", "0.5"],
    "bfloat16": ["--amp", "--amp-dtype", "bfloat16"],
    "fp8": ["--fp8", "emulated"],
    # Accumulation halves the updates of an epoch.
    "averaged": ["--model-ema", "--model-ema-decay", "0.9", "--grad-accum-steps", "2", "--epochs", "4"],
    "random": [*("--mixup", "0.5", "--reprob", "0.5", "--remode", "pixel", "--drop-path", "0.1", "--drop", "0.1")],
    "clipped": ["--clip-grad", "1", "--tweo-schedule", "cosine", "--sched-on-updates", "--outlier-interval", "2"],
    "checkpointing": ["--grad-checkpointing"],
    "element": ["--tweo-reduction", "element"],
    "current": ["--fp8-scaling", "current"],
    "resumed": [],  # see `trained`
}
_SQUARE = [
    "-".join(filter(None, parts))
    for parts in itertools.product(("vit", "swin"), ("", "tweo"), ("", "fp8"), ("", "bfloat16"), ("", "averaged"))
]
_MORE = [
    "vit-tweo-checkpointing-clipped",
    "swin-tweo-element-random",
    "vit-tweo-fp8-current-averaged",
    "maxvit-tweo",
    "vit-tweo-fp8-averaged-random-clipped",
    "vit-tweo-fp8-averaged-random-clipped-resumed",
    "swin-tweo-fp8-bfloat16-averaged-random-resumed",
]
SCENARIOS = [*_SQUARE, *_MORE]
"""Names of runs: a model of `MODELS`, then what is switched on of `CHOICES`."""


class Taken(NamedTuple):
    """What a command ended with, printed and complained."""

    status: int
    out: str
    err: str


def take(program: str, words: list[str]) -> Taken:
    """Run a command in this process."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            status = MAIN[program](words)
        except SystemExit as end:
            status = int(end.code or 0)
    return Taken(status, out.getvalue(), err.getvalue())


def words_of(scenario: str, images: Path, out: Path) -> list[str]:
    model, *choices = scenario.split("-")
    settings = itertools.chain.from_iterable(CHOICES[choice] for choice in choices)
    where = ["--data-dir", str(images), "--output", str(out), "--experiment", scenario]
    return [*MODELS[model], *UPDATES, *settings, *where]


def trained(scenario: str, images: Path, out: Path, *more: str) -> Path:
    """Do the 20 updates, with an interruption and a second command if the name ends in resumed; the run folder."""
    words = [*words_of(scenario, images, out), *more]
    if scenario.endswith("resumed"):
        words += ["--resume", "auto"]
        cut = take_until(words, updates=13)
        assert cut.status == 128 + signal.SIGTERM, cut.err
    ended = take("train.py", words)
    assert ended.status == 0, ended.err
    return out / scenario


def take_until(words: list[str], updates: int) -> Taken:
    """Run train.py and send it SIGTERM inside this update."""
    seen = itertools.count(1)

    def stop(*_: object) -> None:
        if next(seen) == updates:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_post_hook(stop)
    try:
        return take("train.py", words)
    finally:
        hook.remove()
