"""A training from its settings to a finished run folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tweo_timm.outputs import Outputs
from tweo_timm.run.command import Call, printing
from tweo_timm.run.precision import resolve_precision
from tweo_timm.run.recipe import dump_options
from tweo_timm.run.world import World, joined
from tweo_timm.train.build import build_session
from tweo_timm.train.folder import find_checkpoint, lies_in, output, run_folder, taken
from tweo_timm.train.loop import Trainer
from tweo_timm.train.options import TrainOptions, as_namespace
from tweo_timm.train.side_grid import run_grid
from tweo_timm.train.signals import Interrupted, SignalWatch
from tweo_timm.train.sweep import sweep_attempt

_logger = logging.getLogger(__name__)


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
        with sweep_attempt(options), joined(options.device) as world, SignalWatch() as signals:
            if options.side_grid:
                return _grid(options, world, signals)
            result, folder = train_once(options, world, signals)
    except Interrupted as interruption:
        return 128 + interruption.number
    if world.primary:
        _report(result, folder)
    return 0


def _grid(options: TrainOptions, world: World, signals: SignalWatch) -> int:
    """Train every combination of --side-grid, and print their table."""
    table, complete = run_grid(options, lambda point: train_once(point, world, signals), world)
    if world.primary:
        with printing():
            print(table)
    return 0 if complete else 1


def train_once(options: TrainOptions, world: World, signals: SignalWatch) -> tuple[dict[str, Any], Path]:
    """Build everything, and only then touch the run folder: a command that cannot run changes nothing."""
    world.refuse(Outputs(output(options) / options.experiment).check, "--output")
    resumed = find_checkpoint(options, world)
    options = resolve_precision(options, world, resumed.args if resumed is not None else None)
    session = build_session(options, world)
    folder = world.gather(run_folder(options, session.data_config))[0]
    trainer = Trainer(session, signals)
    if resumed is not None:
        trainer.resume(resumed)
    session.wrap()
    with taken(folder, resumed, world) as mine:
        if mine is not None:
            Outputs(folder).write("args.yaml", dump_options(options))
            continued = resumed if resumed is not None and lies_in(resumed, folder) else None
            trainer.open_folder(mine, as_namespace(options), continued)
        resumed = continued = None  # as large as the model and its optimizer
        try:
            return trainer.fit(), folder
        except Interrupted as interruption:
            named = "" if options.experiment else f" --experiment {folder.name}"
            _logger.warning(
                "%s: state saved. The same command with%s --resume auto goes on from here", interruption, named
            )
            raise


def _report(result: dict[str, Any], folder: Path) -> None:
    """Say the best epoch and the folder, and print, as timm does, the ten best epochs with the best at the end."""
    if result["best_metric"] is not None:
        _logger.info("*** Best metric: %s (epoch %s)", result["best_metric"], result["best_epoch"])
    _logger.info("Run folder: %s", folder)
    with printing():
        print(f"--result\n{json.dumps(result['epochs'][:10][::-1], indent=4)}")
