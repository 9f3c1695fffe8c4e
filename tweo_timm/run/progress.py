"""Progress on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tweo_timm.media import terminal


class ProgressLine:
    """A bar on a terminal, nothing elsewhere: a log file gets plain lines from the logger instead.

    Args:
        label: what is going on.
        total: number of steps.
        shown: whether this process may draw.
    """

    def __init__(self, label: str, total: int, shown: bool = True) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not (shown and console.is_terminal)
        )
        self._task: TaskID = self._progress.add_task(terminal(label), total=total)

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self) -> None:
        """Count one step."""
        if not self._progress.disable:
            self._progress.update(self._task, advance=1)
