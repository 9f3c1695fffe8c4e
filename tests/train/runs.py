"""Tiny runs of the training command, in this process."""

import json
import random
import time
from collections.abc import Callable
from multiprocessing import Process
from pathlib import Path

import pytest
import torch

from tests import models, processes
from tests.models import as_words
from tweo_timm.needs import lacking
from tweo_timm.run.world import World
from tweo_timm.train.build import Session, build_session
from tweo_timm.train.cli import main
from tweo_timm.train.options import parse_train_options

TINY = as_words(models.VIT)
VIT = ["--model", models.VIT_ARCH, "--model-kwargs", *TINY, "--num-classes", "3", "--input-size", "3", "32", "32"]
RUN = ["--device", "cpu", "-j", "0", "-b", "8", "--opt", "adamw", "--lr", "1e-3", "--warmup-epochs", "0"]


def command(data: Path, out: Path, *more: str, name: str = "run", model: list[str] | None = None) -> list[str]:
    if "--fsdp" in more and lacking("sharding"):
        pytest.skip(lacking("sharding"))
    where = ["--data-dir", str(data), "--output", str(out), "--experiment", name]
    return [*(model or VIT), *RUN, *where, "--epochs", "2", *more]


def train(data: Path, out: Path, *more: str, name: str = "run", model: list[str] | None = None) -> Path:
    """Run to the end and return the run folder."""
    assert main(command(data, out, *more, name=name, model=model)) == 0
    return out / name


def session_of(data: Path, out: Path, *more: str, model: list[str] | None = None) -> Session:
    """Build a run without beginning it."""
    return build_session(parse_train_options(command(data, out, *more, model=model)), World(torch.device("cpu")))


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=False)


def last(folder: Path) -> dict:
    return load(folder / "last.pth.tar")


def rows(folder: Path, name: str = "outliers.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def same_tensors(a, b) -> bool:
    """Whether two nested states are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_tensors(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def start(words: list[str]) -> Process:
    return processes.start(lambda: main(words))


def start_together(words: list[str]) -> list[Process]:
    """Start a run of two processes."""
    return processes.start_together(lambda: main(words))


def train_together(words: list[str], size: int = 2, scheduler: str = "torchrun") -> list[int]:
    """Run several processes to their end; their exit codes."""
    return processes.run_together(lambda: main(words), size, scheduler)


def wait_until(condition: Callable[[], bool], processes: list[Process]) -> None:
    """Wait until a condition holds, or one of the processes has ended; however long it takes them."""
    while not condition() and all(process.is_alive() for process in processes):
        time.sleep(0.01)


def killed_after_an_update(folder: Path, processes: list[Process], rng: random.Random) -> bool:
    """Kill a run somewhere after it has written its next checkpoint; say whether it was still running.

    What happens between one checkpoint and the next takes some hundredths of a second: the moment is anywhere in it.
    """

    def checkpoints() -> set[str]:
        return {path.name for path in folder.glob("*.pth.tar")}

    before = checkpoints()
    wait_until(lambda: checkpoints() != before, processes)
    processes[0].join(rng.uniform(0, 0.1))
    running = processes[0].is_alive()
    for process in processes:
        process.kill()
        process.join()
    return running
