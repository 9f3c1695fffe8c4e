"""The plug-in for timm's own train.py, in a stand-in that makes timm's documented calls."""

import importlib
import json
import logging
import os
import sys

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask, MultiLabelClassificationTask, TrainingTask
from timm.utils import CheckpointSaver
from torch import nn

from tests import timm_host
from tests.models import batch, tiny_vit
from tests.processes import run_together
from tweo_timm import TweoConfig

NAME = "tweo_timm.upstream"


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Run the stand-in in this process with TWEO_* variables; the plug-in comes off afterwards."""
    for name in [name for name in os.environ if name.startswith("TWEO_")]:
        monkeypatch.delenv(name)

    def run(*flags, plugin=True, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(f"TWEO_{name.upper()}", str(value))
        output = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        output.mkdir()
        timm_host.main([*(("--device-modules", NAME) if plugin else ()), "--output", str(output), *flags])
        return output

    handlers, level = list(logging.root.handlers), logging.root.level  # timm's script sets them up
    yield run
    logging.root.handlers[:], logging.root.level = handlers, level
    remove_plugin()


def remove_plugin():
    if hasattr(TrainingTask, "tweo_timm_plugin"):
        TrainingTask.tweo_timm_plugin.uninstall()
    sys.modules.pop(NAME, None)


@pytest.fixture
def settings(monkeypatch):
    """read_settings, without having installed anything."""
    for name in [name for name in os.environ if name.startswith("TWEO_")]:
        monkeypatch.delenv(name)
    module = importlib.import_module(NAME)
    yield module.read_settings
    remove_plugin()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(output, rank=0):
    return rows(output / f"steps-{rank}.jsonl")


def peaks_by_epoch(output):
    found = {}
    for row in rows(output / "outliers.jsonl"):
        assert row.keys() == {"epoch", "block", "train_peak_abs"}
        found.setdefault(row["epoch"], {})[row["block"]] = row["train_peak_abs"]
    return found


def test_an_empty_environment_means_the_papers_settings(settings):
    assert settings({"PATH": "/bin"}) == (TweoConfig(), None)


def test_every_variable_is_read(settings):
    config, blocks = settings(
        {
            "TWEO_WEIGHT": "0.1",
            "TWEO_TAU": "2",
            "TWEO_POWER": "6",
            "TWEO_SCHEDULE": "cosine",
            "TWEO_END_WEIGHT": "0.02",
            "TWEO_REDUCTION": "element",
            "TWEO_START": "0.25",
            "TWEO_END": "0.75",
            "TWEO_BLOCKS": r"blocks\.\d+",
        }
    )
    assert config == TweoConfig(0.1, 2, 6, 1e-6, "cosine", 0.02, "element", 0.25, 0.75)
    assert blocks == r"blocks\.\d+"


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"TWEO_WEIGHT": "much"}, r"TWEO_WEIGHT=much.*a number, such as 0\.01"),
        ({"TWEO_WEIGHT": "-1"}, r"TWEO_WEIGHT is -1.*at least 0|TWEO_WEIGHT is -1.*between 0"),
        ({"TWEO_TAU": "nan"}, r"TWEO_TAU is nan.*finite"),
        ({"TWEO_TAU": " "}, r"TWEO_TAU is empty"),
        ({"TWEO_SCHEDULE": "cosin"}, r"TWEO_SCHEDULE is 'cosin'.*'constant'.*did you mean 'cosine'"),
        ({"TWEO_REDUCTION": "mean"}, r"TWEO_REDUCTION.*'block', 'element'"),
        ({"TWEO_END_WEIGHT": "0.1"}, r"TWEO_END_WEIGHT is 0\.1.*constant.*TWEO_END_WEIGHT=0\.1"),
        ({"TWEO_WIEGHT": "0.1"}, "TWEO_WIEGHT.*did you mean 'TWEO_WEIGHT'"),
    ],
)
def test_a_bad_variable_is_an_error_that_names_it_and_what_is_accepted(settings, variables, named):
    with pytest.raises(ValueError, match=named):
        settings(variables)


def test_training_gets_the_penalty_and_one_row_an_epoch_and_block(host):
    output = host("--model-ema", weight=0.2, tau=0.8)
    for step in steps(output):
        assert step["loss"] == pytest.approx(step["task_loss"] + 0.2 * step["tweo_loss"], rel=1e-5)
    by_epoch = peaks_by_epoch(output)
    assert list(by_epoch) == [0, 1]
    for epoch, peaks in by_epoch.items():
        assert list(peaks) == ["blocks.0", "blocks.1"]
        expected = max(step["peak_abs"] for step in steps(output) if step["epoch"] == epoch)
        assert max(peaks.values()) == pytest.approx(expected, rel=1e-6)
    assert (output / "summary.csv").exists()


def test_without_the_plugin_the_same_script_trains_as_ever(host):
    plain = host(plugin=False)
    off = host(weight=0.0)
    assert "tweo_loss" not in steps(plain)[0]
    assert [step["loss"] for step in steps(off)] == [step["loss"] for step in steps(plain)]
    ours, theirs = (torch.load(run / "last.pth.tar", weights_only=False)["state_dict"] for run in (off, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (plain / "outliers.jsonl").exists()
    assert (off / "outliers.jsonl").exists()


def test_a_schedule_moves_with_every_update(host):
    output = host("--sched-on-updates", "--grad-accum-steps", "2", weight=0.2, schedule="linear")
    # Four micro-batches are two updates an epoch: four updates in all.
    expected = [0.2, 0.2, 0.15, 0.15, 0.1, 0.1, 0.05, 0.05]
    assert [step["tweo_weight"] for step in steps(output)] == pytest.approx(expected)


def test_a_schedule_moves_once_an_epoch_where_the_learning_rate_does(host):
    output = host("--epochs", "4", "--cooldown-epochs", "1", "--batch-size", "16", weight=0.2, schedule="linear")
    assert [step["tweo_weight"] for step in steps(output)] == pytest.approx([0.2, 0.15, 0.1, 0.05, 0.0])


@pytest.mark.parametrize("updates", [False, True])
def test_resuming_continues_schedule_and_rows(host, updates):
    flags = ["--epochs", "4", "--batch-size", "8", *(["--sched-on-updates"] if updates else [])]
    whole = host(*flags, weight=0.2, schedule="cosine")
    checkpoint = whole / "checkpoint-1.pth.tar"
    before = peaks_by_epoch(whole)
    (whole / "steps-0.jsonl").rename(whole / "steps-whole.jsonl")
    with open(whole / "outliers.jsonl", "a") as file:
        file.write('{"epoch": 3, "blo')  # what a crash leaves
    timm_host.main(["--output", str(whole), "--resume", str(checkpoint), *flags])
    expected = [step for step in rows(whole / "steps-whole.jsonl") if step["epoch"] >= 2]
    assert [step["tweo_weight"] for step in steps(whole)] == [step["tweo_weight"] for step in expected]
    assert peaks_by_epoch(whole) == before  # the rows of epochs 2 and 3 were replaced


@pytest.mark.parametrize("sched", ["step", "none"])
def test_a_schedule_without_a_length_is_refused(host, sched):
    with pytest.raises((ValueError, RuntimeError), match=r"TWEO_SCHEDULE=cosine.*choose --sched cosine"):
        host("--sched", sched, schedule="cosine")


@pytest.mark.parametrize("sched", ["step", "none"])
def test_a_constant_weight_needs_no_length(host, sched):
    output = host("--sched", sched, weight=0.2)
    assert list(peaks_by_epoch(output)) == [0, 1]


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")
def test_a_scheduler_with_a_step_of_its_own_ends_epochs_too(host):
    assert list(peaks_by_epoch(host("--sched", "plateau"))) == [0, 1]


@pytest.mark.usefixtures("settings")
def test_a_script_that_builds_no_task_learns_that_nothing_happened():
    scheduler = CosineLRScheduler(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), t_initial=2)
    scheduler.step(0)
    with pytest.raises(RuntimeError, match="TWEO did nothing"):
        scheduler.step(1)


def test_compiled_checkpointed_and_distilled_models_get_the_penalty(host, dynamo):
    for flags in (["--torchcompile", "aot_eager"], ["--grad-checkpointing"], ["--kd"]):
        output = host("--epochs", "1", *flags, weight=0.2, tau=0.8)
        (peaks,) = peaks_by_epoch(output).values()
        assert max(peaks.values()) == pytest.approx(max(step["peak_abs"] for step in steps(output)), rel=1e-6)


def test_importing_twice_changes_nothing(host):
    host("--epochs", "1")
    classes = [ClassificationTask, TrainingTask, Scheduler, CheckpointSaver]
    before = [dict(vars(cls)) for cls in classes]
    importlib.reload(sys.modules[NAME])
    sys.modules.pop(NAME)
    importlib.import_module(NAME)
    assert [dict(vars(cls)) for cls in classes] == before


def test_uninstalling_gives_timms_classes_back():
    classes = [TrainingTask, Scheduler, CheckpointSaver, *TrainingTask.__subclasses__(), *Scheduler.__subclasses__()]
    before = [dict(vars(cls)) for cls in classes]
    importlib.import_module(NAME)
    assert [dict(vars(cls)) for cls in classes] != before
    remove_plugin()
    assert [dict(vars(cls)) for cls in classes] == before


@pytest.mark.usefixtures("settings")
def test_a_task_is_attached_once_when_its_outermost_constructor_is_done():
    class OwnTask(MultiLabelClassificationTask):
        def __init__(self, model):
            super().__init__(model, verbose=False)
            assert not self._forward_hooks
            self.extra = nn.Linear(2, 2)

    class Inheriting(OwnTask):
        pass

    for cls in (OwnTask, Inheriting):
        task = cls(tiny_vit())
        result = task(batch()[0], torch.zeros(4, 6))
        assert "tweo_loss" in result
        assert [len(block._forward_hooks) for block in task.trainable_module.blocks] == [1, 1]


def test_blocks_of_the_environment_are_used(host):
    output = host("--epochs", "1", blocks=r"blocks\.1")
    assert peaks_by_epoch(output)[0].keys() == {"blocks.1"}


@pytest.mark.usefixtures("settings")
def test_a_model_without_blocks_is_an_error_when_its_task_is_built():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="has no residual transformer blocks"):
        ClassificationTask(model, verbose=False)


def test_two_processes_record_the_largest_peak_of_both(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TWEO_WEIGHT", "0.2")
    monkeypatch.setenv("TWEO_TAU", "0.8")
    flags = ["--device-modules", NAME, "--output", str(tmp_path), "--model-ema"]
    codes = run_together(lambda: timm_host.main(flags))
    out, err = capfd.readouterr()
    assert codes == [0, 0], f"{codes}\n{out}\n{err}"
    ranks = [steps(tmp_path, rank) for rank in range(2)]
    for epoch, peaks in peaks_by_epoch(tmp_path).items():
        largest = [max(step["peak_abs"] for step in rank if step["epoch"] == epoch) for rank in ranks]
        assert largest[1] > largest[0]  # seen by the process that does not write
        assert max(peaks.values()) == pytest.approx(largest[1], rel=1e-6)
    assert "TweoConfig(weight=0.2" in err
