"""A command: what every one of them does around its own work, and how each kind of end becomes an exit status.

    0        done
    1        an error of the user's making (a setting, a file, an image, a disk), as one line on stderr
    2        a word that the command line does not know, or a recipe that cannot be read
    130      Ctrl-C, where the command does not answer it itself
    128 + N  signal N, after which a command has saved its state

Anything else is a fault of ours and ends in a traceback. The work of a command is imported once its settings are known:
`-h` and a misspelt flag do not wait for torch. A reader of the output that goes away (`| head -1`) ends the printing,
not the command. Imports neither torch, timm nor NumPy.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tweo_timm.media import one_line
from tweo_timm.run.failure import Failure
from tweo_timm.run.log import set_up_logging
from tweo_timm.run.recipe import RecipeError, dump_options
from tweo_timm.run.shipped import describe_recipes


@dataclass(frozen=True)
class Command:
    """A command of this package.

    Attributes:
        prog: its name in messages, that of its script in the repository.
        script: the name under which it is installed.
        parse: reads words into options; called with the words and the name.
        entry: what does the work, as 'module:function'; called with the options and the `Call`.
        remark: what --print-config says below the settings, as lines of YAML comments; called with the options.
    """

    prog: str
    script: str
    parse: Callable[[Sequence[str], str], Any]
    entry: str
    remark: Callable[[Any], str] = lambda options: ""


@dataclass(frozen=True)
class Call:
    """How a command was called: its name and the words after it."""

    prog: str
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.prog} {shlex.join(self.words)}"

    def fail(self, error: Exception | str) -> int:
        """Say in one line on stderr what is wrong; the exit status for it."""
        with contextlib.suppress(OSError):  # nobody is left to read it
            print(f"{self.prog}: error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, RecipeError) else 1


def run(command: Command, argv: Sequence[str] | None = None) -> int:
    """Run a command to its end.

    Args:
        command: which.
        argv: the words after the program's name; None takes the process's own.

    Returns:
        The exit status; see the module.

    Raises:
        SystemExit: for -h, and a word that argparse does not accept.
    """
    installed = argv is None and Path(sys.argv[0]).stem == command.script
    call = Call(command.script if installed else command.prog, tuple(sys.argv[1:] if argv is None else argv))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the locale cannot write
    set_up_logging()
    try:
        options = _parsed(command, call)
        shown = describe_recipes() if getattr(options, "list_recipes", False) else ""
        shown = dump_options(options) + command.remark(options) if options.print_config else shown
        if shown:
            with printing():
                print(shown, end="")
            return 0
        for module in getattr(options, "device_modules", None) or ():
            _import_device_module(module)
        work = _found(command.entry)
        return int(work(options, call))
    except (ValueError, OSError, Failure) as error:
        return call.fail(error)
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Print to standard output; what a reader who has gone away does not read is dropped without a word.

    Raises:
        OSError: the output cannot be written for any other reason.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        # What is left is flushed again when Python ends, which would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise OSError(error.errno, error.strerror, "standard output") from error


def _parsed(command: Command, call: Call) -> Any:
    try:
        return command.parse(call.words, call.prog)
    except SystemExit:
        with printing():  # what -h has printed
            pass
        raise
    except BrokenPipeError as error:  # argparse lets it through before Python 3.11
        with printing():
            raise
        raise SystemExit(0) from error


def _import_device_module(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"--device-modules {name}: {error}") from error


def _found(entry: str) -> Callable[[Any, Call], int]:
    module, _, function = entry.partition(":")
    work: Callable[[Any, Call], int] = getattr(importlib.import_module(module), function)
    return work
