"""A damaged report.json is refused in one line that names the field; what is accepted is shown without a traceback."""

import copy
import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.run.limits import two_seconds
from tweo_timm.evaluate.cli import main
from tweo_timm.evaluate.plots import PICTURES
from tweo_timm.evaluate.probe import PROBES
from tweo_timm.evaluate.stored import read_reports

EXPORTED = {
    "scheme": "w8a8-tt",
    "images": 21,
    "top1": 30.0,
    "self_error_ratio": 0.01,
    "scales": None,
    "files": [
        {"path": "a/b.onnx", "target": "qdq", "size_mb": 1.5, "top1": 30.0, "top1_agreement": 1.0, "fault": None}
        | {"error_ratio": 0.02, "relative_error": 0.01, "nodes": {"int8": {"MatMul": 4}, "float_islands": 0}}
    ],
    "latency": [
        {"batch": 1, "threads": 2, "rounds": 3, "cpu": "some", "onnxruntime": "1.20"}
        | {"rows": [{"file": "qdq", "median_ms": 1.0, "min_ms": 0.9, "images_per_s": 1000.0, "ratio": 2.0}]}
    ],
}


@pytest.fixture(scope="module")
def report(checkpoints, photos, tmp_path_factory):
    """A real report of one checkpoint, with everything measured; what export finds is made up."""
    folder = tmp_path_factory.mktemp("report")
    words = ["--checkpoint", checkpoints[0], "--data-dir", photos, "--device", "cpu", "-j", "0", "-b", "4"]
    words += ["--quantize", "w8a8-tt", "--calibration-images", 4, "--sites", "all", "--stethoscope", "--colinearity"]
    words += ["--fp8-readiness", "--survey", "--max-drop", 100]
    assert main([str(word) for word in [*words, "--report", folder]]) == 0
    found = json.loads((folder / "report.json").read_text())
    record = found["checkpoints"][0]
    record["quantized"][0]["exported"] = EXPORTED
    record["exported"] = EXPORTED | {"latency": []}
    record["not_quantized"] = {"w4a4-ck": "--quantize w4a4-ck is not possible"}
    return found


def places(value, path=()):
    """Every place in nested JSON, of each list the first two and the last."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for index in sorted({0, 1, len(value) - 1} & set(range(len(value)))):
            yield from places(value[index], (*path, index))


DELETED = object()
INSTEAD = {"gone": DELETED, "null": None, "text": "x", "negative": -1, "list": [], "mapping": {}, "huge": 1e300}


def changed(report, place, value):
    """A report with another value at a place, or without it."""
    report = copy.deepcopy(report)
    if not place:
        return None if value is DELETED else value
    inner = report
    for step in place[:-1]:
        inner = inner[step]
    if value is DELETED:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return report


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 10**400, 1e300, -1e300, 1e-320, 2**63]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["=1+1", "[/b]", "[red]", "$\\frac$", "_x", "|", "<img src=x onerror=alert(1)>", "\x1b[2J", "\ud800"]
    ),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


def compared(report, folder, pictures, monkeypatch_context):
    """Compare two of a report with one another; the status, and what was said."""
    path = folder / "report.json"
    path.write_text(json.dumps(report), encoding="utf-8")
    monkeypatch_context.setattr("tweo_timm.evaluate.report.versions", dict)  # which asks git
    if not pictures:
        monkeypatch_context.setattr("tweo_timm.outputs.Outputs.picture", lambda self, name, draw: self.folder / name)
    return main(["--compare-reports", str(path), "--report", str(folder / "out"), "--results-file", str(folder / "r")])


def check(report, place, value, folder, capsys, pictures=False):
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, two_seconds():
        status = compared(changed(report, place, value), folder, pictures, patch)
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err + (folder / "r").read_text() if status == 0 else True
    if status:
        assert status == 1
        assert err.startswith(f"validate.py: error: --compare-reports {folder}/report.json")
        assert len(err.splitlines()) == 1
        keys = [step for step in place if isinstance(step, str)]
        assert not keys or any(key in err for key in keys), (place, value, err)
    else:
        assert err == ""
    return status, err


def drawn(data, report):
    return data.draw(st.sampled_from(list(places(report)))), data.draw(st.one_of(st.just(DELETED), VALUES))


fuzz = settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@fuzz
@given(data=st.data())
def test_any_value_in_place_of_any_field_is_shown_or_refused_by_its_name(data, report, tmp_path, capsys):
    check(report, *drawn(data, report), tmp_path, capsys)


@pytest.mark.slow
@settings(fuzz, max_examples=3000)
@given(data=st.data())
def test_any_value_in_place_of_any_field_at_length(data, report, tmp_path, capsys):
    check(report, *drawn(data, report), tmp_path, capsys, pictures=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTEAD)
def test_every_field_with_each_of_some_values(name, report, tmp_path, capsys):
    for place in places(report):
        check(report, place, INSTEAD[name], tmp_path, capsys)


def test_the_whole_report_is_compared_with_pictures(report, tmp_path, capsys):
    assert check(report, ("command",), "validate.py", tmp_path, capsys, pictures=True) == (0, "")
    drawn = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert drawn == PICTURES.keys()


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_that_was_refused_is_read_back(name, report, tmp_path, capsys):
    place = ("checkpoints", 0, name)
    assert check(report, place, {"refused": "no | blocks"}, tmp_path, capsys) == (0, "")
    assert f"No {name.replace('_', ' ')}: no \\| blocks" in (tmp_path / "out" / "report.md").read_text()
    assert check(report, place, {"refused": None}, tmp_path, capsys)[0] == 1


RECORD = ("checkpoints", 0)
DAMAGE = {
    "top1 is gone": ((*RECORD, "top1"), DELETED, "it lacks checkpoints[0].top1"),
    "another task": (
        (*RECORD, "task"),
        "x",
        "checkpoints[0].task is 'x'; it must be one of classification, multilabel",
    ),
    "no schemes": ((*RECORD, "quantized"), None, "checkpoints[0].quantized is None; it must be a list"),
    "no records": (("checkpoints",), [], "checkpoints is an empty list; it must be a list with one entry or more"),
    "a schema in quotes": (("schema",), "1", "schema is '1'; it must be an integer"),
    "a newer schema": (("schema",), 9, "has schema 9, this version reads 1"),
    "more images than bits": ((*RECORD, "data", "images"), 99, "26 hexadecimal digits"),
    "no bits": ((*RECORD, "correct"), "zz", "hexadecimal digits"),
    "a name without end": ((*RECORD, "name"), "x" * 5000, "at most 1000 characters"),
    "a block that is none": ((*RECORD, "blocks", 1), 7, "checkpoints[0].blocks[1] is 7; it must be a dictionary"),
    "no report": ((), [], "its content is an empty list"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_by_field(name, report, tmp_path, capsys):
    place, value, message = DAMAGE[name]
    status, err = check(report, place, value, tmp_path, capsys)
    assert status == 1
    assert message in err


NO_JSON = {"recursion": b"[" * 100_000, "utf-8": b"\xff\xfe", "digits": b'{"schema": ' + b"9" * 5000 + b"}"}


@pytest.mark.parametrize("reason", NO_JSON)
def test_what_is_no_json_is_named_by_file(reason, tmp_path):
    path = tmp_path / "r.json"
    path.write_bytes(NO_JSON[reason])
    with two_seconds(), pytest.raises(ValueError, match=rf"--compare-reports {path} is no report.json: .*{reason}"):
        read_reports([str(path)])


@pytest.mark.parametrize("path", ["/dev/zero", "/", "/nowhere.json"])
def test_a_file_without_end_and_a_folder_are_refused(path):
    with two_seconds(), pytest.raises(ValueError, match=f"--compare-reports {path} is no report.json"):
        read_reports([path])


HOSTILE = "=1|a[/b]<img src=x onerror=alert(1)>\x1b[2J\n`$_[tweo]"


def test_a_hostile_name_is_harmless_in_every_medium(report, tmp_path, capsys, monkeypatch):
    report = changed(report, (*RECORD, "name"), HOSTILE)
    report = changed(report, (*RECORD, "arch"), HOSTILE)
    assert compared(report, tmp_path, True, monkeypatch) == 0
    out, err = capsys.readouterr()
    shown = [out, err, *((tmp_path / name).read_text() for name in ("out/report.md", "out/report.csv", "r"))]
    assert not any("\x1b" in text for text in shown)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["checkpoints"][0]["name"] == HOSTILE
    assert "<img" not in shown[2]
    lines = shown[2].splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("| model |"))
    count = lines[first].count("|")
    assert lines[first + 2].replace("\\|", "").count("|") == count
    for text in shown[3:]:
        assert not any(cell.startswith("=") for line in text.splitlines() for cell in line.split(","))


@example("vit[tweo]")
@example("out/x[/b]/")
@fuzz
@given(st.text(alphabet="[]/abc ", min_size=1, max_size=12))
def test_a_terminal_shows_names_as_they_are(name):
    import io

    from rich.console import Console

    from tweo_timm.evaluate import report as report_module

    screen = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        terminal = Console(file=screen, force_terminal=True, width=200, color_system=None)
        patch.setattr(report_module, "Console", lambda: terminal)
        report_module.print_rows([{"model": name, "Top-1 %": "12.00"}])
    assert f"│ {name}" in screen.getvalue()


def test_files_are_written_before_anything_is_printed(report, tmp_path, capsys, monkeypatch):
    def broken(records):
        raise KeyboardInterrupt

    monkeypatch.setattr("tweo_timm.evaluate.command.print_table", broken)
    assert compared(report, tmp_path, False, monkeypatch) == 130
    assert {"report.json", "report.md", "report.csv"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "r").exists()


def test_numbers_are_printed_though_the_disk_is_full(report, tmp_path, capsys, monkeypatch):
    def full(self, name, content):
        raise OSError(28, "No space left on device", str(self.folder / name))

    monkeypatch.setattr("tweo_timm.outputs.Outputs.write", full)
    assert compared(report, tmp_path, False, monkeypatch) == 1
    out, err = capsys.readouterr()
    assert "--result\n" in out
    assert err == f"validate.py: error: [Errno 28] No space left on device: '{tmp_path}/r'\n"
