"""train.py and tweo-train: from the command line to a finished run folder."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tweo_timm.train.options import TrainOptions, parse_train_options
from tweo_timm.train.recipe import dump_options

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
        options = parse_train_options(argv)
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
    from timm.utils import setup_default_logging

    from tweo_timm.train.data import UnreadableImage
    from tweo_timm.train.watch import Interrupted, SignalWatch, TrainingStopped
    from tweo_timm.train.world import join_world

    setup_default_logging()
    for name in options.device_modules or ():
        importlib.import_module(name)
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
        _logger.warning("%s: state saved. The same command with --resume auto goes on from here", interruption)
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


def _run(options: TrainOptions, world: Any, signals: Any) -> tuple[dict[str, Any], Path]:
    from tweo_timm.train.build import build_session
    from tweo_timm.train.checkpoint import load_newest, read_checkpoint
    from tweo_timm.train.loop import Trainer
    from tweo_timm.train.options import as_namespace

    session = build_session(options, world)
    folder = _run_folder(options, session.data_config)
    if world.primary:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.yaml").write_text(dump_options(options))
    trainer = Trainer(session, folder if world.primary else None, as_namespace(options), signals)
    if options.resume == "auto":
        found = load_newest(folder)
        if found is not None:
            trainer.resume(found[1], found[0], with_optimizer=not options.no_resume_opt)
    elif options.resume:
        path = Path(options.resume)
        trainer.resume(read_checkpoint(path), path, with_optimizer=not options.no_resume_opt)
    session.wrap()
    return trainer.fit(), folder


def _run_folder(options: TrainOptions, data_config: dict[str, Any]) -> Path:
    from timm.models import safe_model_name

    if options.experiment:
        name = options.experiment
    else:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = "-".join([stamp, safe_model_name(options.model), str(data_config["input_size"][-1])])
    return Path(options.output or DEFAULT_OUTPUT) / name


def _report(result: dict[str, Any], folder: Path) -> None:
    if result["best_metric"] is not None:
        _logger.info("*** Best metric: %s (epoch %s)", result["best_metric"], result["best_epoch"])
    _logger.info("Run folder: %s", folder)
    print(f"--result\n{json.dumps(result, indent=4)}")


def _fail(error: Exception | str) -> int:
    print(f"train.py: error: {error}", file=sys.stderr)
    return 1
