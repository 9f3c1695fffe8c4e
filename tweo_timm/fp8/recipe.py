"""The one description of an FP8 run, read by every backend.

Names and defaults are those of NVIDIA Transformer Engine's ``DelayedScaling``, so that a recipe means the same thing
whichever backend runs it; the history of 16 is TWEO's (arXiv:2511.23225). Transformer Engine ignores a misspelt
option. This class refuses it and names the nearest valid one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

FORMATS = ("hybrid", "e4m3")
AMAX_ALGORITHMS = ("max", "most_recent")
BACKENDS = ("auto", "te", "native", "emulated")
SCALINGS = ("delayed", "current", "unit")
_MAX_MARGIN = 64


@dataclass(frozen=True)
class Fp8Recipe:
    """How the linear layers of a model compute in FP8.

    Attributes:
        format: ``'hybrid'`` keeps activations and weights in E4M3 and gradients in E5M2; ``'e4m3'`` keeps all three
            in E4M3.
        amax_history_len: how many past maxima a delayed scale looks back on.
        amax_compute_algo: ``'max'`` takes the largest maximum of the history, ``'most_recent'`` the newest.
        margin: powers of two left free below the largest FP8 value.
        backend: ``'te'``, ``'native'``, ``'emulated'``, or ``'auto'`` for the first of them that can run.
        scaling: ``'delayed'`` scales by past maxima, ``'current'`` by the tensor's own maximum, ``'unit'`` not at all.
        include: regular expressions searched in layer names; only matching layers are converted. Empty means every
            layer.
        exclude: regular expressions searched in layer names; matching layers are left alone.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value outside the accepted set; the message names the nearest accepted value.
    """

    format: str = "hybrid"
    amax_history_len: int = 16
    amax_compute_algo: str = "max"
    margin: int = 0
    backend: str = "auto"
    scaling: str = "delayed"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check_choice("format", self.format, FORMATS)
        _check_choice("amax_compute_algo", self.amax_compute_algo, AMAX_ALGORITHMS)
        _check_choice("backend", self.backend, BACKENDS)
        _check_choice("scaling", self.scaling, SCALINGS)
        _check_integer("amax_history_len", self.amax_history_len, low=1, high=1 << 20)
        _check_integer("margin", self.margin, low=-_MAX_MARGIN, high=_MAX_MARGIN)
        for field in ("include", "exclude"):
            object.__setattr__(self, field, _checked_patterns(field, getattr(self, field)))

    def selects(self, name: str) -> str | None:
        """Return why the layer ``name`` is left out, or None if the recipe selects it."""
        if self.include and not any(re.search(pattern, name) for pattern in self.include):
            return f"matches no pattern of include={list(self.include)}"
        for pattern in self.exclude:
            if re.search(pattern, name):
                return f"matches exclude pattern {pattern!r}"
        return None


def _check_choice(field: str, value: object, accepted: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"Fp8Recipe.{field} must be a string, one of {accepted}; got {value!r}")
    if value not in accepted:
        nearest = difflib.get_close_matches(value.lower(), accepted, n=1, cutoff=0.0)[0]
        raise ValueError(f"Fp8Recipe.{field}={value!r} is not one of {accepted}; the nearest is {nearest!r}")


def _check_integer(field: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Fp8Recipe.{field} must be an int from {low} to {high}; got {value!r}")
    if not low <= value <= high:
        raise ValueError(
            f"Fp8Recipe.{field}={value} is outside {low}..{high}; the nearest is {min(max(value, low), high)}"
        )


def _checked_patterns(field: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Sequence) or not all(isinstance(pattern, str) for pattern in value):
        raise TypeError(f"Fp8Recipe.{field} must be a sequence of regular expressions; got {value!r}")
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"Fp8Recipe.{field}: {pattern!r} is not a regular expression ({error})") from error
    return tuple(value)
