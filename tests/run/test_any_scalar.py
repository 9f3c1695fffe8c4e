"""Any value for any option, from a file or the command line, is taken or refused in one line within two seconds."""

from dataclasses import fields

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.photograph.runs import take
from tests.run.limits import two_seconds
from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.run.flags import option_table
from tweo_timm.train.options import TrainOptions

TABLES = {"train.py": option_table(TrainOptions), "validate.py": option_table(ValidateOptions)}
NUMBERS = st.one_of(
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([2**31, 2**63, -(2**63), 10**99, 1e300, -1e300, 1e-320, 1e-30, 0, -1, -3, 0.5]),
    st.floats(),
)
SCALARS = st.one_of(NUMBERS, st.booleans(), st.none(), st.text(max_size=20), st.dates(), st.binary(max_size=5))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3))
BOTH = st.sampled_from([(program, name) for program, table in TABLES.items() for name in table])


def outcome(program, words):
    """How the command ended; an exception of any kind, and more than two seconds, are failures."""

    with two_seconds():
        ended = take(program, [*words, "--print-config"])
    assert ended.status in (0, 1, 2)
    assert bool(ended.status) == bool(ended.err)
    assert "Traceback" not in ended.err
    assert ended.status == 0 or len(ended.err.splitlines()) == 1, ended.err
    return ended


def check_file(path, both, value):
    program, name = both
    path.write_text(yaml.safe_dump({name: value}, allow_unicode=True), encoding="utf-8")
    ended = outcome(program, ["-c", str(path)])
    if ended.status:
        assert str(path) in ended.err
    else:  # what is shown is what a file may say
        path.write_text(ended.out, encoding="utf-8")
        assert outcome(program, ["-c", str(path)]).out == ended.out


def check_word(both, word):
    program, name = both
    option = TABLES[program][name]
    flag = option.names[0]
    if name not in ("config", "print_config") and not word.startswith("-h"):
        outcome(program, [word] if option.positional else [flag, *([] if option.scalar is bool else [word])])


quick = settings(
    derandomize=True,
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
long = settings(quick, max_examples=20_000)


@quick
@given(BOTH, VALUES)
def test_any_value_in_a_file(tmp_path, both, value):
    check_file(tmp_path / "recipe.yaml", both, value)


@quick
@given(BOTH, SCALARS.map(str))
@example(("train.py", "model_kwargs"), "a=" + "(" * 500)
@example(("train.py", "model_kwargs"), "a=...")
@example(("train.py", "model_kwargs"), "a={1j}")
@example(("train.py", "opt_kwargs"), "a=0x" + "f" * 5000)
@example(("train.py", "model_kwargs"), "a={[]: 1}")
@example(("train.py", "tweo_blocks"), "a{99999999999999999999}")
@example(("train.py", "tweo_blocks"), "(" * 5000)
@example(("train.py", "fp8_exclude"), "a{99999999999999999999}")
@example(("train.py", "epochs"), "9" * 5000)
@example(("train.py", "workers"), str(2**63))
@example(("validate.py", "workers"), str(2**63))
def test_any_word_on_the_command_line(both, word):
    check_word(both, word)


@pytest.mark.slow
@long
@given(BOTH, VALUES)
def test_any_value_in_a_file_at_length(tmp_path, both, value):
    check_file(tmp_path / "recipe.yaml", both, value)


@pytest.mark.slow
@long
@given(BOTH, SCALARS.map(str))
def test_any_word_on_the_command_line_at_length(both, word):
    check_word(both, word)


@pytest.mark.parametrize("number", ["1e300", "nan", "-inf"])
@pytest.mark.parametrize("program", TABLES)
def test_no_number_beyond_all_use_is_accepted_by_any_option(program, number):
    kind = {"train.py": TrainOptions, "validate.py": ValidateOptions}[program]
    numeric = [name for name, option in TABLES[program].items() if option.scalar is float]
    assert set(numeric) <= {item.name for item in fields(kind)}
    for name in numeric:
        option = TABLES[program][name]
        count = option.flag.nargs if isinstance(option.flag.nargs, int) else 1
        words = [f"{option.names[0]}={number}"] if count == 1 else [option.names[0], *[number] * count]
        assert outcome(program, words).status in (1, 2), name
