"""Recipes: the settings of a run as YAML, read strictly and written completely.

A typo in a recipe costs a cluster's night, so an unknown key or a value of another type is an error that names the
file, the key and what was probably meant. Any args.yaml that timm wrote, now or in past years, is a recipe too. Beyond
timm: ``extends: other.yaml`` (a path relative to the file) and the blocks ``tweo: {weight: 0.01}`` and
``fp8: {backend: auto}``, which stand for ``tweo_weight`` and so on.

Refuses what tweo_timm.run.strict_yaml does, a file that extends itself or more than `_MAX_EXTENDS` others, and a
setting given twice.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tweo_timm.run import strict_yaml
from tweo_timm.run.flags import CommandLine, Option, convert, option_table
from tweo_timm.run.legacy import Modernized, modernize
from tweo_timm.run.shipped import find_recipe
from tweo_timm.settings import Decides
from tweo_timm.suggestion import suggest, suggest_path

_logger = logging.getLogger(__name__)

# Block name -> how its keys continue the flags' names. `fp8: {backend: auto}` is the flag --fp8 itself.
_BLOCKS: dict[str, dict[str, str]] = {"tweo": {}, "fp8": {"backend": "fp8"}}
# The flag without which everything else in a block would do nothing.
_SWITCHES = {"tweo": ("tweo_weight", "weight: 0.01"), "fp8": ("fp8", "backend: auto")}
_MAX_EXTENDS = 16


Kind = TypeVar("Kind")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names file, key and remedy."""


@dataclass
class Recipe:
    """A recipe with everything it extends: converted values by field name, and the blocks it was written in."""

    path: str
    values: dict[str, Any] = field(default_factory=dict)
    blocks: set[str] = field(default_factory=set)


def resolve(options: type, given: dict[str, Any]) -> tuple[dict[str, Any], Recipe]:
    """Put what the command line gave over the recipe that it names.

    Args:
        options: The options dataclass.
        given: Values from the command line by field name; ``config`` and ``config_unknown`` say which recipe.

    Returns:
        The values set by either, the command line's winning, and the recipe (empty without ``config``).

    Raises:
        RecipeError: the recipe cannot be used.
    """
    try:
        path = find_recipe(given["config"]) if given.get("config") else ""
    except ValueError as error:
        raise RecipeError(str(error)) from error
    recipe = load_recipe(path, options, given.get("config_unknown", "error")) if path else Recipe("")
    given = _one_folder(given, "the command line")
    return {**recipe.values, **given}, recipe


def read_settings(options: type[Kind], prog: str, description: str, argv: Sequence[str] | None) -> Kind:
    """Read a command line, and the YAML file it names, into settings.

    Args:
        options: The options dataclass.
        prog: The program's name in messages.
        description: What ``-h`` says of it.
        argv: The words after the program's name; None: those of this process.

    Raises:
        SystemExit: for ``-h`` (status 0), or a word argparse does not accept (status 2), with a message.
        ValueError: the YAML file or the combination of settings is wrong; the message names flag, value and remedy.
    """
    given = CommandLine(options, prog, description).parse(argv)
    values, recipe = resolve(options, given)
    with naming(recipe, given):
        return options(**values)


def _one_folder(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values with `data`, the old positional form, as `data_dir`. In timm the positional form wins, in silence."""
    data, folder = values.get("data"), values.get("data_dir")
    if data and folder and data != folder:
        raise ValueError(f"{where} names two folders, {data} and --data-dir {folder}: give one, as --data-dir")
    others = {name: value for name, value in values.items() if name != "data"}
    return {**others, "data_dir": data} if data else others


def require_switches(recipe: Recipe, values: dict[str, Any]) -> None:
    """Refuse a block whose settings would do nothing because nothing switches it on.

    Raises:
        RecipeError: neither recipe nor command line says whether what the block describes is on.
    """
    for block in sorted(recipe.blocks):
        dest, remedy = _SWITCHES[block]
        if dest not in values:
            raise RecipeError(f"{recipe.path}: the block {block!r} leaves {block.upper()} off; add '{remedy}' to it")


@contextlib.contextmanager
def naming(recipe: Recipe, given: dict[str, Any]) -> Iterator[None]:
    """Name the file in a complaint about a setting that stands in it and not on the command line.

    Args:
        recipe: what the file said.
        given: values from the command line by field name.
    """
    try:
        yield
    except ValueError as error:
        said = sorted(key for key in recipe.values if key not in given and _speaks_of(str(error), key))
        if not said:
            raise
        raise ValueError(f"{error} ({', '.join(said)}: {recipe.path})") from error


def _speaks_of(message: str, dest: str) -> bool:
    return re.search(rf"--{re.escape(dest.replace('_', '-'))}(?![\w-])", message) is not None


def load_recipe(path: str | Path, options: type, unknown: str = "error") -> Recipe:
    """Read a recipe and what it extends.

    Args:
        path: The YAML file.
        options: The options dataclass whose fields are the accepted keys.
        unknown: 'error', or 'warn' to leave unknown keys out with one warning.

    Raises:
        RecipeError: unreadable file, unknown key, value of another type, duplicate key, or a circle of ``extends``.
    """
    return _load(Path(path), options, unknown, ())


def _load(path: Path, options: type, unknown: str, children: tuple[Path, ...]) -> Recipe:
    if path.resolve() in children:
        circle = " -> ".join(item.name for item in (*children, path))
        raise RecipeError(f"{path}: 'extends' goes in a circle: {circle}")
    if len(children) > _MAX_EXTENDS:
        raise RecipeError(f"{path}: more than {_MAX_EXTENDS} files extend one another")
    raw = _read(path)
    parent = raw.pop("extends", None)
    base = Recipe(str(path))
    if parent is not None:
        if not isinstance(parent, str):
            raise RecipeError(f"{path}: extends = {parent!r}: expected the path of one YAML file, relative to this one")
        base = _load(path.parent / parent, options, unknown, (*children, path.resolve()))
    table = {dest: option for dest, option in option_table(options).items() if option.flag.recorded}
    flat, blocks = _flatten(path, raw, table)
    modern = modernize(flat, table)
    own = _convert_known(path, modern.values, table, unknown)
    _report(path, modern, own, table)
    return Recipe(str(path), {**base.values, **own}, base.blocks | blocks)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = strict_yaml.read_text(path)
    except FileNotFoundError as error:
        raise RecipeError(f"cannot read the recipe {str(path)!r}: it does not exist{suggest_path(path)}") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read the recipe {str(path)!r}: {error}") from error
    try:
        raw = strict_yaml.load(text)
    except ValueError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict | None):
        raise RecipeError(
            f"{path} holds {type(raw).__name__}; a recipe is a mapping of settings, such as 'epochs: 300'"
        )
    return raw or {}


def _flatten(path: Path, raw: dict[str, Any], table: dict[str, Option]) -> tuple[dict[str, Any], set[str]]:
    """The settings with the blocks' keys spelled out, and the blocks' names."""
    blocks = {name for name in _BLOCKS if name in raw and (isinstance(raw[name], dict) or name not in table)}
    flat = {key: value for key, value in raw.items() if key not in blocks}
    for block in sorted(blocks):
        if not isinstance(raw[block], dict):
            raise RecipeError(f"{path}: {block} = {raw[block]!r}: expected a block such as {{{_SWITCHES[block][1]}}}")
        for key, value in raw[block].items():
            dest = _BLOCKS[block].get(key, f"{block}_{key}")
            if dest not in table:
                known = [
                    *_BLOCKS[block],
                    *(name.removeprefix(f"{block}_") for name in table if name.startswith(f"{block}_")),
                ]
                raise RecipeError(f"{path}: unknown key {key!r} in the block {block!r}{suggest(str(key), known)}")
            if dest in flat:
                raise RecipeError(f"{path}: {dest} is given twice, by itself and as {key!r} of {block!r}; remove one")
            flat[dest] = value
    return flat, blocks


def _convert_known(path: Path, values: dict[str, Any], table: dict[str, Option], unknown: str) -> dict[str, Any]:
    strangers = [key for key in values if key not in table]
    if strangers and unknown == "error":
        near = suggest(str(strangers[0]).replace("-", "_"), table)
        raise RecipeError(
            f"{path}: unknown key {strangers[0]!r}{near or ' (no known key is near)'}"
            " Remove it, or pass --config-unknown warn to leave unknown keys out"
        )
    if strangers:
        _logger.warning("%s: unknown keys left out: %s", path, ", ".join(map(str, strangers)))
    own = {}
    for key in table.keys() & values.keys():
        try:
            own[key] = convert(table[key], values[key])
        except ValueError as error:
            raise RecipeError(f"{path}: {key} = {values[key]!r}: {error}") from None
    return _one_folder(own, str(path))


def _report(path: Path, modern: Modernized, own: dict[str, Any], table: dict[str, Option]) -> None:
    parts = []
    if modern.renamed:
        parts.append(f"old names: {', '.join(modern.renamed)}")
    if modern.ignored:
        parts.append(f"ignored (retired, or of the process that wrote the file): {', '.join(modern.ignored)}")
    if parts:
        _logger.info("%s: %s", path, "; ".join(parts))
    going_on = [name for name, option in table.items() if option.decides is Decides.PROCESS]
    continued = [f"{name}={own[name]}" for name in going_on if own.get(name) not in (None, "", False, "auto")]
    if continued:
        _logger.warning("%s continues an earlier run: %s, unless the command line says otherwise", path, continued)


def dump_options(options: Any) -> str:
    """The settings as args.yaml: every recorded field under timm's name, sorted as timm sorts them.

    Args:
        options: ``TrainOptions`` or ``ValidateOptions``.

    Returns:
        YAML that both timm and ``load_recipe`` read; the latter gives back equal settings.
    """
    table = option_table(type(options))
    values = {name: getattr(options, name) for name, option in table.items() if option.flag.recorded}
    return yaml.safe_dump(_plain(values), default_flow_style=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
