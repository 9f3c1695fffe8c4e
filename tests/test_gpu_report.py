"""benchmarks/gpu_report.py, of which a machine without a GPU can test all but the GPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_report
from benchmarks.gpu import deployment, exactness, photographs, speed, trainings
from benchmarks.gpu.commands import complaint, run_command
from benchmarks.gpu.gpu_tests import marked_files
from benchmarks.gpu.ledger import DONE, FAILED, NOT_RUN, Ledger, MeasurementError, NotRunError, Part
from benchmarks.gpu.plan import gpu_plan, tiny_plan
from benchmarks.gpu.table import markdown
from benchmarks.gpu.worker import Worker
from tweo_timm.fp8 import pytorch
from tweo_timm.fp8.arithmetic import ARITHMETICS
from tweo_timm.train.options import parse_train_options

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def plan(tmp_path):
    return tiny_plan(tmp_path, None, "cpu")


@pytest.fixture
def part(tmp_path):
    return Part("b", Ledger(tmp_path / "results.jsonl"), 600, "abc")


@pytest.fixture
def a_unit_on_this_cpu(monkeypatch):
    """Let PyTorch's CPU reference of the scaled product stand in for a GPU's unit."""
    monkeypatch.setattr(pytorch, "hardware_obstacle", lambda device: None)


def raising(error):
    def measure():
        raise error

    return measure


# ------------------------------------------------------------------------------------------------------------- results


def test_what_is_done_is_not_measured_again_and_what_failed_is(part):
    assert part.attempt("one", lambda: {"ms": 1}, model="vit")["status"] == DONE
    assert part.attempt("two", raising(RuntimeError("CUDA error: out of memory\nSecond line")))["status"] == FAILED
    assert part.attempt("three", raising(NotRunError("no unit")))["status"] == NOT_RUN
    assert part.ledger.find("b", "two")["reason"] == "RuntimeError: CUDA error: out of memory"

    again = Part("b", Ledger(part.ledger.path), 600, "def")
    assert again.attempt("one", raising(AssertionError("measured twice"))) == {
        **{"part": "b", "name": "one", "status": DONE, "revision": "abc", "model": "vit", "ms": 1},
    }
    assert again.attempt("two", lambda: {"ms": 2})["revision"] == "def"
    assert [row["name"] for row in again.ledger.rows()] == ["one", "two", "three"]


def test_a_killed_process_costs_its_last_line_alone(part):
    part.attempt("one", lambda: {"ms": 1})
    with open(part.ledger.path, "a") as file:
        file.write('{"part": "b", "na')
    part.ledger.claim({"card": "H100"})
    part.attempt("two", lambda: {"ms": 2})
    assert [row["name"] for row in part.ledger.rows()] == ["one", "environment", "two"]


def test_a_part_without_time_begins_nothing_and_says_so(part):
    part.limit_s = 0
    row = part.attempt("one", raising(AssertionError("begun")))
    assert row["status"] == NOT_RUN
    assert "no time left" in row["reason"]
    assert part.attempt_all(["a", "b"], raising(AssertionError("begun")))[1]["status"] == NOT_RUN


def test_of_several_things_measured_together_one_may_be_missing(part):
    rows = part.attempt_all(["a", "b"], lambda names: {"a": {"top1": 1.0}})
    assert [row["status"] for row in rows] == [DONE, FAILED]
    asked = []
    part.attempt_all(["a", "b"], lambda names: asked.extend(names) or {"b": {"top1": 2.0}})
    assert asked == ["b"]


def test_results_of_another_machine_are_not_mixed_in(part):
    part.ledger.claim({"card": "H100", "torch": "2.11", "revision": "abc"})
    part.ledger.claim({"card": "H100", "torch": "2.11", "revision": "def"})
    with pytest.raises(
        ValueError, match=r"made with \{'torch': '2.11'\}, here it is \{'torch': '2.14'\}; name another"
    ):
        part.ledger.claim({"card": "H100", "torch": "2.14", "revision": "abc"})


# ---------------------------------------------------------------------------------------------------------- processes


def test_a_worker_survives_what_ends_its_process():
    with Worker() as worker:
        assert worker.run(math.sqrt, 4.0, limit_s=60) == 2.0
        with pytest.raises(MeasurementError, match="ended with status 3"):
            worker.run(os._exit, 3, limit_s=60)
        with pytest.raises(MeasurementError, match="ValueError: "):
            worker.run(math.sqrt, -1.0, limit_s=60)
        with pytest.raises(MeasurementError, match="no result within 0 s"):
            worker.run(input_that_never_comes, limit_s=0.01)


def input_that_never_comes():
    import threading

    threading.Event().wait()


def test_a_commands_own_words_are_the_reason(tmp_path):
    log = tmp_path / "logs" / "train.log"
    with pytest.raises(MeasurementError, match=r"train\.py: .*--epochs.*see .*train\.log"):
        run_command(["train.py", "--epochs", "0"], log, 120)
    assert log.read_text().startswith("python train.py --epochs 0\n")
    trace = "Traceback\n  File x\ntorch.AcceleratorError: CUDA error: misaligned\nCompile with TORCH_USE_CUDA_DSA"
    assert complaint(trace) == "torch.AcceleratorError: CUDA error: misaligned"


# --------------------------------------------------------------------------------------------------------------- parts


def test_the_files_with_gpu_tests_are_found():
    assert "tests/fp8/test_te.py" in marked_files()


@pytest.mark.parametrize("tweo", [False, True], ids=["plain", "tweo"])
@pytest.mark.parametrize("precision", ["bfloat16", "emulated delayed"])
def test_a_step_is_timed_in_every_precision(plan, precision, tweo):
    row = speed.measure_step(speed.Cell(plan.workloads[0], precision, tweo, compiled=False), plan)
    assert row["min_ms"] <= row["median_ms"] <= row["max_ms"]
    assert row["images_per_s"] == pytest.approx(16 / row["median_ms"] * 1e3)
    assert row["peak_mib"] is None  # torch does not count it on a CPU


@pytest.mark.parametrize("precision", ["native unit", "te current"])
def test_a_precision_without_hardware_is_not_run_and_says_why(plan, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunError, match="need a CUDA GPU of compute capability"):
        speed.build_step(speed.Cell(plan.workloads[0], precision, False, False), plan)


def test_the_cells_are_all_combinations_with_the_usual_ones_first(plan):
    real = list(speed.cells(gpu_plan(plan.output, None, 20)))
    assert len({cell.name for cell in real}) == len(real)
    small = [cell for cell in real if cell.workload.arch == "vit_small_patch16_224"]
    assert len(small) == 6 * 2 * 2
    assert not any(cell.compiled for cell in real[:36])
    assert {cell.precision for cell in real[36:48]} == {"bfloat16", "native delayed"}
    assert real[-1].workload.arch == "swin_base_patch4_window7_224"


def finished(precision, tweo, median_ms, peak_mib, compiled=False):
    cell = {"model": "vit", "precision": precision, "tweo": tweo, "compiled": compiled, "batch_size": 16}
    times = {"median_ms": median_ms, "min_ms": median_ms, "max_ms": median_ms, "images_per_s": 16e3 / median_ms}
    return {
        "part": "b",
        "name": f"{precision} {tweo} {compiled}",
        "status": DONE,
        **cell,
        **times,
        "peak_mib": peak_mib,
    }


def test_ratios_are_to_bfloat16_of_the_same_kind():
    rows = [finished("bfloat16", False, 10.0, 100), finished("bfloat16", True, 11.0, 101)]
    rows += [finished("native delayed", False, 8.0, 90), finished("native delayed", False, 5.0, 90, compiled=True)]
    ratios = [(row["time_ratio"], row["memory_ratio"]) for row in speed.with_ratios(rows)]
    assert ratios == [(1.0, 1.0), (1.1, 1.01), (0.8, 0.9), (None, None)]  # nothing compiled to compare with
    assert speed.slowest_of(rows)["name"] == "bfloat16 True False"
    assert speed.slowest_of(rows[:1]) is None


def test_a_profile_names_what_takes_longest(plan):
    found = speed.profile_step(speed.Cell(plan.workloads[0], "bfloat16", False, False), plan)
    times = [kernel["ms"] for kernel in found["kernels"]]
    assert times == sorted(times, reverse=True)
    assert 0 < sum(times) <= found["busy_ms"]


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_both_arithmetics_round_every_bfloat16_value_alike(fmt):
    assert exactness.roundings(fmt, "cpu") == {"compared": 3 * 2**16, "different": {}}


@pytest.mark.parametrize("scaling", exactness.SCALINGS)
def test_a_step_with_nothing_to_round_is_the_same_to_the_bit(scaling, a_unit_on_this_cpu):
    found = exactness.layer_steps(scaling, "cpu")
    assert found["different"] == {}
    assert {"y of step 1", "dx of step 2", "dw of step 2", "db of step 2"} <= set(found["compared"])
    assert ("0.scaling_bwd.amax_history" in found["compared"]) == (scaling == "delayed")


def test_a_native_product_that_is_off_by_one_is_found(a_unit_on_this_cpu, monkeypatch):
    native = ARITHMETICS["native"]
    right = native.product
    monkeypatch.setattr(native, "product", lambda *args, **kwargs: right(*args, **kwargs) + 1)
    different = exactness.layer_steps("current", "cpu")["different"]
    assert different["dw of step 1"] == 64 * 64
    with pytest.raises(MeasurementError, match="not the same bits"):
        exactness.exact({"different": different})


def test_a_model_in_native_fp8_is_near_the_emulated_one(plan, a_unit_on_this_cpu):
    found = exactness.model_steps(plan.workloads[0], "delayed", "cpu")
    assert found["loss_difference"] < 0.02
    assert found["gradient_error"] < 0.25


@pytest.mark.parametrize("make", ["gpu", "tiny"])
def test_trainings_are_commands_that_differ_in_one_thing(plan, make):
    plan = plan if make == "tiny" else gpu_plan(plan.output, None, 20)
    arms = list(trainings.arms(plan))
    assert len(arms) == 4 * plan.trained
    options = [parse_train_options(trainings.train_words(arm, plan, 3, 24, plan.output)[1:]) for arm in arms[:4]]
    baseline, tweo, fp8, fp8_tweo = options
    assert [one.tweo_weight for one in options] == [0, 0.01, 0, 0.01]
    assert [one.fp8 for one in options] == ["off", "off", plan.fp8, plan.fp8]
    assert {(one.seed, one.epochs, one.batch_size, one.amp_dtype, one.lr) for one in options} == {
        (0, 3, plan.workloads[0].batch_size, "bfloat16", 5e-4)
    }
    assert (baseline.fp8_health_interval, fp8.fp8_health_interval, fp8_tweo.fp8_health_interval) == (0, 3, 3)
    assert tweo.img_size == plan.workloads[0].img_size


def test_a_run_is_read_from_its_own_records(tmp_path):
    (tmp_path / "summary.csv").write_text("epoch,train_loss,eval_top1,eval_peak_abs\n0,2,10,3\n1,1.5,20,4\n")
    peaks = [{"epoch": 0, "block": "blocks.0", "train_peak_abs": 9.0}, {"epoch": 1, "block": "blocks.1"}]
    (tmp_path / "outliers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in peaks))
    health = [
        {"update": update, "layer": "head", "tensor": tensor, "saturated": 0.0, "flushed": 0.0, "sqnr_db": db}
        | {"sqnr_without_peak_db": None}
        for update, tensor, db in ((0, "x", 1.0), (8, "x", 30.0), (8, "w", 20.0), (8, "dy", None))
    ]
    (tmp_path / "fp8_health.jsonl").write_text("".join(json.dumps(row) + "\n" for row in health))
    found = trainings.read_run(tmp_path)
    assert (found["top1"], found["train_loss"], found["eval_peak_abs"]) == (20.0, 1.5, 4.0)
    assert (found["train_peak_abs"], found["train_peak_block"]) == (9.0, "blocks.0")
    assert (found["sqnr_db"], found["worst_sqnr_db"], found["worst_sqnr_db_at"]) == (25.0, 20.0, "head.w")


def test_without_the_photographs_packages_a_folder_made_elsewhere_is_asked_for(plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(NotRunError, match=r"scikit-image.*tweo_timm.photos FOLDER.*64 MiB.*--data-dir FOLDER"):
        photographs.crops(plan)


def test_a_named_folder_without_crops_is_refused(plan, tmp_path):
    named = tiny_plan(tmp_path, tmp_path / "elsewhere", "cpu")
    with pytest.raises(NotRunError, match=r"elsewhere: holds no train and validation crops"):
        photographs.crops(named)


def test_models_that_were_not_trained_are_not_validated(plan, part):
    part.letter = deployment.LETTER
    deployment.measure_part(part, plan)
    rows = part.ledger.rows()
    assert len(rows) == 8
    assert {row["status"] for row in rows} == {NOT_RUN}


# -------------------------------------------------------------------------------------------------------------- report


def test_the_report_says_what_failed_and_what_was_not_run(part):
    part.ledger.claim({"card": None, "torch": "2.11", "tiny": True})
    part.attempt("vit, te", raising(NotRunError("Transformer Engine is not installed")))
    part.attempt("vit, native", raising(RuntimeError("CUDA error")))
    text = markdown(part.ledger.rows())
    assert "- card: none" in text
    assert "No number here says anything of a GPU" in text
    assert (
        "## (c) Trainings on photograph crops, and native against emulated FP8\n\nNot run: not asked for yet." in text
    )
    assert "- **Transformer Engine is not installed**: (b) vit, te" in text.split("## What was not run, and why")[1]
    assert "- **RuntimeError: CUDA error**: (b) vit, native" in text.split("## What failed")[1]


def test_the_table_puts_the_ratio_beside_the_speed():
    rows = [finished("bfloat16", False, 10.0, 100), finished("native delayed", True, 8.0, 90)]
    assert "| vit | native delayed | yes | eager | 16 | 2000 | 8.00 (8.00 to 8.00) | 0.800 | 90 | 0.900 |" in markdown(
        rows
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_models_are_tiny(tmp_path):
    parsed = gpu_report.argparse.Namespace(output=tmp_path, data_dir=None, train_seconds=20, tiny=False)
    assert gpu_report.make_plan(parsed).tiny


@pytest.mark.slow
def test_the_whole_report_runs_on_a_cpu_and_goes_on_where_it_was(tmp_path):
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu_report.py"), "--tiny", "--output", str(tmp_path)]
    elsewhere = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    first = subprocess.run([*command, "--parts", "a", "b"], **elsewhere)
    second = subprocess.run(command, **elsewhere)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    rows = json.loads((tmp_path / "report.json").read_text())
    assert {row["status"] for row in rows} <= {DONE, NOT_RUN}
    assert len([row for row in rows if row["part"] == "c" and "top1" in row]) == 4
    assert len([row for row in rows if row["part"] == "d" and row["status"] == DONE]) == 8
    assert len([row for row in rows if row["name"].startswith(speed.PROFILE)]) >= 1
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    done = [(line["part"], line["name"]) for line in lines if line["status"] == DONE and line["part"] != "environment"]
    assert len(done) == len(set(done))
