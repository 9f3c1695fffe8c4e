"""The run folder: which it is, that one run has it at a time, and the checkpoint in it that a run continues from."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from timm.models import safe_model_name

from tweo_timm.run.checkpoint_file import CheckpointFile, read
from tweo_timm.run.world import World
from tweo_timm.train.checkpoint import holds_checkpoints, load_newest
from tweo_timm.train.options import TrainOptions

_logger = logging.getLogger(__name__)

DEFAULT_OUTPUT = "./output/train"
LOCK = ".lock"


def output(options: TrainOptions) -> Path:
    """Return the folder of all runs."""
    return Path(options.output or DEFAULT_OUTPUT)


def run_folder(options: TrainOptions, data_config: dict[str, Any]) -> Path:
    """Return the folder of a run: by its name, or by date, model and size."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    unnamed = "-".join([stamp, safe_model_name(options.model), str(data_config["input_size"][-1])])
    return output(options) / (options.experiment or unnamed)


class RunFolder:
    """The folder that a run has to itself.

    Args:
        path: of the folder, which exists.
        held: keeps it open until the run ends, so that no other folder can be taken for it.
    """

    def __init__(self, path: Path, held: contextlib.ExitStack) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        held.callback(os.close, self._descriptor)

    def require(self) -> None:
        """Stop before something is written that would make the folder anew, under a name that it no longer has.

        Raises:
            OSError: somebody has renamed or removed it.
        """
        if not _is_still(self.path, self._descriptor):
            raise OSError(
                f"the run folder {self.path} was renamed or removed while the run wrote there; nothing more was "
                "written. Give it its name back and go on with --resume auto, or start anew"
            )


@contextlib.contextmanager
def taken(folder: Path, resumed: CheckpointFile | None, world: World) -> Iterator[RunFolder | None]:
    """Have a run folder to oneself: it is made, and an earlier run in it that is not continued is set aside.

    Args:
        folder: the run folder.
        resumed: the checkpoint that the run continues from, if any.
        world: the processes; the first one does it and gets the folder, all raise what it raises.

    Raises:
        ValueError: if another run has it.
        OSError: if it cannot be made.
    """
    with contextlib.ExitStack() as held:
        refusal, mine = None, None
        try:
            if world.primary:
                mine = _take(folder, resumed, held)
        except (ValueError, OSError) as error:
            refusal = error
        refusal = world.gather(refusal)[0]
        if refusal is not None:
            raise refusal
        yield mine


def _take(folder: Path, resumed: CheckpointFile | None, held: contextlib.ExitStack) -> RunFolder:
    if folder.exists() and not (resumed is not None and lies_in(resumed, folder)):
        with locked(folder):
            pass
        set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(folder))
    return RunFolder(folder, held)


@contextlib.contextmanager
def locked(folder: Path, flag: str = "--experiment") -> Iterator[None]:
    """Keep other runs out of a folder that exists; `flag` names it.

    The system takes the lock from a process that dies, however it dies, and its loader's processes do not inherit it.

    Raises:
        ValueError: if another run has it.
    """
    descriptor = _lock(folder / LOCK, flag)
    try:
        yield
    finally:
        if descriptor is not None:
            if _is_still(folder / LOCK, descriptor):  # else the folder was renamed, and the name may be another run's
                os.unlink(folder / LOCK)
            os.close(descriptor)


def _lock(path: Path, flag: str) -> int | None:
    """Lock a file that is made for it; None where the file system knows no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                _logger.warning("%s cannot be locked (%s): see to it that no second run writes there", path, error)
                return None
            raise ValueError(
                f"another run is writing to {path.parent}: wait for its end, or give another {flag}"
            ) from error
        if _is_still(path, descriptor):
            return descriptor
        os.close(descriptor)  # the run that had it has ended, and taken the file away, in between


def _is_still(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


def find_checkpoint(options: TrainOptions, world: World) -> CheckpointFile | None:
    """Read the checkpoint to continue from; the first process chooses, all read the same.

    Raises:
        ValueError: if it cannot be read, or the run to continue has no name.
    """
    if not options.resume:
        return None
    if options.resume != "auto":
        return read(Path(options.resume))
    if not options.experiment:
        raise ValueError("--resume auto continues the run of a name: give --experiment NAME too, or --resume FILE")
    found = load_newest(output(options) / options.experiment) if world.primary else None
    path = world.gather(found.path if found is not None else None)[0]
    return found if found is not None or path is None else read(path)


def lies_in(file: CheckpointFile, folder: Path) -> bool:
    """Whether a checkpoint is an entry of a folder; where a link leads is of no account."""
    return file.path.parent.resolve() == folder.resolve()


def set_aside(folder: Path) -> None:
    """Rename the folder of an earlier run that this one does not continue, so that its checkpoints are not lost."""
    if not holds_checkpoints(folder):
        return
    number = next(n for n in itertools.count(1) if not os.path.lexists(folder.with_name(f"{folder.name}.old{n}")))
    aside = folder.with_name(f"{folder.name}.old{number}")
    folder.rename(aside)
    _logger.warning("%s held an earlier run, which is now %s; --resume auto would have continued it", folder, aside)
