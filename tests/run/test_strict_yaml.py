"""A file of settings that is hostile or damaged ends with one line that names it, at once."""

import pytest

from tests.photograph.runs import take
from tests.run.limits import two_seconds
from tweo_timm.run.strict_yaml import MAX_DEPTH

LAUGHS = "\n".join(
    ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
)
HOSTILE = {
    "laughs": (f"model_kwargs:\n  {LAUGHS.replace(chr(10), chr(10) + '  ')}\n", "more than 2000 values"),
    "merges": ("a: &a {x: 1}\nb: {<<: [" + "*a, " * 10000 + "*a]}\n", "more than 2000 values"),
    "itself": ("model_kwargs: &a {a: *a}\n", "an alias inside of what it stands for"),
    "itself in a list": ("mean: &a [1, *a]\n", "an alias inside of what it stands for"),
    "deep": ("model_kwargs: {a: " + "[" * 5000 + "]" * 5000 + "}\n", f"nested deeper than {MAX_DEPTH} levels"),
    "deep keys": ("? " * 5000 + "a\n", f"nested deeper than {MAX_DEPTH} levels"),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(6_000)), "more than 2000 values"),
    "large": ("#" * 300_000 + "\n", "larger than 64 KiB"),
    "digits": (f"lr: {'9' * 400}\n", "an integer of 400 characters"),
    "many digits": (f"model_kwargs: {{a: {'9' * 5000}}}\n", "an integer of 5000 characters"),
    "sixties": (f"lr: {':'.join(['59'] * 1000)}\n", "an integer of 2999 characters"),
    "hexadecimal": (f"lr: 0x{'f' * 5000}\n", "an integer of 5002 characters"),
    "a date that is none": ("lr: 2026-02-30\n", "is not valid YAML"),
    "a tag that lies": ("amp: !!bool perhaps\n", "is not valid YAML"),
    "a tag of Python": ("model: !!python/object/apply:os.system [ls]\n", "is not valid YAML"),
    "a key that is a list": ("? [1, 2]\n: 3\n", "is not valid YAML"),
    "twice": ("lr: 1\nlr: 2\n", "given twice"),
    "twice in one that is equal": ("model_kwargs: {1: a, 1.0: b}\n", "given twice"),
    "control characters": ("model: \x01\n", "is not valid YAML"),
    "huge in a mapping": ("model_kwargs: {head_init_bias: 1e300}\n", "model_kwargs: "),
    "huge deep in a mapping": ("opt_kwargs: {a: [{b: .inf}]}\n", "not finite"),
    "out of bounds": ("lr: -1\n", "(lr: "),
}


@pytest.fixture
def alarm():
    with two_seconds():
        yield


def refusal(text, tmp_path, program="train.py"):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    status, out, err = take(program, ["-c", str(path), "--print-config"])
    assert out == ""
    assert str(path) in err
    assert len(err.splitlines()) == 1, err
    return status, err


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("program", ["train.py", "validate.py"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_at_once_by_name(name, program, tmp_path):
    text, reason = HOSTILE[name]
    if program == "validate.py":
        text = text.replace("lr:", "crop_pct:").replace("opt_kwargs", "model_kwargs")
        reason = reason.replace("(lr:", "(crop_pct:")
    status, err = refusal(text, tmp_path, program)
    assert reason in err
    assert status == (1 if "head_init_bias" in text or ".inf" in text or "-1" in text else 2)


@pytest.mark.usefixtures("alarm")
def test_an_endless_file_and_binary_bytes_are_refused(tmp_path):
    for path in ("/dev/zero", str(tmp_path)):
        ended = take("train.py", ["-c", path, "--print-config"])
        assert ended.status == 2
        assert path in ended.err
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    ended = take("train.py", ["-c", str(tmp_path / "bytes"), "--print-config"])
    assert ended.status == 2
    assert "bytes" in ended.err


@pytest.mark.usefixtures("alarm")
def test_a_long_chain_of_files_is_refused_and_a_short_one_read(tmp_path):
    for number in range(200):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    (tmp_path / "200.yaml").write_text("epochs: 7\n")
    ended = take("train.py", ["-c", str(tmp_path / "0.yaml"), "--print-config"])
    assert ended.status == 2
    assert "files extend one another" in ended.err
    assert "epochs: 7\n" in take("train.py", ["-c", str(tmp_path / "190.yaml"), "--print-config"]).out


def test_aliases_and_merges_of_ordinary_files_are_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("mean: &m [0.5, 0.5, 0.5]\nstd: *m\nmodel_kwargs: {<<: {depth: 2}, depth: 3}\n")
    shown = take("train.py", ["-c", str(path), "--print-config"])
    assert shown.status == 0, shown.err
    assert "model_kwargs:\n  depth: 3\n" in shown.out
    assert "std:\n- 0.5\n" in shown.out
