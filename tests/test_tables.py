"""A table is the only list of its names: what reads it sees a name that a test adds, and sees it go."""

import subprocess
import sys

import pytest

from tweo_timm.tables import Entry, Names, register


def test_an_entry_is_imported_when_it_is_used_and_not_before():
    assert Entry("math:tau").load() == pytest.approx(6.283185307)
    Entry("no_such_module:name")


def test_names_follow_their_table():
    table = {"one": 1}
    names = Names(table, "auto")
    with register(table, "two", 2):
        assert list(names) == ["auto", "one", "two"]
        assert len(names) == 3
        assert "two" in names
    assert list(names) == ["auto", "one"]
    assert "two" not in names


def test_a_name_is_given_back_after_an_error_and_cannot_be_taken_twice():
    table = {"one": 1}
    with pytest.raises(KeyError), register(table, "two", 2):
        raise KeyError
    assert table == {"one": 1}
    with pytest.raises(ValueError, match="'one' is registered already"), register(table, "one", 2):
        pass


def test_names_of_things_that_need_torch_are_read_without_it():
    program = """
import sys
from tweo_timm.fp8.recipe import BACKENDS
assert list(BACKENDS) == ["te", "native", "emulated"]
assert not {"torch", "timm", "numpy"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
