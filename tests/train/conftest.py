"""Images and interruptions for tests of the training command."""

import multiprocessing
import os
import signal
import subprocess

import pytest
import torch

from tests.images import write_images
from tweo_timm.train.step import TrainStep


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny matrices only lose by threads, and results then do not depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Seven training batches of eight, and two validation batches, in three classes."""
    return write_images(tmp_path_factory.mktemp("images"), train=56, val=12)


@pytest.fixture
def interrupt(monkeypatch):
    """A function that sends this process, or its loader's as well, a signal after so many micro-batches."""
    original = TrainStep.__call__

    def after(batches, number=signal.SIGTERM, workers_too=False):
        seen = []

        def call(self, images, targets):
            original(self, images, targets)
            seen.append(1)
            if len(seen) == batches:
                if workers_too:  # another process sends it, as a scheduler would
                    workers = [str(process.pid) for process in multiprocessing.active_children()]
                    subprocess.run(["kill", f"-{int(number)}", *workers], check=True)
                os.kill(os.getpid(), number)

        monkeypatch.setattr(TrainStep, "__call__", call)

    yield after
    monkeypatch.setattr(TrainStep, "__call__", original)
