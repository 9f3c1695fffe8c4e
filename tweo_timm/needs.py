"""What needs a newer torch than the package does: one table, which refusals and skipped tests read.

Found by running the tests with torch 2.8 to 2.14 (`make test-oldest` runs them with the oldest of every requirement).
Refused by name is what would be wrong, or end in an error that says nothing; what is only slower is not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Need(NamedTuple):
    """One capability.

    Attributes:
        what: as it is asked for.
        torch: the first version that has it.
        why: what an older one does.
    """

    what: str
    torch: str
    why: str


NEEDS = {
    "sharding": Need("--fsdp", "2.9.1", "2.8 trains on gradients twice too large, without a word"),
    "compiled fp8": Need("compilation of FP8 layers", "2.11", "the backward pass of 2.10 fails in its scales"),
    "whole fp8 graph": Need("FP8 layers in one compiled graph", "2.13", "2.11 and 2.12 break it, to the same results"),
}


def lacking(name: str) -> str:
    """Say what a capability needs that is not here, with the remedy; "" if all is."""
    need = NEEDS[name]
    if torch.__version__ >= need.torch:  # a TorchVersion, which compares numbers
        return ""
    here = f"this is {torch.__version__} ({need.why})"
    return f"{need.what} needs torch {need.torch} or newer, {here}: pip install -U torch"


def require(name: str) -> None:
    """Check that this torch has a capability.

    Raises:
        ValueError: with what is needed, why, and the remedy.
    """
    problem = lacking(name)
    if problem:
        raise ValueError(problem)
