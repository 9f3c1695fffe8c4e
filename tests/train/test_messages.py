"""What is logged while the command line is read is said once logging is set up."""

import contextlib
import logging

import pytest

from tweo_timm.run.log import held_messages, set_up_logging


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


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def read(bad=False):
    """Stands for reading the command line."""
    logging.getLogger("tweo_timm.run.recipe").info("old names: %s", "amp_impl")
    if bad:
        raise ValueError("unknown key")


def test_a_message_waits_for_the_handlers_that_are_set_up_inside():
    seen = Lines()
    with logging_as_it_starts() as root, held_messages():
        read()
        root.addHandler(seen)
        assert not seen.lines
    assert seen.lines == ["old names: amp_impl"]


def test_without_any_handler_it_goes_to_stderr_before_the_error(capsys):
    with logging_as_it_starts(), pytest.raises(ValueError, match="unknown key"), held_messages():
        read(bad=True)
    assert capsys.readouterr().err == "old names: amp_impl\n"


def test_a_program_that_has_set_logging_up_hears_it_at_once():
    seen = Lines()
    with logging_as_it_starts() as root:
        root.addHandler(seen)
        root.setLevel(logging.INFO)
        with held_messages():
            read()
            assert seen.lines == ["old names: amp_impl"]
    assert seen.lines == ["old names: amp_impl"]


def test_logging_that_a_program_has_set_up_stays_as_it_is():
    seen = Lines()
    with logging_as_it_starts() as root:
        root.addHandler(seen)
        with held_messages():
            set_up_logging()
        assert root.handlers == [seen]


def test_logging_that_nobody_has_set_up_is_timms():
    with logging_as_it_starts() as root:
        with held_messages():
            set_up_logging()
        assert root.level == logging.INFO
        assert len(root.handlers) == 1
