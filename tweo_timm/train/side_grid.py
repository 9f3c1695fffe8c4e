"""Many side networks from one frozen forward pass: --side-grid lr=1e-3,3e-3 rank=8,16.

The backbone's features are computed once, into --side-cache; without one, into a folder of the experiment, which is
gone when all are trained, and stays for --resume auto when they are not. Each combination is then a run of its own with
a folder of its own, EXPERIMENT/lr=0.001,rank=8 say: the very run that its settings alone would give, which continues
like any other. What a combination that breaks has learned is lost, not the others. An experiment has one grid at a
time.

Refused: names that are no settings, and settings by which the backbone's features would differ.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tweo_timm.outputs import Outputs
from tweo_timm.run.checkpoint_file import read
from tweo_timm.run.failure import Failure
from tweo_timm.run.flags import Option, convert, option_table
from tweo_timm.run.world import World
from tweo_timm.side.miet import MESSAGE_BITS, message_bytes
from tweo_timm.suggestion import suggest
from tweo_timm.train.checkpoint import LAST
from tweo_timm.train.folder import locked, output
from tweo_timm.train.journal import as_csv
from tweo_timm.train.options import TrainOptions
from tweo_timm.train.side import KEY

_logger = logging.getLogger(__name__)

TABLE = "grid.csv"
FEATURES = "grid.features"
"""Folder of the features of a grid without --side-cache."""
# By these the features would differ, or a run would write elsewhere.
_FIXED = {
    *("side", "side_gap", "side_precision", "side_calibration_images", "side_augmentations", "side_cache", "side_grid"),
    *("experiment", "output", "resume", "model", "data_dir", "seed"),
}


@dataclass(frozen=True)
class Point:
    """One combination: its name, which is that of its folder, and its settings."""

    name: str
    options: TrainOptions


def points(options: TrainOptions) -> list[Point]:
    """Return all combinations of --side-grid, the last name varying fastest.

    Raises:
        ValueError: a name or a value is not accepted; the message says what is.
    """
    axes = [_axis(word) for word in options.side_grid]
    names = [name for name, _ in axes]
    if len(set(names)) < len(names):
        raise ValueError(
            f"--side-grid {' '.join(options.side_grid)} names a setting twice: give all its values at once"
        )
    found = []
    for values in itertools.product(*(values for _, values in axes)):
        chosen = dict(zip(names, values, strict=True))
        name = ",".join(f"{dest.removeprefix('side_')}={value}" for dest, value in chosen.items())
        experiment = f"{options.experiment}/{name}"
        try:
            found.append(Point(name, replace(options, side_grid=[], experiment=experiment, **chosen)))
        except ValueError as error:
            raise ValueError(f"--side-grid at {name}: {error}") from error
    return found


def _axis(word: str) -> tuple[str, list[Any]]:
    """A word of the grid as a setting and its values."""
    name, equals, values = word.partition("=")
    table = option_table(TrainOptions)
    dest = name.replace("-", "_")
    dest = f"side_{dest}" if f"side_{dest}" in table else dest
    known = {key.removeprefix("side_"): option for key, option in table.items() if _may_vary(key, option)}
    if not equals or not values or dest.removeprefix("side_") not in known:
        near = suggest(name, known)
        raise ValueError(
            f"--side-grid {word}: give NAME=VALUE,VALUE with a setting that leaves the backbone's features as they "
            f"are, such as rank=8,16 or lr=1e-3,3e-3{near}"
        )
    try:
        return dest, [convert(table[dest], _number(value)) for value in values.split(",")]
    except ValueError as error:
        raise ValueError(f"--side-grid {word}: {error}") from error


def _may_vary(dest: str, option: Option) -> bool:
    plain = option.scalar in (int, float, str) and not option.is_list and not option.is_mapping
    return plain and option.flag.recorded and dest not in _FIXED


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def run_grid(
    options: TrainOptions, run: Callable[[TrainOptions], tuple[dict[str, Any], Path]], world: World
) -> tuple[str, bool]:
    """Train every combination, one after the other.

    Args:
        options: with `side_grid`.
        run: trains one to its end; what it found, and its folder.
        world: the processes, of which the first writes the table.

    Returns:
        The table as text, and whether all were trained to their end.

    Raises:
        ValueError: a combination is refused, or another grid has the experiment.
    """
    folder = output(options) / options.experiment
    own = "" if options.side_cache else str(folder / FEATURES)
    found = points(replace(options, side_cache=own or options.side_cache))
    with contextlib.ExitStack() as held:
        world.refuse(_take, folder, held)
        rows = [_trained(point, run, world) for point in found]
        if world.primary:
            Outputs(folder).write(TABLE, as_csv(rows, _columns(rows)))
            if own:
                shutil.rmtree(own, ignore_errors=True)  # NFS keeps files that a finished run has mapped
    return "\n".join(_table(rows)), not any("stopped" in row for row in rows)


def _take(folder: Path, held: contextlib.ExitStack) -> None:
    """Have the experiment's folder to oneself; it does not stay if nothing is written into it."""
    Outputs(folder).check("--output")
    folder.mkdir(parents=True, exist_ok=True)
    held.callback(_remove_if_empty, folder)
    held.enter_context(locked(folder))


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _trained(point: Point, run: Callable[[TrainOptions], tuple[dict[str, Any], Path]], world: World) -> dict[str, Any]:
    """Train a combination: its row of the table."""
    _logger.info("Grid: %s", point.name)
    try:
        result, folder = run(point.options)
    except Failure as failure:
        _logger.warning("Grid: %s was stopped: %s", point.name, failure)
        return {"setting": point.name, "stopped": str(failure)}
    return _row(point, result, folder) if world.primary else {}


def _row(point: Point, result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A finished run in numbers; for MIET with the bytes of an image's message to the edge."""
    file = read(folder / LAST, "metadata")
    entry = file.fields.fields(KEY)
    row = {
        "setting": point.name,
        point.options.eval_metric: result["best_metric"],
        "epoch": result["best_epoch"],
        "trained_parameters": sum(tensor.numel() for tensor in file.weights.values()),
    }
    if entry.text("side") == "miet":
        _, tokens, dim = entry.items("features")
        row |= {f"bytes_{bits}bit": message_bytes(tokens, dim, bits) for bits in MESSAGE_BITS}
    return row


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    names = _columns(rows)
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for row in rows:
        cells = (row.get(name, "-") for name in names)
        yield "| " + " | ".join(f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
