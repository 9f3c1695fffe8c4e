"""Command-line flags declared once, as the fields of a dataclass.

A flag has a name, a type, a default, a help text and a place in a YAML file. Declared in two places these drift apart;
here one dataclass field declares all of them, and this module derives the rest: the argparse parser, the conversion of
YAML values, and the switched-off form of every boolean (``--amp`` / ``--no-amp``; ``--no-aug`` / ``--aug``), so that
what a file switched on the command line can switch off.

Refuses annotations it cannot turn into a flag. Imports neither torch nor timm: ``-h`` must be quick.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from tweo_timm.settings import Decides, Flag, flag_fields
from tweo_timm.suggestion import suggest

# PyYAML follows YAML 1.1, which wants a dot in a float: it reads 5e-4 as a string.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_PLURAL = {bool: "true or false", int: "integers", float: "numbers", str: "strings"}
_SINGULAR = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


@dataclass(frozen=True)
class Option:
    """One flag with its type resolved: ``scalar`` is bool, int, float or str, of which a list holds several.

    ``words`` are accepted beside a number: those of ``float | Literal["auto"]``.
    """

    dest: str
    group: str
    flag: Flag
    scalar: type
    is_list: bool
    is_mapping: bool
    optional: bool
    default: Any
    decides: Decides | None = None
    words: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The option strings, the derived one included."""
        return self.flag.names or (f"--{self.dest.replace('_', '-')}",)

    @property
    def positional(self) -> bool:
        """Whether the flag is an argument without dashes."""
        return not self.names[0].startswith("-")

    @property
    def negative_names(self) -> tuple[str, ...]:
        """The option strings that switch a boolean off; empty for any other type."""
        if self.scalar is not bool:
            return ()
        long = [name[2:] for name in self.names if name.startswith("--")]
        # A flag that already says no, such as --no-aug, is switched off by saying yes: --aug.
        return tuple(f"--{name[3:]}" if name.startswith("no-") else f"--no-{name}" for name in long)

    @property
    def expected(self) -> str:
        """The accepted values, in words."""
        if self.flag.choices is not None:
            words = "one of " + ", ".join(repr(choice) for choice in self.flag.choices)
        elif self.is_mapping:
            words = "a mapping of names to values"
        elif self.is_list:
            count = f"{self.flag.nargs} " if isinstance(self.flag.nargs, int) else ""
            words = f"a list of {count}{_PLURAL[self.scalar]}"
        else:
            words = " or ".join([_SINGULAR[self.scalar], *map(repr, self.words)])
        return words + (" or null" if self.optional else "")


def _resolve(dest: str, group: type, annotation: Any, entry: Flag, default: Any) -> Option:
    arguments = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    optional = type(None) in arguments
    inner = next((kind for kind in arguments if kind is not type(None)), annotation)
    words = tuple(word for kind in arguments if typing.get_origin(kind) is Literal for word in typing.get_args(kind))
    is_list, is_mapping = typing.get_origin(inner) is list, typing.get_origin(inner) is dict
    scalar = typing.get_args(inner)[0] if is_list or is_mapping else inner
    if scalar not in _SINGULAR:
        where = f"{group.__name__}.{dest}"
        raise TypeError(f"{where}: {annotation} is no type of a flag; use bool, int, float, str, list or dict")
    decides = entry.decides or vars(group).get("DECIDES")
    return Option(dest, _title(group), entry, scalar, is_list, is_mapping, optional, default, decides, words)


def option_table(options: type) -> dict[str, Option]:
    """Every flag of an options dataclass by field name, in the order of its groups: its base classes, theirs first."""
    hints = typing.get_type_hints(options)
    declared = {item.name: item for item in flag_fields(options)}
    table = {}
    for group in _groups(options):
        for name in filter(declared.__contains__, inspect.get_annotations(group)):
            item = declared[name]
            default = item.default_factory() if callable(item.default_factory) else item.default
            table[name] = _resolve(name, group, hints[name], item.metadata["flag"], default)
    return table


def _groups(options: type) -> Iterator[type]:
    """The classes that declare fields of an options dataclass: those it inherits from, at any depth, then itself."""
    for base in options.__bases__:
        yield from _groups(base)
    yield options


def _title(group: type) -> str:
    return (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")


# --- The command line ------------------------------------------------------------------------------------------------


class _Switch(argparse.Action):
    """A boolean with both its forms on one line of ``-h``."""

    def __init__(self, option_strings: Sequence[str], dest: str, negative_names: Sequence[str], **kwargs: Any) -> None:
        super().__init__([*option_strings, *negative_names], dest, nargs=0, **kwargs)
        self._negative_names = frozenset(negative_names)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, name: str | None = None
    ) -> None:
        setattr(namespace, self.dest, name not in self._negative_names)


class _KeyValues(argparse.Action):
    """``name=value`` words to a dict; values are Python literals where they are one, strings otherwise, as in timm."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, name: str | None = None
    ) -> None:
        words = [word.partition("=") for word in values if word]
        for key, equals, _ in words:
            if not equals:
                raise argparse.ArgumentError(self, f"{key!r} is not of the form name=value")
        setattr(namespace, self.dest, {key: _literal(value) for key, _, value in words})


def _literal(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
        return freeze(value) if _is_plain(value) else text
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that ast documents
        return text


def _is_plain(value: Any) -> bool:
    """Whether a value is made of what YAML has, and args.yaml can hold."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def freeze(value: Any) -> Any:
    """The value with its lists as tuples: YAML knows only lists, timm's constructors default to tuples."""
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    if isinstance(value, dict):
        return {key: freeze(item) for key, item in value.items()}
    return value


class _Parser(argparse.ArgumentParser):
    """Errors in one line and with the nearest flag; the usage of two hundred flags would hide the message."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} -h lists every flag)\n")


def _number_or_word(option: Option) -> Any:
    def convert(text: str) -> Any:
        if option.optional and text.lower() == "none":
            return None
        return text if text in option.words else option.scalar(text)

    convert.__name__ = " or ".join([option.scalar.__name__, *option.words])
    return convert


def _add(group: Any, option: Option) -> None:
    entry = option.flag
    shown = (
        "" if option.default in (None, "", [], {}) or option.scalar is bool else f" (default: {_words(option.default)})"
    )
    arguments: dict[str, Any] = {"help": (entry.help + shown).replace("%", "%%"), "default": argparse.SUPPRESS}
    if not option.positional:
        arguments["dest"] = option.dest
    if option.scalar is bool:
        group.add_argument(*option.names, action=_Switch, negative_names=option.negative_names, **arguments)
    elif option.is_mapping:
        group.add_argument(*option.names, action=_KeyValues, nargs="*", metavar="NAME=VALUE", **arguments)
    else:
        scalar = option.scalar if option.scalar is str else _number_or_word(option)
        nargs = entry.nargs or ("+" if option.is_list else None)
        value = "|".join([{int: "N", float: "F", str: "TEXT"}[option.scalar], *option.words])
        metavar = entry.metavar or (None if entry.choices else value)
        extra = {"const": entry.const} if entry.const is not None else {}
        group.add_argument(
            *option.names, type=scalar, nargs=nargs, metavar=metavar, choices=entry.choices, **extra, **arguments
        )


def _words(default: Any) -> str:
    return " ".join(str(item) for item in default) if isinstance(default, list) else str(default)


class CommandLine:
    """The argparse parser of an options dataclass; parsing yields only the flags that were given."""

    def __init__(self, options: type, prog: str, description: str) -> None:
        self.parser = _Parser(
            prog=prog,
            description=description,
            formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=36, width=112),
        )
        self.parser.usage = f"{prog} [-c FILE] [--flag VALUE ...]"
        table = option_table(options)
        groups = {
            title: self.parser.add_argument_group(title) for title in dict.fromkeys(o.group for o in table.values())
        }
        for option in table.values():
            _add(groups[option.group], option)
        self._known = [name for option in table.values() for name in (*option.names, *option.negative_names)]

    def parse(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """The flags given in ``argv`` (None: the process's own) by field name; exits with status 2 on a bad one."""
        given, unknown = self.parser.parse_known_args(argv)
        if unknown:
            word = next((item for item in unknown if item.startswith("-")), unknown[0])
            self.parser.error(f"unknown argument {word!r}{suggest(word.split('=')[0], self._known)}")
        return vars(given)


def as_namespace(options: Any) -> argparse.Namespace:
    """The settings as an argparse namespace under timm's names, for timm functions that read one.

    Args:
        options: ``TrainOptions`` or ``ValidateOptions``.

    Returns:
        A namespace of plain values, independent of ``options``: timm writes into what it is given
        (``init_distributed_device`` sets device, rank and world_size).
    """
    names = [item.name for item in flag_fields(options)]
    return argparse.Namespace(**{name: copy.deepcopy(getattr(options, name)) for name in names})


# --- YAML values -----------------------------------------------------------------------------------------------------


def convert(option: Option, value: Any) -> Any:
    """A value read from YAML as the type of its flag.

    Numbers written as strings count as numbers (YAML 1.1 reads ``5e-4`` as a string), whole floats as integers, and
    ``off``/``on``, which YAML 1.1 reads as booleans, as the choice of that name. Nothing else is bent.

    Raises:
        ValueError: the value is of another type or not among the choices; the message says what is accepted.
    """
    if value is None:
        return _convert_null(option)
    if option.is_mapping:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"expected {option.expected}")
        return {key: freeze(_exponents(item)) for key, item in value.items()}
    if option.is_list:
        if not isinstance(value, list | tuple):
            raise ValueError(f"expected {option.expected}; write [{value}]")
        if isinstance(option.flag.nargs, int) and len(value) != option.flag.nargs:
            raise ValueError(f"expected {option.expected}, got {len(value)}")
        return [_convert_scalar(option, item) for item in value]
    return _convert_scalar(option, value)


def _convert_null(option: Option) -> Any:
    if option.optional:
        return None
    # In a file timm wrote, null and the empty value say the same thing: unset.
    if option.is_mapping or option.is_list:
        return type(option.default)()
    if option.scalar is str and "" in (option.default, *(option.flag.choices or ())):
        return ""
    raise ValueError(f"expected {option.expected}; leave the key out for the default, {option.default!r}")


def _convert_scalar(option: Option, value: Any) -> Any:
    choices = option.flag.choices
    if value in option.words:
        return value
    if choices is not None and isinstance(value, bool):
        value = next((word for word in (("off", "none"), ("on",))[value] if word in choices), value)
    converted = _as_type(option.scalar, value)
    if converted is None:
        hint = f"; quote it: '{value}'" if option.scalar is str and type(value) in (int, float) else ""
        raise ValueError(f"expected {option.expected}{hint}")
    if choices is not None and converted not in choices:
        near = suggest(converted, choices) if isinstance(converted, str) else ""
        raise ValueError(f"expected {option.expected}{near}")
    return converted


def _as_type(scalar: type, value: Any) -> Any:
    """The value as int, float, str or bool, or None if it is not one."""
    if scalar in (bool, str):
        return value if type(value) is scalar else None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if scalar is int and isinstance(value, int):
        return value
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if scalar is int:
        return int(number) if number.is_integer() else None
    return None if math.isnan(number) else number


def _exponents(value: Any) -> Any:
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    if isinstance(value, list):
        return [_exponents(item) for item in value]
    if isinstance(value, dict):
        return {key: _exponents(item) for key, item in value.items()}
    return value
