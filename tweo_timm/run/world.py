"""The device of this process and its place among the others."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import init_distributed_device


@dataclass(frozen=True)
class World:
    """Where this process computes, and which of how many it is.

    Attributes:
        device: the device of the model.
        distributed: whether a process group is up.
        rank: number of this process among all; 0 writes files.
        local_rank: number of this process on its machine.
        size: how many processes there are.
    """

    device: torch.device
    distributed: bool = False
    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def primary(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any process. A collective: every process has to call it."""
        if not self.distributed:
            return flag
        vote = torch.tensor(int(flag), device=self.device)
        torch.distributed.all_reduce(vote, op=torch.distributed.ReduceOp.MAX)
        return bool(vote.item())

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, by rank. A collective."""
        if not self.distributed:
            return [value]
        values = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def refuse(self, check: Callable[..., None], *arguments: Any) -> None:
        """Let the first process check something of its own, a file system say, and all raise what it raised.

        A collective.

        Raises:
            ValueError: `check` raised it.
        """
        refusal = None
        if self.primary:
            try:
                check(*arguments)
            except ValueError as error:
                refusal = str(error)
        refusal = self.gather(refusal)[0]
        if refusal is not None:
            raise ValueError(refusal)

    def close(self) -> None:
        """Leave the process group, and end its threads.

        What is left of a run refers to the group (DDP is part of cycles), whose gloo threads would then outlive it: one
        that gives a tensor back while Python shuts down aborts the process, after a run that is complete.
        """
        if self.distributed:
            gc.collect()
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the other processes, and leave them at the end; all but the first log warnings only.

    Args:
        device: as for `join_world`.

    Raises:
        ValueError: if the device is unknown or not there.
    """
    world = join_world(device)
    if not world.primary:
        logging.getLogger().setLevel(logging.WARNING)
    try:
        yield world
    finally:
        world.close()


def join_world(device: str) -> World:
    """Pick the device, and join the process group that torchrun, SLURM or MPI announce in the environment.

    Args:
        device: as for torch.device, 'cuda' or 'cpu' say; in a distributed run the local rank chooses the index.

    Raises:
        ValueError: if the device is unknown or not there.
    """
    kind = device.split(":", maxsplit=1)[0]
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device} is no device of torch: use cuda, cuda:N, mps or cpu") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: this machine has no usable CUDA GPU. Use --device cpu, or install a GPU build of torch"
        )
    settings = argparse.Namespace(device=device)
    resolved = init_distributed_device(settings)
    try:
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device} is not to be had on this machine: {error}. Use --device cpu") from error
    return World(resolved, settings.distributed, settings.rank, settings.local_rank, settings.world_size)
