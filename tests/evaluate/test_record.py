"""What report.json holds is declared once: written, read back to the same, and described in docs/report.md."""

import json
import types
import typing
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tweo_timm.evaluate.columns import COLUMNS
from tweo_timm.evaluate.probe import PROBES
from tweo_timm.evaluate.record import Record, Scored, Statistics
from tweo_timm.evaluate.report import Report
from tweo_timm.records import Fields
from tweo_timm.schema import Declared, build, entries, read, written

PAGE = Path(__file__).parents[2] / "docs" / "report.md"
BEGIN, END = "<!-- fields: pytest tests/evaluate/test_record.py --update-golden -->", "<!-- end of fields -->"
SHARED = {Scored: "what a pass found", Statistics: "statistics"}


def parts(annotation):
    """The declared classes in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Declared):
        yield annotation
    elif isinstance(annotation, types.UnionType) or typing.get_origin(annotation):
        for part in typing.get_args(annotation):
            yield from parts(part)


def fields_of(kind):
    """Its own fields, without those of what it shares with another class."""
    shared = {item.name for base in SHARED if base in kind.__mro__[1:] for item in entries(base)}
    return [item for item in entries(kind) if item.name not in shared]


def inside(kind):
    """The classes in a class, itself first, in the order of their mention."""
    hints = typing.get_type_hints(kind)
    found = {kind: None}
    for base in SHARED:
        found |= dict.fromkeys(inside(base)) if base in kind.__mro__[1:] else {}
    for item in fields_of(kind):
        for part in parts(hints[item.name]):
            found |= dict.fromkeys(inside(part))
    return list(found)


def table(kind):
    """A class as Markdown: one row per meaning."""
    hints = typing.get_type_hints(kind)

    def meaning(item):
        more = [f"[{part.__name__}](#{part.__name__.lower()})" for part in parts(hints[item.name])]
        return item.metadata["help"] + (f": {', '.join(more)}" if more else "")

    lines = [f"#### {kind.__name__}", "", kind.__doc__.split("\n")[0]]
    bases = [f"[{words}](#{base.__name__.lower()})" for base, words in SHARED.items() if base in kind.__mro__[1:]]
    lines += [f"It has {' and '.join(bases)} too."] if bases else []
    lines += ["", "| field | meaning |", "|---|---|"]
    for words, items in groupby(fields_of(kind), meaning):
        lines.append(f"| {', '.join(f'`{item.name}`' for item in items)} | {words} |")
    return "\n".join(lines)


def documented():
    """Every class of report.json, those of the probes last."""
    kinds = dict.fromkeys(inside(Report))
    probes = ["| field of a record | with the probe's answer |", "|---|---|"]
    for name, entry in PROBES.items():
        answer = entry.load().ANSWER
        (first,) = parts(answer)
        kinds |= dict.fromkeys(inside(first))
        listed = "a list of " if typing.get_origin(answer) is list else ""
        probes.append(f"| `{name}` | {listed}[{first.__name__}](#{first.__name__.lower()}), or `refused`: why not |")
    return "\n\n".join([*map(table, kinds), "#### Answers", "\n".join(probes)])


def test_the_page_describes_every_field(request):
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page = f"{before}{BEGIN}\n\n{documented()}\n\n{END}{after}"
    if request.config.getoption("--update-golden"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page, "docs/report.md is not what is declared: run with --update-golden, read the diff"


def test_every_column_is_a_field():
    assert {column.key for column in COLUMNS.values()} <= {item.name for item in entries(Record)}


TOPS = [Report, *(next(parts(entry.load().ANSWER)) for entry in PROBES.values())]
KINDS = dict.fromkeys(kind for top in TOPS for kind in inside(top))
FREE = [kind for kind in KINDS if all(part.check is Declared.check for part in inside(kind))]
"""Those of any values that their fields allow one by one."""


def values(kind, item=None):
    """Anything that an annotation allows."""
    if isinstance(kind, types.UnionType):
        return st.none() | values(typing.get_args(kind)[0], item)
    if kind is typing.Any:
        return st.none() | st.integers(0, 9) | st.text(max_size=3)
    if isinstance(kind, type) and issubclass(kind, Declared):
        return mappings(kind)
    if typing.get_origin(kind) is list:
        least = 1 if item and item.metadata["some"] else 0
        return st.lists(values(typing.get_args(kind)[0], item), min_size=least, max_size=2)
    if typing.get_origin(kind) is dict:
        return st.dictionaries(st.text(max_size=3), values(typing.get_args(kind)[1], item), max_size=2)
    bounds = item.metadata["bounds"] if item else None
    low, high = (max(bounds.low, -1e6), min(bounds.high, 1e6)) if bounds else (-1e6, 1e6)
    if kind is float:
        return st.floats(low, high)
    return {int: st.integers(int(low), int(high)), bool: st.booleans(), str: st.text(max_size=5)}[kind]


def mappings(kind):
    hints = typing.get_type_hints(kind)
    return st.fixed_dictionaries({item.name: values(hints[item.name], item) for item in entries(kind)})


@pytest.mark.parametrize("kind", FREE, ids=lambda kind: kind.__name__)
@settings(derandomize=True, deadline=None, max_examples=5)
@given(data=st.data())
def test_what_is_written_is_read_back(kind, data):
    mapping = data.draw(mappings(kind)) | {"of a newer version": 1}
    found = read(kind, Fields(json.loads(json.dumps(mapping)), "file"))
    assert found == build(kind, mapping)
    assert read(kind, Fields(written(found), "file")) == found
