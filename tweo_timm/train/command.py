"""A training from its settings to a finished run folder."""

from __future__ import annotations

import itertools
import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

from timm.models import safe_model_name

from tweo_timm.outputs import Outputs
from tweo_timm.run.command import Call, printing
from tweo_timm.run.precision import resolve_precision
from tweo_timm.run.recipe import dump_options
from tweo_timm.run.world import World, joined
from tweo_timm.train.build import build_session
from tweo_timm.train.checkpoint import holds_checkpoints, load_newest, read_checkpoint
from tweo_timm.train.loop import Trainer
from tweo_timm.train.options import TrainOptions, as_namespace
from tweo_timm.train.signals import Interrupted, SignalWatch

_logger = logging.getLogger(__name__)

DEFAULT_OUTPUT = "./output/train"


def train(options: TrainOptions, call: Call) -> int:
    """Run a training to its end.

    Args:
        options: the settings.
        call: how the command was called.

    Returns:
        The exit status: 0 when the run is complete, 128 + N after signal N.

    Raises:
        ValueError: a setting, a file or the data is wrong.
        OSError: a file cannot be read or written.
        Failure: the training broke, or an image cannot be read.
    """
    try:
        with joined(options.device) as world, SignalWatch() as signals:
            result, folder = _run(options, world, signals)
    except Interrupted as interruption:
        return 128 + interruption.number
    if world.primary:
        _report(result, folder)
    return 0


def _run(options: TrainOptions, world: World, signals: SignalWatch) -> tuple[dict[str, Any], Path]:
    """Build everything, and only then touch the run folder: a command that cannot run changes nothing."""
    world.refuse(Outputs(_output(options) / options.experiment).check, "--output")
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
        Outputs(folder).write("args.yaml", dump_options(options))
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
    if not holds_checkpoints(folder):
        return
    number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.old{n}").exists())
    aside = folder.with_name(f"{folder.name}.old{number}")
    folder.rename(aside)
    _logger.warning("%s held an earlier run, which is now %s; --resume auto would have continued it", folder, aside)


def _run_folder(options: TrainOptions, data_config: dict[str, Any]) -> Path:
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
    with printing():
        print(f"--result\n{json.dumps(result['epochs'][:10][::-1], indent=4)}")
