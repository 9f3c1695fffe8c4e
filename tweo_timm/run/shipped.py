"""The recipes that ship with the package, found by name: ``-c deit_small_tweo``.

They lie in recipes/ of a clone. tweo_timm/recipes is a link to that folder, which a wheel holds as files.
"""

from __future__ import annotations

from pathlib import Path

from tweo_timm.suggestion import suggest

FOLDER = Path(__file__).resolve().parents[1] / "recipes"


def recipe_names() -> list[str]:
    """The names of the shipped recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_recipe(config: str) -> str:
    """The file that --config names: a path if there is one, else the shipped recipe of this name.

    Args:
        config: what --config was given.

    Returns:
        A path. One that does not exist is returned as it is, with the error left to who reads it, unless it looks like
        a name.

    Raises:
        ValueError: for a name that no shipped recipe has.
    """
    if Path(config).exists() or Path(config).suffix or len(Path(config).parts) > 1:
        return config
    names = recipe_names()
    if config not in names:
        raise ValueError(
            f"--config {config}: there is no such file, and no shipped recipe of that name{suggest(config, names)} "
            "(tweo-train --list-recipes names them)"
        )
    return str(FOLDER / f"{config}.yaml")


def describe_recipes() -> str:
    """One line per shipped recipe: its name, and the first sentence of its header."""
    width = max(map(len, recipe_names()))
    return "".join(f"{name:{width}}  {_headline(FOLDER / f'{name}.yaml')}\n" for name in recipe_names())


def _headline(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()
