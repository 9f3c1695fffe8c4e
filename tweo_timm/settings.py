"""A setting: its default, what it is for, and what it accepts, declared once as a field of a dataclass.

Two kinds of dataclass are made of such fields. The settings of a component, `TweoConfig` say, are declared by
`setting` and checked by `check_settings`. The options of a command are declared by `flag`; tweo_timm.run.flags derives
the command line and the reading of YAML from them. A component declares its options beside its settings, and spells
what its settings refuse in the words of a flag or of an environment variable: see `SettingError`.

Imports neither torch nor argparse: ``-h`` must be quick.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from enum import Enum
from typing import Any

from tweo_timm.suggestion import suggest


@dataclass(frozen=True)
class Bounds:
    """The numbers that a setting accepts.

    Attributes:
        low: the least.
        high: the largest.
        open: which of the two is itself not accepted: '', 'low', 'high' or 'both'.
    """

    low: float = -math.inf
    high: float = math.inf
    open: str = ""

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.open in ("low", "both") else self.low <= value
        return above and (value < self.high if self.open in ("high", "both") else value <= self.high)

    def __str__(self) -> str:
        low, high = _plain(self.low), _plain(self.high)
        above = f"above {low}" if self.open in ("low", "both") else f"at least {low}"
        below = f"below {high}" if self.open in ("high", "both") else f"at most {high}"
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"{above} and {below}" if self.open else f"between {low} and {high}"
        return above if math.isfinite(self.low) else below if math.isfinite(self.high) else "finite"


def _plain(number: float) -> str:
    """A number as people write it: all digits of an integer."""
    return f"{number:d}" if isinstance(number, int) else f"{number:g}"


ANY = Bounds()
AT_LEAST_0 = Bounds(0)
AT_LEAST_1 = Bounds(1)
ABOVE_0 = Bounds(0, open="low")
FRACTION = Bounds(0, 1)


class SettingError(ValueError):
    """A setting with a value that is not accepted.

    Attributes:
        name: of the setting, as its dataclass has it.
        value: what it was given.
        accepted: what it accepts, as the end of a sentence.
    """

    def __init__(self, owner: str, name: str, value: object, accepted: str) -> None:
        super().__init__(_refusal(f"{owner}.{name}", value, accepted))
        self.name, self.value, self.accepted = name, value, accepted

    def spelled(self, name: str) -> str:
        """The message under another name: that of a flag, or of an environment variable."""
        return _refusal(name, self.value, self.accepted)


def _refusal(name: str, value: object, accepted: str) -> str:
    return f"{name} is {value!r}; it must be {accepted}"


def setting(default: Any, bounds: Bounds = ANY, choices: Collection[str] = (), hint: str = "") -> Any:
    """Declare one setting of a component as a dataclass field.

    Args:
        default: its default.
        bounds: the numbers it accepts.
        choices: the words it accepts, if it is a word.
        hint: what else helps who gave a value that is not accepted.
    """
    return field(default=default, metadata={"bounds": bounds, "choices": choices, "hint": hint and f" ({hint})"})


def check_settings(config: Any) -> None:
    """Check every field that `setting` declared.

    Raises:
        SettingError: a value is not accepted.
        TypeError: a value is of another type than the default; an integer is a number too.
    """
    owner = type(config).__name__
    for item in fields(config):
        if "bounds" not in item.metadata:
            continue
        value, choices = getattr(config, item.name), item.metadata["choices"]
        _check_type(owner, item.name, value, item.default)
        if choices and value not in choices:
            words = f"one of {', '.join(map(repr, choices))}{suggest(value.lower(), choices)}"
            raise SettingError(owner, item.name, value, words)
        if not choices and not (math.isfinite(value) and value in item.metadata["bounds"]):
            finite = "finite, and " if not math.isfinite(value) else ""
            raise SettingError(owner, item.name, value, f"{finite}{item.metadata['bounds']}{item.metadata['hint']}")


def _check_type(owner: str, name: str, value: object, default: object) -> None:
    wanted = {str: str, int: int, float: (int, float)}[type(default)]
    if isinstance(value, bool) or not isinstance(value, wanted):  # type: ignore[arg-type]
        words = {str: "a string", int: "an integer", float: "a number"}[type(default)]
        raise TypeError(f"{owner}.{name} is {words}, not {value!r}")


class Decides(Enum):
    """What a flag decides, and so who has to know it later.

    validate.py takes MODEL, INPUT and LABELS from the training of a checkpoint: its weights mean nothing without them.
    A resumed run says where anything but RECORDS and PROCESS has changed.
    """

    MODEL = "which function the weights are part of"
    INPUT = "how an image becomes the model's input"
    LABELS = "which class an index is"
    DATA = "which images there are, in which order and how many at a time"
    TRAINING = "how the weights move, to the last bit: device and precision are part of it"
    RECORDS = "what is measured, written and kept, and where"
    PROCESS = "what one command reads first and goes on with"


@dataclass(frozen=True)
class Flag:
    """What a field's annotation and default do not say about its flag.

    Attributes:
        help: one sentence for ``-h``.
        names: option strings; empty means ``--`` plus the field's name with dashes. Without dashes it is positional.
        bounds: the numbers it accepts, each element of a list; None where the component's own settings check it.
        nargs: how many values a list takes ('+' unless said), or '?' for a string with a ``const``.
        choices: the accepted values, or None for any of the type.
        metavar: what stands for the value in ``-h``.
        const: the value of a '?' flag that is given bare.
        recorded: whether args.yaml holds it; False for what belongs to one invocation, not to the run.
        decides: what it decides, if not what `DECIDES` of its group says.
    """

    help: str
    names: tuple[str, ...] = ()
    bounds: Bounds | None = None
    nargs: str | int | None = None
    choices: Collection[Any] | None = None
    metavar: str | None = None
    const: Any = None
    recorded: bool = True
    decides: Decides | None = None


def flag(default: Any, help: str, *names: str, recorded: bool = True, **details: Any) -> Any:
    """Declare one flag as a dataclass field; see :class:`Flag` for the arguments."""
    metadata: Mapping[str, Any] = {"flag": Flag(help, names, recorded=recorded, **details)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata=metadata, compare=recorded)
    return field(default=default, metadata=metadata, compare=recorded)


def flag_fields(options: Any) -> Iterator[Field[Any]]:
    """The fields of an options dataclass, or of one of its objects, that are flags."""
    return (item for item in fields(options) if "flag" in item.metadata)
