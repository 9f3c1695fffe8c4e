from __future__ import annotations

import itertools
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.quant.families import make_images, make_model
from tweo_timm.quant.deploy import export_record
from tweo_timm.quant.export import export_onnx
from tweo_timm.quant.static import quantize_static

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from tweo_timm.quant import latency  # noqa: E402
from tweo_timm.quant.ort import node_census, run_onnx  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript.*")

CONTESTANTS = ["float32 ONNX", "dynamic int8 ONNX", "qdq", "onnxruntime"]
RATIOS = ("ratio", "ratio_low", "ratio_high")
NUMBERS = {"median_ms", "min_ms", "p99_ms", "images_per_s", *RATIOS}


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "REST_S", 0.0)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model("vit", depth=1)


@pytest.fixture(scope="module")
def quantized(model: nn.Module) -> nn.Module:
    return quantize_static(model, [make_images("vit")], "w8a8-tt")


def record_of(model: nn.Module, quantized: nn.Module | None, path: Path, *sizes: int) -> dict[str, Any]:
    """An export over batches of these sizes."""
    batches = [(make_images("vit", size), torch.zeros(size, dtype=torch.long)) for size in sizes]
    return export_record(model, quantized, batches, path)


def test_rows_are_the_numbers_computed_by_hand() -> None:
    times = {"slow": [0.4, 0.2, 0.3], "fast": [0.1, 0.1, 0.2]}
    rows = latency.latency_rows(times, 6)
    assert list(rows) == ["slow", "fast"]
    assert rows["slow"] == pytest.approx(
        {"median_ms": 300, "min_ms": 200, "p99_ms": 398, "images_per_s": 20, **dict.fromkeys(RATIOS, 1)}
    )
    # the ratio is the median of 4, 2 and 1.5, not the ratio of the medians, which is 3
    assert rows["fast"] == pytest.approx(
        {
            "median_ms": 100,
            "min_ms": 100,
            "p99_ms": 198,
            "images_per_s": 60,
            "ratio": 2,
            "ratio_low": 1.5,
            "ratio_high": 4,
        }
    )


@settings(derandomize=True)
@given(
    own=st.lists(st.floats(1e-4, 1e2), min_size=1, max_size=9),
    slowness=st.lists(st.floats(1, 100), min_size=9, max_size=9),
    factor=st.floats(0.1, 10),
)
def test_a_machine_that_slows_down_whole_rounds_leaves_ratios_as_they_are(
    own: list[float], slowness: list[float], factor: float
) -> None:
    def ratio(seconds: list[float]) -> float:
        return latency.latency_rows({"reference": [factor * s for s in seconds], "own": seconds}, 1)["own"]["ratio"]

    assert ratio(own) == pytest.approx(factor)
    assert ratio([s * slow for s, slow in zip(own, slowness, strict=False)]) == pytest.approx(factor)


class Clock:
    """Time that passes only while someone runs or rests."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.log.append("rest")

    def runner(self, label: str, *seconds: float) -> Callable[[Tensor], object]:
        durations = itertools.cycle(seconds)

        def run(images: Tensor) -> None:
            self.now += next(durations)
            self.log.append(label)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


def test_everyone_takes_its_turn_in_every_round_after_a_rest_and_an_untimed_run(clock: Clock) -> None:
    runs = {"a": clock.runner("a", 9, 1, 9, 2, 9, 3), "b": clock.runner("b", 9, 4, 9, 5, 9, 6)}
    times = latency.take_turns(runs, torch.zeros(1), 3)
    assert clock.log == ["rest", "a", "a", "rest", "b", "b"] * 3
    assert times == {"a": [1, 2, 3], "b": [4, 5, 6]}


@pytest.mark.parametrize(("budget", "rounds"), [(0, 1), (45, 3), (1000, 10)])
def test_rounds_stop_when_the_time_is_over_but_one_is_measured(clock: Clock, budget: float, rounds: int) -> None:
    runs = {"a": clock.runner("a", 6), "b": clock.runner("b", 4)}
    times = latency.take_turns(runs, torch.zeros(1), 10, budget)
    assert {label: len(values) for label, values in times.items()} == {"a": rounds, "b": rounds}


def test_the_dynamic_file_computes_every_product_with_weights_in_int8_and_says_nothing(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, root, said = make_images("vit"), logging.getLogger(), []
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "filters", [said.append])
    monkeypatch.setattr(root, "level", logging.DEBUG)
    files = latency.write_rivals(model, images, tmp_path)
    assert (said, root.handlers, root.level) == ([], [], logging.DEBUG)
    layers = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert sum(node_census(files["dynamic int8 ONNX"])["int8"].values()) == layers
    with torch.no_grad():
        wanted = model(images)
    error = run_onnx(files["dynamic int8 ONNX"], images) - wanted
    assert 0 < float(error.norm() / wanted.norm()) < 0.05
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dynamic.onnx", "float32.onnx"]


def test_the_record_times_every_contestant_at_both_batches_and_leaves_nothing_temporary(
    model: nn.Module, quantized: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(latency, "ROUNDS", 2)
    record = record_of(model, quantized, tmp_path / "vit.onnx", 10, 3)
    assert json.loads(json.dumps(record["latency"])) == record["latency"]
    assert [entry["batch"] for entry in record["latency"]] == [1, 8]
    for entry in record["latency"]:
        assert (entry["threads"], entry["rounds"]) == (torch.get_num_threads(), 2)
        assert entry["cpu"]
        assert entry["onnxruntime"]
        assert [row["file"] for row in entry["rows"]] == CONTESTANTS
        assert all(row.keys() == NUMBERS | {"file", "size_mb"} for row in entry["rows"])
        assert entry["rows"][0]["ratio"] == 1
        for row in entry["rows"]:
            assert row["images_per_s"] == pytest.approx(1e3 * entry["batch"] / row["median_ms"])
            assert 0 < row["min_ms"] <= row["median_ms"]
    assert list(temporary.iterdir()) == []
    wanted = ["temporary", "vit.onnx", "vit.onnxruntime.onnx", "vit.scales.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == wanted


def test_each_file_runs_as_often_as_rounds_say_on_a_batch_of_each_size(
    quantized: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[tuple[str, int]] = Counter()
    real = latency.file_run

    def counted(path: str | Path, threads: int | None = None) -> latency.Run:
        run = real(path, threads)

        def counting(images: Tensor) -> object:
            seen[Path(path).stem, len(images)] += 1
            return run(images)

        return counting

    monkeypatch.setattr(latency, "file_run", counted)
    monkeypatch.setattr(latency, "ROUNDS", 3)
    for target in ("qdq", "onnxruntime"):
        export_onnx(quantized, tmp_path / f"{target}.onnx", make_images("vit"), target=target)
    files = {target: tmp_path / f"{target}.onnx" for target in ("qdq", "onnxruntime")}
    found = latency.measure_latency(files, make_images("vit", 5))
    assert seen == {(target, batch): 2 * 3 for target in files for batch in (1, 5)}
    assert [[row["file"] for row in entry["rows"]] for entry in found] == [list(files)] * 2
    assert [entry["batch"] for entry in latency.measure_latency(files, make_images("vit", 1))] == [1]


def test_the_reader_of_images_is_through_before_anything_is_timed(
    model: nn.Module, quantized: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def batches() -> Any:
        for _ in range(2):
            yield make_images("vit", 2), torch.zeros(2, dtype=torch.long)
        events.append("read")

    def measure(files: Any, images: Tensor) -> list[Any]:
        events.append(f"timed {len(images)}")
        return []

    monkeypatch.setattr(latency, "measure_latency", measure)
    export_record(model, quantized, batches(), tmp_path / "vit.onnx", ["onnxruntime"])
    assert events == ["read", "timed 2"]


def test_a_float_file_that_exists_is_not_written_again(
    model: nn.Module, quantized: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: dict[str, Path] = {}
    monkeypatch.setattr(latency, "measure_latency", lambda files, images: timed.update(files) or [])
    batches = [(make_images("vit", 2), torch.zeros(2, dtype=torch.long))]
    known = export_onnx(model, tmp_path / "known.onnx", batches[0][0])["path"]
    monkeypatch.setattr(latency, "export_onnx", None)
    export_record(model, quantized, batches, tmp_path / "vit.onnx", ["qdq"], float_file=known)
    assert timed["float32 ONNX"] == Path(known)


def test_a_float_export_is_timed_against_nothing(model: nn.Module, tmp_path: Path) -> None:
    record = record_of(model, None, tmp_path / "float.onnx", 2)
    assert record["latency"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["float.onnx"]


def test_a_float_form_that_cannot_be_exported_is_refused_before_the_images_are_run(
    model: nn.Module, quantized: nn.Module, tmp_path: Path
) -> None:
    class Fickle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    taken = []

    def batches() -> Any:
        for number in range(2):
            taken.append(number)
            yield make_images("vit", 2), torch.zeros(2, dtype=torch.long)

    with pytest.raises(RuntimeError, match="Fickle cannot be exported to ONNX"):
        export_record(Fickle(), quantized, batches(), tmp_path / "vit.onnx", ["qdq"])
    assert taken == [0]
