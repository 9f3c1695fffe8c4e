"""What a file holds, declared once as dataclasses: built, written as JSON, read back by name and type, documented.

A field's annotation is its type in the file: str, int, float, bool, Any, another `Declared`, and lists, mappings and
``| None`` of them. What was read is the word of a stranger: it is refused in one line that names the field, its value
and what is accepted. Entries that no field names are kept, so that a file of a newer version loses nothing.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar

from tweo_timm.records import Fields
from tweo_timm.settings import ANY, Bounds

REAL = Bounds(-1e39, 1e39)
"""A little more than float32 holds: what is drawn and divided stays finite."""
NAME = Bounds(0, 1000)
"""Characters of a text, unless its field says otherwise."""
LONG = Bounds(0, 2**38)
"""Characters of what no table shows: as many as a file can hold."""
SIZE = Bounds(0, 1e39)
PERCENT = Bounds(0, 100)


@dataclass(kw_only=True)
class Declared:
    """A mapping in a file.

    Attributes:
        rest: its entries that no field names.
    """

    rest: dict[str, Any] = field(default_factory=dict)

    def check(self, source: Fields) -> None:
        """Refuse what was read where its fields do not fit each other; by `source`, the mapping that they are from."""


Kind = TypeVar("Kind", bound=Declared)


def entry(help: str, bounds: Bounds | None = None, *, default: Any = MISSING, **how: bool) -> Any:
    """Declare one field.

    Args:
        help: what it holds, in Markdown.
        bounds: of a number, of each number in a list, or of the length of a text.
        default: of a field that a file may lack.
        how: optional=True leaves it out of a file while it is its default; some=True wants one element of a list.
    """
    metadata = {"help": help, "bounds": bounds, "optional": False, "some": False, **how}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def entries(kind: type[Declared]) -> Iterator[Field[Any]]:
    """Return the fields of a class that a file may hold."""
    return (item for item in fields(kind) if "help" in item.metadata)


def build(kind: Any, value: Any) -> Any:
    """Make what an annotation says of our own mappings and lists, which are not checked.

    Args:
        kind: the annotation, a subclass of `Declared` say.
        value: what a file would hold in its place.
    """
    inner = _not_none(kind)
    if value is None or inner is Any:
        return value
    if isinstance(inner, type) and issubclass(inner, Declared):
        hints = typing.get_type_hints(inner)
        known = {item.name: build(hints[item.name], value[item.name]) for item in entries(inner) if item.name in value}
        return inner(**known, rest={name: item for name, item in value.items() if name not in known})
    if typing.get_origin(inner) is list:
        return [build(typing.get_args(inner)[0], item) for item in value]
    if typing.get_origin(inner) is dict:
        return {name: build(typing.get_args(inner)[1], item) for name, item in value.items()}
    return value


def written(value: Any, leave_out: Collection[str] = ()) -> Any:
    """Return what a file holds of a value: mappings in place of what is declared, without the fields named."""
    if isinstance(value, Declared):
        values = {item.name: getattr(value, item.name) for item in entries(type(value)) if item.name not in leave_out}
        optional = {item.name: item.default for item in entries(type(value)) if item.metadata["optional"]}
        kept = {name: item for name, item in values.items() if name not in optional or item != optional[name]}
        return written(kept | value.rest, leave_out)
    if isinstance(value, Mapping):
        return {name: written(item, leave_out) for name, item in value.items()}
    return [written(item, leave_out) for item in value] if isinstance(value, list) else value


def read(kind: type[Kind], source: Fields) -> Kind:
    """Take a class's fields out of a mapping that was read from a file.

    Raises:
        ValueError: one is missing, of another type or out of bounds; the message names it.
    """
    hints = typing.get_type_hints(kind)
    names = {item.name: item for item in entries(kind) if item.name in source.mapping or _required(item)}
    values = {name: read_value(hints[name], source, name, **_limits(item)) for name, item in names.items()}
    found = kind(**values, rest={name: value for name, value in source.mapping.items() if name not in values})
    found.check(source)
    return found


def read_value(kind: Any, source: Fields, name: str, bounds: Bounds | None = None, some: bool = False) -> Any:
    """Take one entry out of a mapping by an annotation.

    Args:
        kind: the annotation.
        source: the mapping.
        name: of the entry.
        bounds: of its numbers, or of the length of a text.
        some: whether a list must have an element.

    Raises:
        ValueError: naming the entry.
    """
    inner = _not_none(kind)
    if inner is not kind and name in source.mapping and not source.has(name):
        return None
    if inner is Any:
        return source.mapping.get(name)
    if isinstance(inner, type) and issubclass(inner, Declared):
        return read(inner, source.fields(name))
    if typing.get_origin(inner) is list:
        inside = source.inside(name)
        if some and not inside.mapping:
            source.refuse(name, [], "a list with one entry or more")
        return [read_value(typing.get_args(inner)[0], inside, key, bounds) for key in inside.mapping]
    if typing.get_origin(inner) is dict:
        inside = source.fields(name)
        return {key: read_value(typing.get_args(inner)[1], inside, key, bounds) for key in inside.mapping}
    return _SIMPLE[inner](source, name, bounds)


def _text(source: Fields, name: str, bounds: Bounds | None) -> str:
    text, bounds = source.text(name), bounds or NAME
    return text if len(text) in bounds else source.refuse(name, text, f"at most {bounds.high:g} characters")


_SIMPLE: dict[Any, typing.Callable[[Fields, str, Bounds | None], Any]] = {
    str: _text,
    int: lambda source, name, bounds: source.integer(name, bounds or ANY),
    float: lambda source, name, bounds: source.number(name, bounds or REAL),
    bool: lambda source, name, bounds: source.flag(name),
}


def _required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _limits(item: Field[Any]) -> dict[str, Any]:
    return {name: item.metadata[name] for name in ("bounds", "some")}


def _not_none(kind: Any) -> Any:
    """An annotation without ``| None``; itself if it has none."""
    if isinstance(kind, types.UnionType):
        (inner,) = (part for part in typing.get_args(kind) if part is not type(None))
        return inner
    return kind
