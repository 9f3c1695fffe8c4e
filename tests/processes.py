"""Processes of one run, announced to each other as torchrun or SLURM announces them.

Forked, which spares them the imports, and ended without taking the interpreter down: gloo's threads outlive a group
that something still refers to, and one that gives a tensor back while Python shuts down aborts a run that is complete
("terminate called without an active exception"). What they print, pytest captures and shows when a test fails.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping

import torch


def start(run: Callable[[], int | None], environment: Mapping[str, str] | None = None) -> multiprocessing.Process:
    """Start a process that runs a function, whose result is its exit code."""

    def body() -> None:
        torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
        os.environ.update(environment or {})
        raise SystemExit(run())

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def start_together(
    run: Callable[[], int | None], size: int = 2, scheduler: str = "torchrun"
) -> list[multiprocessing.Process]:
    """Start the processes of one run, on the loopback and a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    names = {
        "torchrun": ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
        "slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    }[scheduler]
    return [
        start(run, shared | dict(zip(names, (str(rank), str(rank), str(size)), strict=True))) for rank in range(size)
    ]


def run_together(run: Callable[[], int | None], size: int = 2, scheduler: str = "torchrun") -> list[int]:
    """Run the processes of one run to their end; their exit codes, by rank."""
    processes = start_together(run, size, scheduler)
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]
