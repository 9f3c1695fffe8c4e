"""The flags of timm's scripts as data: every name, default, type and choice, to compare a parser with."""

import ast
import csv
from pathlib import Path

from tweo_timm.run.flags import CommandLine, Option

FOLDER = Path(__file__).parent / "golden"
SCALARS = {"flag": bool, "mapping": str, "int": int, "float": float, "str": str}
# timm's --input-size takes three integers and its --checkpoint one file, here several.
LISTS = ("--input-size", "--checkpoint")


def reference_flags(script: str) -> list[dict[str, str]]:
    """The rows of timm's train or validate: flag, default, type, choices."""
    with (FOLDER / f"timm_{script}_flags.csv").open() as file:
        return list(csv.DictReader(file))


def dest_of(names: str) -> str:
    long = next((name for name in names.split("/") if name.startswith("--")), names)
    return long.lstrip("-").replace("-", "_")


def assert_flag_is_timms(row: dict[str, str], table: dict[str, Option], line: CommandLine) -> None:
    """The flag exists under each of its names, with the reference's default, type and choices."""
    dest = dest_of(row["flag"])
    option = table[dest]
    names = row["flag"].split("/")
    assert set(names) <= set(option.names)
    assert option.default == (ast.literal_eval(row["default"]) if row["flag"] != "--checkpoint" else [])
    assert option.scalar is SCALARS[row["type"].removeprefix("list[").rstrip("]")]
    assert option.is_mapping == (row["type"] == "mapping")
    assert option.is_list == (row["type"].startswith("list") or row["flag"] in LISTS)
    if row["choices"]:
        assert option.flag.choices == tuple(row["choices"].split())
    for name in names:
        assert dest in line.parse(_command(option, name))


def _command(option: Option, name: str) -> list[str]:
    words = [] if option.positional else [name]
    if option.scalar is bool:
        return words
    if option.is_mapping:
        return [*words, "key=1"]
    samples = {int: "7", float: "0.25", str: "word"}
    value = str(option.flag.choices[0]) if option.flag.choices else samples[option.scalar]
    return words + [value] * (option.flag.nargs if isinstance(option.flag.nargs, int) else 1)
