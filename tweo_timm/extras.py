"""The optional packages, and how they are installed: said in one way, that of the README."""

from __future__ import annotations

EXTRAS = ("export", "te", "quickstart", "lightning", "transformers")


def installation(extra: str) -> str:
    """The command that installs an extra, for a message. The package is on no index: it is run in a clone of it."""
    assert extra in EXTRAS, extra
    return f"pip install '.[{extra}]' in the clone"
