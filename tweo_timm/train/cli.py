"""train.py and tweo-train: from the command line to a finished run folder."""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tweo_timm.run.log import held_messages, set_up_logging
from tweo_timm.run.recipe import dump_options
from tweo_timm.train.options import TrainOptions, parse_train_options

if TYPE_CHECKING:
    from tweo_timm.run.world import World
    from tweo_timm.train.signals import SignalWatch

_logger = logging.getLogger(__name__)

DEFAULT_OUTPUT = "./output/train"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says.

    Args:
        argv: the words after the program's name; None takes the process's own.

    Returns:
        The exit status: 0 when the run is complete, 1 for an error, 128 + N after signal N.
    """
    try:
        with held_messages():
            options = parse_train_options(argv)
            if not options.print_config:
                set_up_logging()
    except ValueError as error:
        return _fail(error)
    if options.print_config:
        print(dump_options(options), end="")
        return 0
    return train(options)


def train(options: TrainOptions) -> int:
    """Run a training to its end; errors of the user's making become one line on stderr.

    Returns:
        The exit status, as `main`.
    """
    from tweo_timm.run.dataset import UnreadableImage
    from tweo_timm.run.world import join_world
    from tweo_timm.train.health import TrainingStopped
    from tweo_timm.train.signals import Interrupted, SignalWatch

    set_up_logging()
    try:
        for name in options.device_modules or ():
            importlib.import_module(name)
    except ImportError as error:
        return _fail(f"--device-modules {name}: {error}")
    try:
        world = join_world(options.device)
    except ValueError as error:
        return _fail(error)
    if not world.primary:
        logging.getLogger().setLevel(logging.WARNING)
    try:
        with SignalWatch() as signals:
            result, folder = _run(options, world, signals)
    except Interrupted as interruption:
        return 128 + interruption.number
    except (ValueError, OSError, TrainingStopped) as error:
        return _fail(error)
    except UnreadableImage as error:
        return _fail(str(error).strip().splitlines()[-1].split("UnreadableImage: ")[-1])
    finally:
        world.close()
    if world.primary:
        _report(result, folder)
    return 0


def _run(options: TrainOptions, world: World, signals: SignalWatch) -> tuple[dict[str, Any], Path]:
    """Build everything, and only then touch the run folder: a command that cannot run changes nothing."""
    from tweo_timm.records import write_atomically
    from tweo_timm.run.precision import resolve_precision
    from tweo_timm.train.build import build_session
    from tweo_timm.train.loop import Trainer
    from tweo_timm.train.options import as_namespace
    from tweo_timm.train.signals import Interrupted

    resumed = _find_checkpoint(options, world)
    options = resolve_precision(options, world, resumed[1].get("args") if resumed is not None else None)
    session = build_session(options, world)
    folder = world.gather(_run_folder(options, session.data_config))[0]
    trainer = Trainer(session, signals)
    if resumed is not None:
        trainer.resume(resumed[1], resumed[0])
    session.wrap()
    if world.primary:
        continues = resumed is not None and resumed[0].resolve().parent == folder.resolve()
        if not continues:
            _set_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "args.yaml", dump_options(options))
        trainer.open_folder(folder, as_namespace(options), resumed if continues else None)
    del resumed  # as large as the model and its optimizer
    try:
        return trainer.fit(), folder
    except Interrupted as interruption:
        named = "" if options.experiment else f" --experiment {folder.name}"
        _logger.warning("%s: state saved. The same command with%s --resume auto goes on from here", interruption, named)
        raise


def _find_checkpoint(options: TrainOptions, world: World) -> tuple[Path, dict[str, Any]] | None:
    """Read the checkpoint to continue from; the first process chooses, all read the same."""
    from tweo_timm.train.checkpoint import load_newest, read_checkpoint

    if not options.resume:
        return None
    if options.resume != "auto":
        return Path(options.resume), read_checkpoint(Path(options.resume))
    if not options.experiment:
        raise ValueError("--resume auto continues the run of a name: give --experiment NAME too, or --resume FILE")
    found = load_newest(_output(options) / options.experiment) if world.primary else None
    path = world.gather(found[0] if found is not None else None)[0]
    if path is None:
        return None
    return found if found is not None else (path, read_checkpoint(path))


def _set_aside(folder: Path) -> None:
    """Rename the folder of an earlier run that this one does not continue, so that its checkpoints are not lost."""
    from tweo_timm.train.checkpoint import holds_checkpoints

    if not holds_checkpoints(folder):
        return
    number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.old{n}").exists())
    aside = folder.with_name(f"{folder.name}.old{number}")
    folder.rename(aside)
    _logger.warning("%s held an earlier run, which is now %s; --resume auto would have continued it", folder, aside)


def _run_folder(options: TrainOptions, data_config: dict[str, Any]) -> Path:
    from timm.models import safe_model_name

    if options.experiment:
        name = options.experiment
    else:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = "-".join([stamp, safe_model_name(options.model), str(data_config["input_size"][-1])])
    return _output(options) / name


def _output(options: TrainOptions) -> Path:
    return Path(options.output or DEFAULT_OUTPUT)


def _report(result: dict[str, Any], folder: Path) -> None:
    """Say the best epoch and the folder, and print, as timm does, the ten best epochs with the best at the end."""
    if result["best_metric"] is not None:
        _logger.info("*** Best metric: %s (epoch %s)", result["best_metric"], result["best_epoch"])
    _logger.info("Run folder: %s", folder)
    print(f"--result\n{json.dumps(result['epochs'][:10][::-1], indent=4)}")


def _fail(error: Exception | str) -> int:
    print(f"train.py: error: {error}", file=sys.stderr)
    return 1
