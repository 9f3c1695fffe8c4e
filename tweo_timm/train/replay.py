"""Random state, and a loader that can be entered in the middle of an epoch.

What a batch holds depends on random numbers drawn in three places: the sampler and the worker processes, which are
seeded when the epoch's iterator is made; this process, where timm's prefetcher erases patches of the batch *after* the
one being trained; and the model in between. To go on in the middle of an epoch exactly, all three are put back: the
iterator is made from the random state of the epoch's start, the batches already used are read and dropped, and the
batch that follows is prepared under the random state under which it was prepared the first time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The state of a process's random generators: Python's, NumPy's, torch's, and that of its CUDA device, if any."""

    python: tuple[Any, ...]
    numpy: Any
    torch: Tensor
    cuda: tuple[Tensor, ...]

    @classmethod
    def capture(cls) -> RandomState:
        """Take the present state."""
        cuda = (torch.cuda.get_rng_state(),) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)  # noqa: NPY002

    def restore(self) -> None:
        """Make this the present state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.torch)
        for state in self.cuda:
            torch.cuda.set_rng_state(state)

    def state_dict(self) -> dict[str, Any]:
        """Return it as tensors and numbers only, which torch.load(weights_only=True) accepts."""
        version, words, gauss = self.python
        name, keys, position, has_gauss, cached = self.numpy
        return {
            "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
            "torch": self.torch,
            "cuda": list(self.cuda),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RandomState:
        """Rebuild it from `state_dict()`."""
        version, words, gauss = state["python"]
        name, keys, position, has_gauss, cached = state["numpy"]
        python = (version, tuple(words.tolist()), gauss)
        numpy = (name, keys.numpy().astype(np.uint32), position, has_gauss, cached)
        return cls(python, numpy, state["torch"], tuple(state["cuda"]))


@dataclass(frozen=True)
class Position:
    """A point inside an epoch from which its loader can be entered again.

    Attributes:
        batch: how many batches have been used.
        epoch_start: random state just before the epoch's iterator was made.
        before_batch: random state just before the next batch was fetched.
        now: random state after the last used batch.
    """

    batch: int
    epoch_start: RandomState
    before_batch: RandomState
    now: RandomState

    def state_dict(self) -> dict[str, Any]:
        """Return it as tensors and numbers only."""
        states = {name: getattr(self, name).state_dict() for name in ("epoch_start", "before_batch", "now")}
        return {"batch": self.batch, **states}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Position:
        """Rebuild it from `state_dict()`."""
        names = ("epoch_start", "before_batch", "now")
        return cls(state["batch"], *(RandomState.from_state_dict(state[name]) for name in names))


class ReplayLoader:
    """Wraps the DataLoader inside timm's PrefetchLoader (or a bare one), remembering random states batch by batch.

    Args:
        loader: a DataLoader whose workers do not outlive an epoch.
        lookahead: whether the consumer fetches one batch ahead of the one it hands out, as PrefetchLoader does.
    """

    def __init__(self, loader: Any, lookahead: bool) -> None:
        self.loader = loader
        self.lookahead = lookahead
        self._entry: Position | None = None
        self._epoch_start: RandomState | None = None
        self._before: dict[int, RandomState] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)

    def __len__(self) -> int:
        return len(self.loader)

    def enter_at(self, position: Position | None) -> None:
        """Begin the next epoch at this position instead of at its first batch."""
        self._entry = position

    def position(self, batch: int) -> Position:
        """Return the position after `batch` batches of the running epoch have been used."""
        if self._epoch_start is None:
            raise RuntimeError("no epoch has been started")
        now = RandomState.capture()
        return Position(batch, self._epoch_start, self._before.get(batch, now), now)

    def __iter__(self) -> Iterator[Any]:
        entry, self._entry = self._entry, None
        if entry is not None and entry.batch >= len(self.loader):
            self._epoch_start, self._before = entry.epoch_start, {}
            entry.now.restore()
            return
        if entry is not None:
            entry.epoch_start.restore()
        self._epoch_start = RandomState.capture()
        self._before = {}
        batches = iter(self.loader)
        skip = entry.batch if entry is not None else 0
        for _ in range(skip):
            next(batches)
        if entry is not None:
            entry.before_batch.restore()
        for index in range(skip, len(self.loader)):
            # With lookahead, the batch in use is index - 1, and the next one to be used may be this one.
            self._before = {index: RandomState.capture()}
            try:
                batch = next(batches)
            except StopIteration:  # a stream shorter than it announced
                break
            yield batch
            if entry is not None and index == skip and self.lookahead:
                # What the consumer drew for this batch, it drew before the batch in use was trained on.
                entry.now.restore()
