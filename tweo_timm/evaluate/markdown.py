"""Tables and numbers as the report writes them in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tweo_timm.media import markdown


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """Return rows, all with the same keys, as a table under their keys."""
    titles = list(rows[0])
    lines = ["| " + " | ".join(map(markdown, titles)) + " |", "|---" * len(titles) + "|"]
    lines += ["| " + " | ".join(map(markdown, row.values())) + " |" for row in rows]
    return "\n".join(lines)


def number(value: Any) -> str:
    """Return a value for people: four digits of a float, '-' for none."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def sentence(text: str) -> str:
    """Return a stranger's remark, such as an older version's, as a sentence of Markdown; nothing stays nothing."""
    shown = markdown(text.strip())
    return shown and shown[0].upper() + shown[1:] + ("" if shown.endswith(".") else ".")


def fields_table(rows: Sequence[object], keys: Sequence[str]) -> str:
    """Return some fields of records as a table."""
    return markdown_table([{key: number(getattr(row, key)) for key in keys} for row in rows])
