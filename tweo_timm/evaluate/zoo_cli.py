"""tweo-survey, or python -m tweo_timm.survey: surveys of several machines and people, merged into one table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tweo_timm.run import options as shared
from tweo_timm.run.command import Command, run
from tweo_timm.run.recipe import read_settings
from tweo_timm.run.rules import out_of_bounds
from tweo_timm.settings import flag

_DESCRIPTION = (
    "Merge the surveys in report.json files (validate.py --survey --report DIR) into a zoo: zoo.json, and README.md "
    "with its table. What the zoo.json of that folder holds is kept; the same weights on the same images are one row."
)


@dataclass(frozen=True)
class ZooOptions(shared.FileOptions):
    """The settings of one merge.

    Raises:
        ValueError: there is nothing to merge.
    """

    merge: list[str] = flag([], "report.json files with surveys.", metavar="FILE")
    output: str = flag("docs/zoo", "Folder of the zoo.", metavar="DIR")

    def __post_init__(self) -> None:
        for complaint in _complaints(self):
            raise ValueError(complaint)


def parse_zoo_options(argv: Sequence[str] | None = None, prog: str = "tweo-survey") -> ZooOptions:
    """Read the command line into settings.

    Raises:
        SystemExit: for ``-h`` (status 0), or a word argparse does not accept (status 2), with a message.
        ValueError: the settings are wrong.
    """
    return read_settings(ZooOptions, prog, _DESCRIPTION, argv)


def _complaints(options: ZooOptions) -> Iterator[str]:
    yield from out_of_bounds(options)
    if not options.merge:
        yield "--merge is missing: pass report.json files with surveys (validate.py --survey --report DIR makes them)"


SURVEY = Command("tweo-survey", "tweo-survey", parse_zoo_options, "tweo_timm.evaluate.zoo:merge")


def main(argv: Sequence[str] | None = None) -> int:
    """Merge as the command line says.

    Args:
        argv: the words after the program's name; None takes the process's own.

    Returns:
        The exit status: 0 if the zoo was written.
    """
    return run(SURVEY, argv)
