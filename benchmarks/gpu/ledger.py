"""What has been measured so far: one JSON line per result, written as soon as it is known.

A run on a borrowed GPU may end at any moment, and what was measured must not end with it. The newest line of a name
counts; what is done is not measured again, what failed or was not run is. Refuses a folder with the results of another
machine or of other versions: they would stand in one table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tweo_timm.outputs import Outputs
from tweo_timm.records import append_rows, read_rows

DONE, FAILED, NOT_RUN = "done", "failed", "not run"
Row = dict[str, Any]


class NotRunError(Exception):
    """What was asked for is impossible here, and the message says why; nothing is broken."""


class MeasurementError(Exception):
    """A measurement failed in another process; the message holds what that one said."""


class Ledger:
    """The rows of one report.

    Args:
        path: the JSON-lines file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """Return the newest row of each name, in the order in which the names first appeared."""
        return list({(row["part"], row["name"]): row for row in read_rows(self.path)}.values())

    def find(self, part: str, name: str) -> Row | None:
        """Return the newest row of a name, or None."""
        return next((row for row in self.rows() if (row["part"], row["name"]) == (part, name)), None)

    def is_done(self, part: str, name: str) -> bool:
        """Return whether the newest row of a name is a result."""
        row = self.find(part, name)
        return row is not None and row["status"] == DONE

    def keep(self, part: str, name: str, status: str, values: Mapping[str, Any]) -> Row:
        """Append one row."""
        row = {"part": part, "name": name, "status": status, **values}
        append_rows(self.path, [row])
        return row

    def claim(self, environment: Mapping[str, Any]) -> None:
        """Say on which machine and with which versions the following rows are made.

        Raises:
            ValueError: the file holds rows of another machine, or made with other versions.
        """
        self._mend()
        before = self.find("environment", "environment")
        fixed = {key: value for key, value in environment.items() if key != "revision"}
        changed = [key for key, value in fixed.items() if before is not None and before.get(key) != value]
        if before is not None and changed:
            was, now = ({key: source.get(key) for key in changed} for source in (before, fixed))
            raise ValueError(
                f"--output {self.path.parent}: holds results made with {was}, here it is {now}; name another folder, "
                "or delete it"
            )
        self.keep("environment", "environment", DONE, fixed)

    def _mend(self) -> None:
        """Take out what a killed process left of its last line: the next row would be written behind it."""
        if self.path.exists() and not self.path.read_text().endswith("\n"):
            whole = "".join(f"{json.dumps(row)}\n" for row in read_rows(self.path))
            Outputs(self.path.parent).write(self.path.name, whole)


@dataclass
class Part:
    """One part of the report: it measures what has no result yet, until its time is used up.

    Attributes:
        letter: its name in the ledger.
        ledger: where results go.
        limit_s: seconds after which nothing new is begun.
        revision: of the code that measures.
        began: when the part began, by the monotonic clock.
    """

    letter: str
    ledger: Ledger
    limit_s: float
    revision: str
    began: float = field(default_factory=time.monotonic)

    def left_s(self) -> float:
        """Return the seconds that are left."""
        return self.limit_s - (time.monotonic() - self.began)

    def attempt(self, name: str, measure: Callable[[], Mapping[str, Any]], **about: Any) -> Row:
        """Measure one thing, unless there is a result, and keep what comes of it.

        Args:
            name: of the thing.
            measure: returns its values; may raise.
            about: what describes the thing; kept beside result, failure and reason.

        Returns:
            The row.
        """
        return self.attempt_all([name], lambda _: {name: measure()}, {name: about})[0]

    def attempt_all(
        self,
        names: Sequence[str],
        measure: Callable[[list[str]], Mapping[str, Mapping[str, Any]]],
        about: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> list[Row]:
        """Measure several things at once, those that have no result, and keep what comes of each.

        Args:
            names: of the things.
            measure: takes the names without a result; returns the values of each, as far as it has them.
            about: by name, what describes the thing.

        Returns:
            The row of each, in the order of `names`.
        """
        missing = [name for name in names if not self.ledger.is_done(self.letter, name)]
        if missing:
            found, status, reason = self._try(measure, missing)
            for name in missing:
                values = {"revision": self.revision, **(about or {}).get(name, {})}
                if name in found:
                    self._keep(name, DONE, {**values, **found[name]})
                else:
                    self._keep(name, status, {**values, "reason": reason})
        rows = [self.ledger.find(self.letter, name) for name in names]
        return [row for row in rows if row is not None]

    def _try(
        self, measure: Callable[[list[str]], Mapping[str, Mapping[str, Any]]], names: list[str]
    ) -> tuple[Mapping[str, Mapping[str, Any]], str, str]:
        """Return what was measured and, for what was not, the status and the reason."""
        if self.left_s() <= 0:
            return {}, NOT_RUN, f"no time left: a call gives part {self.letter} {self.limit_s:.0f} s; call again"
        try:
            return measure(names), FAILED, "nothing was reported of it"
        except NotRunError as error:
            return {}, NOT_RUN, first_line(error)
        except MeasurementError as error:
            return {}, FAILED, first_line(error)
        except Exception as error:  # whatever it is, the other results are worth having
            return {}, FAILED, f"{type(error).__name__}: {first_line(error)}"

    def _keep(self, name: str, status: str, values: Mapping[str, Any]) -> None:
        self.ledger.keep(self.letter, name, status, values)
        print(f"({self.letter}) {name}: {status}" + (f", {values['reason']}" if status != DONE else ""), flush=True)


def first_line(error: object) -> str:
    """Return the first line of an error's text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "(no message)"
