"""What is logged looks as in timm's scripts, and a name in it cannot act upon the terminal."""

import contextlib
import io
import logging

import pytest
from timm.utils import setup_default_logging

from tweo_timm.run.log import set_up_logging


@contextlib.contextmanager
def logging_as_it_starts():
    """The root logger of a program that has not set logging up."""
    root = logging.getLogger()
    before = root.handlers, root.level
    root.handlers = []
    root.setLevel(logging.WARNING)
    try:
        yield root
    finally:
        root.handlers = before[0]
        root.setLevel(before[1])


def logged(set_up, monkeypatch):
    """What a program says that sets logging up so."""
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with logging_as_it_starts() as root:
        set_up()
        logger = logging.getLogger("tweo_timm.somewhere")
        logger.debug("nobody reads this")
        logger.info("old names: %s", "amp_impl")
        logger.warning("two\nlines")
        return root.level, len(root.handlers), root.handlers[0].stream.getvalue()


def test_log_lines_are_those_of_timms_scripts(monkeypatch):
    ours = logged(set_up_logging, monkeypatch)
    assert ours == logged(setup_default_logging, monkeypatch)
    assert ours[2] == "old names: amp_impl\nWARNING: two\nlines\n"


def test_logging_that_a_program_has_set_up_stays_as_it_is():
    with logging_as_it_starts() as root:
        own = logging.NullHandler()
        root.addHandler(own)
        set_up_logging()
        assert (root.handlers, root.level) == ([own], logging.WARNING)


@pytest.mark.parametrize("name", ["\x1b[2J", "a\rb", "\x9b31m", "\u202egnp"])
def test_a_name_does_not_act_upon_the_terminal(name, monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with logging_as_it_starts() as root:
        set_up_logging()
        logging.getLogger("tweo_timm").warning("%s held an earlier run", name)
        shown = root.handlers[0].stream.getvalue()
    assert shown == f"WARNING: {name.encode('unicode_escape').decode()} held an earlier run\n"
