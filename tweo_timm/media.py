"""Names and messages of strangers, made harmless for the medium that shows them.

A model's name, a folder, a field of a report or of a checkpoint may hold what a terminal, a Markdown viewer, a sheet or
a browser would act upon. Each medium has its one function here, and whatever writes for the medium calls it. Plain
names come out as they went in.
"""

from __future__ import annotations

import html as _html
import re

# What Markdown would read as more than text. An underscore inside a word is none of it.
_MARKDOWN = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
# What a sheet takes for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@")


def terminal(text: object) -> str:
    """One line for a terminal or a log: what does not print (control codes, line ends) as escapes."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in str(text))


def one_line(text: object) -> str:
    """The lines of a message as one, for a terminal."""
    return terminal(" ".join(line.strip() for line in str(text).splitlines() if line.strip()))


def html(text: object) -> str:
    """Text between the tags of HTML."""
    return _html.escape(terminal(text))


def markdown(text: object) -> str:
    """Text in a paragraph or a table's cell of Markdown."""
    return _MARKDOWN.sub(r"\\\g<0>", _html.escape(terminal(text), quote=False))


def code(text: object) -> str:
    """A code span of Markdown outside of tables."""
    shown = terminal(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    padding = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{padding}{shown}{padding}{fence}"


def cell(value: object) -> object:
    """A value in a CSV file: text that a sheet would calculate begins with an apostrophe; numbers stay numbers."""
    if not isinstance(value, str):
        return value
    shown = terminal(value)
    return f"'{shown}" if shown.startswith(_FORMULA) else shown


def picture(text: object) -> str:
    """A label in a picture of matplotlib, which reads formulas between dollars and leaves out labels like '_x'."""
    shown = terminal(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
