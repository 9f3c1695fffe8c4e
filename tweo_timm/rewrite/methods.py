"""How the matrix of a rotation is found: a line per method. Imports no torch, so that ``-h`` can name them."""

from __future__ import annotations

from dataclasses import dataclass

from tweo_timm.tables import Entry, Names


@dataclass(frozen=True)
class Method:
    """A way to find an orthogonal matrix that fixes ones.

    Attributes:
        draw: draws one, from a width and a generator.
        learns: whether that is the beginning of a descent, which needs images.
    """

    draw: Entry
    learns: bool = False


METHODS = {
    "random": Method(Entry("tweo_timm.rewrite.orthogonal:random_orthogonal")),
    "learned": Method(Entry("tweo_timm.rewrite.orthogonal:random_orthogonal"), learns=True),
    "hadamard": Method(Entry("tweo_timm.rewrite.orthogonal:hadamard_orthogonal")),
}
METHOD_NAMES = Names(METHODS)
