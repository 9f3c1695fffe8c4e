"""What a probe is: one further question about a checkpoint, its answer in the record, and its words in the report.

A probe is one class without arguments, and a line in `PROBES`; neither measuring nor reporting knows one by name. A
question that a model does not allow is answered by the reason, a `Refused`: what else was measured is not lost over
it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

from tweo_timm.evaluate.case import Case
from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.evaluate.record import Record, Refused
from tweo_timm.media import markdown, one_line
from tweo_timm.records import plain
from tweo_timm.schema import build
from tweo_timm.tables import Entry

_logger = logging.getLogger(__name__)

PROBES = {
    "survey": Entry("tweo_timm.evaluate.survey:Surveyed"),
    "stethoscope": Entry("tweo_timm.evaluate.probes:Stethoscope"),
    "colinearity": Entry("tweo_timm.evaluate.probes:Colinearity"),
    "fp8_readiness": Entry("tweo_timm.evaluate.probes:Readiness"),
    "side": Entry("tweo_timm.evaluate.side_cost:SideCost"),
    "zero_outliers": Entry("tweo_timm.evaluate.probes:ZeroOutliers"),
    "sites": Entry("tweo_timm.evaluate.probes:Sites"),
}
"""The `Probe` classes by name, which is the field of report.json for what they find, in the order of the report."""


class Probe(Protocol):
    """One question about a checkpoint; an object of it is asked about one case.

    Attributes:
        ANSWER: the type of what it finds, as an annotation of tweo_timm.schema: what report.json holds is built, read
            back and documented by it.
    """

    ANSWER: ClassVar[Any]

    def wanted(self, options: ValidateOptions) -> bool:
        """Whether the options ask it."""

    def watching(self, case: Case) -> contextlib.AbstractContextManager[Any]:
        """A context that is open while the split is scored, for what has to see every image.

        Raises:
            ValueError: the model does not allow the question; the message says why.
        """

    def measure(self, case: Case) -> Any:
        """Return what was found, as the mappings and lists that `ANSWER` declares; once, after the split was scored.

        Raises:
            ValueError: the model does not allow the question; the message says why.
        """

    def describe(self, found: Any) -> list[str]:
        """Return paragraphs of Markdown about an `ANSWER`."""


class Asked:
    """The probes that one case's options ask for: entered while its split is scored, then measured.

    Args:
        case: the case.
    """

    def __init__(self, case: Case) -> None:
        probes: dict[str, Probe] = {name: entry.load()() for name, entry in PROBES.items()}
        self._case = case
        self._probes = {name: probe for name, probe in probes.items() if probe.wanted(case.options)}
        self._refused: dict[str, Refused] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Let the probes see the passes inside the context."""
        with contextlib.ExitStack() as stack:
            for name, probe in self._probes.items():
                try:
                    stack.enter_context(probe.watching(self._case))
                except ValueError as error:
                    self._refuse(name, error)
            yield

    def measure(self) -> dict[str, Any]:
        """Return the answers by the name of the probe, or why there is none."""
        return {name: self._measured(name, probe) for name, probe in self._probes.items()}

    def _measured(self, name: str, probe: Probe) -> Any:
        if name not in self._refused:
            try:
                return build(probe.ANSWER, plain(probe.measure(self._case)))
            except ValueError as error:
                self._refuse(name, error)
        return self._refused[name]

    def _refuse(self, name: str, error: ValueError) -> None:
        _logger.warning("%s: no %s: %s", self._case.subject.name, name, one_line(error))
        self._refused[name] = Refused(refused=str(error))


def described(record: Record) -> list[str]:
    """Return what all probes found about a checkpoint as paragraphs of Markdown."""
    parts = []
    for name, entry in PROBES.items():
        found = record.answers.get(name)
        if isinstance(found, Refused):
            parts.append(f"No {name.replace('_', ' ')}: {markdown(one_line(found.refused))}")
        elif found:
            probe: Probe = entry.load()()
            parts += probe.describe(found)
    return parts


def tables(record: Record) -> list[tuple[str, list[dict[str, str]]]]:
    """Return what probes have to say in the terminal about a checkpoint: a sentence and a table each."""
    found = []
    for name, entry in PROBES.items():
        shown = getattr(entry.load(), "table", None)
        if shown is not None and record.answers.get(name) and not isinstance(record.answers[name], Refused):
            found.append(shown(record.answers[name]))
    return found
