"""The one description of an FP8 run, read by every backend.

Names and defaults are those of NVIDIA Transformer Engine's ``DelayedScaling``, so that a recipe means the same thing
whichever backend runs it; the history of 16 is TWEO's (arXiv:2511.23225). Transformer Engine ignores a misspelt
option. This class refuses it and names the nearest valid one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tweo_timm.settings import AT_LEAST_0, Bounds, Decides, SettingError, check_settings, flag, setting
from tweo_timm.tables import Entry, Names

FORMATS = ("hybrid", "e4m3")
AMAX_ALGORITHMS = ("max", "most_recent")
BACKENDS = {
    "te": Entry("tweo_timm.fp8.te_convert:TransformerEngine"),
    "native": Entry("tweo_timm.fp8.pytorch:Native"),
    "emulated": Entry("tweo_timm.fp8.pytorch:Emulated"),
}
"""The `Backend` classes by name, in order of preference: "auto" takes the first that can run."""
SCALINGS = ("delayed", "current", "unit")


@dataclass(frozen=True)
class Fp8Recipe:
    """How the linear layers of a model compute in FP8.

    Attributes:
        format: ``'hybrid'`` keeps activations and weights in E4M3 and gradients in E5M2; ``'e4m3'`` keeps all three
            in E4M3.
        amax_history_len: how many past maxima a delayed scale looks back on.
        amax_compute_algo: ``'max'`` takes the largest maximum of the history, ``'most_recent'`` the newest.
        margin: powers of two left free below the largest FP8 value.
        backend: a name of `BACKENDS`, or ``'auto'`` for the first of them that can run.
        scaling: ``'delayed'`` scales by past maxima, ``'current'`` by the tensor's own maximum, ``'unit'`` not at all.
        include: regular expressions searched in layer names; only matching layers are converted. Empty means every
            layer.
        exclude: regular expressions searched in layer names; matching layers are left alone.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value outside the accepted set; the message names the nearest accepted value.
    """

    format: str = setting("hybrid", choices=FORMATS)
    amax_history_len: int = setting(16, Bounds(1, 1 << 20))
    amax_compute_algo: str = setting("max", choices=AMAX_ALGORITHMS)
    margin: int = setting(0, Bounds(-64, 64))
    backend: str = setting("auto", choices=Names(BACKENDS, "auto"))
    scaling: str = setting("delayed", choices=SCALINGS)
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_settings(self)
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


def _checked_patterns(field: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Sequence) or not all(isinstance(pattern, str) for pattern in value):
        raise TypeError(f"Fp8Recipe.{field} must be a sequence of regular expressions; got {value!r}")
    for pattern in value:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise SettingError("Fp8Recipe", field, pattern, f"a regular expression ({error})") from error
    return tuple(value)


@dataclass(frozen=True)
class Fp8Options:
    """FP8 training."""

    DECIDES = Decides.TRAINING

    fp8: str = flag(
        "off",
        "What computes in FP8; auto: te, else native, else emulated, and it says which.",
        choices=Names(BACKENDS, "off", "auto"),
    )
    fp8_format: str = flag(Fp8Recipe.format, "E4M3 with E5M2 gradients, or E4M3 throughout.", choices=FORMATS)
    fp8_amax_history: int = flag(Fp8Recipe.amax_history_len, "Steps that delayed scaling looks back.")
    fp8_scaling: str = flag(Fp8Recipe.scaling, "Where scales come from.", choices=SCALINGS)
    fp8_exclude: list[str] = flag([], "Layers left out, as patterns of their names.", metavar="REGEX")
    fp8_health_interval: int = flag(
        0, "Updates between reports on saturation and underflow; 0: none.", bounds=AT_LEAST_0, decides=Decides.RECORDS
    )

    def fp8_recipe(self) -> Fp8Recipe:
        """The recipe that the flags describe; where FP8 is off, that of ``--fp8 auto``.

        Raises:
            ValueError: for a value that is not accepted; the message names the flag.
        """
        try:
            return Fp8Recipe(
                format=self.fp8_format,
                amax_history_len=self.fp8_amax_history,
                backend="auto" if self.fp8 == "off" else self.fp8,
                scaling=self.fp8_scaling,
                exclude=tuple(self.fp8_exclude),
            )
        except SettingError as error:
            names = {"backend": "--fp8", "amax_history_len": "--fp8-amax-history"}
            raise ValueError(error.spelled(names.get(error.name, f"--fp8-{error.name}"))) from error
