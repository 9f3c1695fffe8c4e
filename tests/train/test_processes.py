"""Two gloo processes, replicated or sharded, are one process that sees the whole batch."""

import csv
import functools
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import models
from tests.images import write_images
from tests.processes import run_together
from tests.train.runs import (
    VIT,
    command,
    killed_after_an_update,
    last,
    load,
    rows,
    same_tensors,
    session_of,
    start_together,
    train,
    train_together,
    wait_until,
)
from tweo_timm.evaluate.cli import main as validate
from tweo_timm.train.cli import main
from tweo_timm.train.data import Data
from tweo_timm.train.replay import ReplayLoader

# The 56 training images are one update: the order in which processes see them does not matter. AdamW would turn the
# rounding of a gradient near 0 into a step of any size, and the comparison into one of machines.
WHOLE = [
    *("--opt", "sgd", "--lr", "0.1"),
    *("--no-aug", "--smoothing", "0.1", "--tweo-weight", "0.2", "--tweo-tau", "0.5", "--clip-grad", "1.0"),
    *("--epochs", "3", "--outlier-interval", "1", "--weight-decay", "0.05"),
]
NORMED = ["--model", "levit_128s", "--num-classes", "3", "--input-size", "3", "32", "32", "--model-kwargs"]
NORMED += ["img_size=32", "embed_dim=(16,16,16)", "num_heads=(2,2,2)", "depth=(1,1,1)", "key_dim=8"]
SETTINGS = {
    "ddp": ["-b", "28", "--no-ddp-bb"],
    "ddp accumulating": ["-b", "7", "--grad-accum-steps", "4"],
    "slurm": ["-b", "28", "--model-ema"],
    "fsdp": ["-b", "28", "--fsdp"],
    "fsdp accumulating": ["-b", "14", "--grad-accum-steps", "2", "--fsdp"],
}


@pytest.fixture(scope="module")
def reference(images, tmp_path_factory):
    return train(images, tmp_path_factory.mktemp("single"), *WHOLE, "-b", "56")


def summary(folder):
    with open(folder / "summary.csv") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_processes_train_as_one_with_the_whole_batch(setting, images, tmp_path, reference):
    scheduler = "slurm" if setting == "slurm" else "torchrun"
    assert train_together(command(images, tmp_path, *WHOLE, *SETTINGS[setting]), scheduler=scheduler) == [0, 0]
    folder = tmp_path / "run"
    found, expected = last(folder)["state_dict"], last(reference)["state_dict"]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    columns = [key for key in summary(reference)[0] if not (setting == "slurm" and key.startswith("eval"))]
    if "accumulating" in setting or "fsdp" in setting:  # of a micro-batch, and not measured
        columns.remove("train_tweo_grad_ratio")
    for ours, theirs in zip(summary(folder), summary(reference), strict=True):
        assert [ours[key] for key in columns] == pytest.approx([theirs[key] for key in columns], rel=1e-4, abs=1e-6)
    for ours, theirs in zip(rows(folder), rows(reference), strict=True):
        for key in ("train_peak_abs", "train_mean_abs", "train_kurtosis"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key


@pytest.mark.parametrize(
    ("size", "words"),
    [(1, ["-b", "14"]), (2, ["-b", "7"]), (2, ["-b", "7", "--fsdp"])],
    ids=["alone", "ddp", "fsdp"],
)
def test_data_that_end_inside_a_group_make_the_update_of_what_there_was(
    size, words, images, tmp_path, reference, monkeypatch
):
    """Each process announces five micro-batches and gives four: its share of the 56 images, and the epoch's update."""
    monkeypatch.setattr(ReplayLoader, "__len__", lambda self: len(self.loader) + 1)
    words = [*WHOLE, *words, "--grad-accum-steps", "5"]
    assert not any(train_together(command(images, tmp_path, *words), size))
    found = last(tmp_path / "run")
    assert found["exact"]["updates"] == 3
    for key, value in last(reference)["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][key], value, rtol=1e-5, atol=1e-6)


def test_micro_batches_of_processes_whose_data_end_apart_weigh_the_same(uneven, tmp_path, monkeypatch):
    """Rank 0 has four micro-batches of a group of five, rank 1 three: the update is the mean over seven."""
    original, seen = Data.batches, tmp_path / "seen"
    seen.mkdir()

    def shortened(self):
        rank = int(os.environ["RANK"])
        for number, batch in enumerate(itertools.islice(original(self), 4 - rank)):
            torch.save(batch, seen / f"{rank}-{number}.pt")
            yield batch

    monkeypatch.setattr(Data, "batches", shortened)
    monkeypatch.setattr(ReplayLoader, "__len__", lambda self: len(self.loader) + 1)
    words = [*ONE_UPDATE, "-b", "7", "--grad-accum-steps", "5"]
    assert train_together(command(uneven, tmp_path, *words)) == [0, 0]
    session = session_of(uneven, tmp_path, *words)
    batches = [torch.load(path) for path in sorted(seen.iterdir())]
    assert len(batches) == 7
    sum(session.task(*batch)["loss"] / 7 for batch in batches).backward()
    expected = [parameter.grad.double() for group in session.optimizer.param_groups for parameter in group["params"]]
    assert farthest(gradients(tmp_path / "run" / "last.pth.tar"), expected) < 1e-5


@pytest.mark.parametrize("sharding", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_the_ema_of_two_processes_is_that_of_one(sharding, images, tmp_path):
    words = [*WHOLE, "--model-ema", "--model-ema-decay", "0.5"]
    alone = train(images, tmp_path, *words, "-b", "56", name="alone")
    assert train_together(command(images, tmp_path, *words, "-b", "28", *sharding, name="both")) == [0, 0]
    both = tmp_path / "both"
    found, expected = last(both)["state_dict_ema"], last(alone)["state_dict_ema"]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
        assert not torch.equal(value, last(alone)["state_dict"][key]), key
    columns = ("eval_loss", "eval_peak_abs")
    for ours, theirs in zip(summary(both), summary(alone), strict=True):
        assert [ours[key] for key in columns] == pytest.approx([theirs[key] for key in columns], rel=1e-4)


SWIN = ["--model", models.SWIN_ARCH, "--model-kwargs", *models.as_words(models.SWIN), "--drop-path", "0"]
SWIN += ["--num-classes", "3", "--input-size", "3", "32", "32"]
MODELS = {"vit": VIT, "swin": SWIN}
# One update of SGD with momentum: the momentum it leaves in the checkpoint is the gradient, to the bit.
ONE_UPDATE = [
    *("--no-aug", "--smoothing", "0.1", "--tweo-weight", "0.2", "--tweo-tau", "0.5"),
    *("--epochs", "1", "--opt", "momentum", "--weight-decay", "0", "--lr", "0.1", "--outlier-interval", "1"),
]
GRADIENT_SETTINGS = {"alone": ["-b", "56"], **{name: words for name, words in SETTINGS.items() if name != "slurm"}}
swins_reshape = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """56 training images, 40 of them in one class: with equal classes biases have gradients that are mere rounding."""
    root = write_images(tmp_path_factory.mktemp("uneven"), train=24, val=12)
    return write_images(root, train=40, val=0, classes=1)


@pytest.fixture(scope="module")
def one_update(uneven, tmp_path_factory):
    """A function to the checkpoint after one update with all images; each setting is run once."""

    @functools.cache
    def run(model, setting, *more):
        out = tmp_path_factory.mktemp("update")
        words = command(uneven, out, *ONE_UPDATE, *GRADIENT_SETTINGS[setting], *more, model=MODELS[model])
        assert not any(train_together(words, size=1 if setting == "alone" else 2))
        return out / "run" / "last.pth.tar"

    return run


def gradients(checkpoint):
    optimizer = load(checkpoint)["optimizer"]
    (group,) = optimizer["param_groups"]
    assert (group["momentum"], group["dampening"], group["weight_decay"]) == (0.9, 0, 0)
    return [optimizer["state"][index]["momentum_buffer"].double() for index in group["params"]]


def farthest(ours, theirs):
    """The largest ||ours - theirs|| / ||theirs|| of any parameter."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


@swins_reshape
@pytest.mark.parametrize("setting", [name for name in GRADIENT_SETTINGS if name != "alone"])
@pytest.mark.parametrize("model", MODELS)
def test_every_gradient_of_two_processes_is_that_of_one(model, setting, one_update):
    alone = gradients(one_update(model, "alone"))
    assert farthest(gradients(one_update(model, setting)), alone) <= 1e-5
    assert farthest(gradients(one_update(model, "alone", "--tweo-weight", "0")), alone) > 0.1


def alike(ours, theirs):
    """Whether two records hold the same, numbers to 1e-5."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(alike(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(alike, ours, theirs))
    return ours == (pytest.approx(theirs, rel=1e-5) if isinstance(theirs, float) else theirs)


@swins_reshape
@pytest.mark.parametrize("model", MODELS)
def test_reports_of_two_processes_are_those_of_one(model, one_update, uneven, tmp_path, capsys):
    checkpoints = [str(one_update(model, setting)) for setting in ("alone", "ddp", "fsdp")]
    words = ["--data-dir", str(uneven), "--device", "cpu", "-j", "0", "--report", str(tmp_path)]
    assert validate(["--checkpoint", *checkpoints, *words]) == 0
    alone, *together = json.loads((tmp_path / "report.json").read_text())["checkpoints"]
    for record in together:
        assert record.keys() == alone.keys()
        for key in record.keys() - {"name", "checkpoint"}:
            assert alike(record[key], alone[key]), (key, record[key], alone[key])


@pytest.mark.parametrize("setting", ["ddp", "fsdp"])
def test_statistics_of_a_validation_split_that_processes_cannot_share_evenly_count_each_image_once(setting, tmp_path):
    data = write_images(tmp_path / "data", train=56, val=9)
    common = [*WHOLE, "--epochs", "1", "--validation-batch-size", "2"]
    alone = rows(train(data, tmp_path, *common, "-b", "56", name="alone"))
    assert train_together(command(data, tmp_path, *common, *SETTINGS[setting])) == [0, 0]
    for ours, theirs in zip(rows(tmp_path / "run"), alone, strict=True):
        columns = [name for name in theirs if name.startswith("eval_")]
        assert "eval_kurtosis" in columns
        assert {name: ours[name] for name in columns} == pytest.approx({name: theirs[name] for name in columns}, 1e-4)


def test_a_sharded_run_leaves_a_plain_timm_checkpoint_and_continues_bit_for_bit(images, tmp_path):
    settings = ("-b", "14", "--fsdp", "--tweo-weight", "0.2", "--mixup", "0.5", "--epochs", "2", "--model-ema")
    assert train_together(command(images, tmp_path, *settings, name="whole")) == [0, 0]
    assert train_together(command(images, tmp_path, *settings, "--stop-epoch", "1", name="cut")) == [0, 0]
    assert train_together(command(images, tmp_path, *settings, "--resume", "auto", name="cut")) == [0, 0]
    whole, cut = last(tmp_path / "whole"), last(tmp_path / "cut")
    for key in ("state_dict", "state_dict_ema", "optimizer"):
        assert same_tensors(cut[key], whole[key]), key
    for weights in (whole["state_dict"], whole["state_dict_ema"]):
        assert not any(isinstance(value, torch.distributed.tensor.DTensor) for value in weights.values())
    model = models.tiny_vit(num_classes=3, checkpoint_path=str(tmp_path / "whole" / "last.pth.tar"))
    assert torch.equal(model.state_dict()["head.weight"], whole["state_dict_ema"]["head.weight"])  # timm prefers it


def test_sharded_fp8_layers_are_replicated_ones_to_the_bit_and_continue(images, tmp_path):
    deep = [word.replace("depth=2", "depth=4") for word in VIT]
    settings = ["-b", "14", "--fp8", "emulated", "--amp", "--amp-dtype", "bfloat16", "--tweo-weight", "0.2"]
    assert train_together(command(images, tmp_path, *settings, name="replicated", model=deep)) == [0, 0]
    sharded = command(images, tmp_path, *settings, "--fsdp", name="sharded", model=deep)
    assert train_together([*sharded, "--stop-epoch", "1"]) == [0, 0]
    assert train_together([*sharded, "--resume", "auto"]) == [0, 0]
    replicated, sharded = last(tmp_path / "replicated"), last(tmp_path / "sharded")
    assert same_tensors(sharded["state_dict"], replicated["state_dict"])
    scales = [[process["fp8"] for process in run["exact"]["processes"]] for run in (sharded, replicated)]
    assert scales[0][0]
    assert same_tensors(*scales)


def test_a_sharded_ema_takes_the_buffers_of_batch_norm_along(images, tmp_path):
    words = ["-b", "28", "--epochs", "1", "--model-ema", "--fsdp", "--tweo-weight", "0.2"]
    assert train_together(command(images, tmp_path, *words, model=NORMED)) == [0, 0]
    found = last(tmp_path / "run")
    means = [name for name in found["state_dict_ema"] if name.endswith("running_mean")]
    assert means
    for name in means:  # timm's first updates copy
        assert torch.equal(found["state_dict_ema"][name], found["state_dict"][name]), name


def test_a_sharded_checkpoint_continues_in_one_process(images, tmp_path):
    settings = ("--epochs", "2", "--stop-epoch", "1", "--fsdp")
    assert train_together(command(images, tmp_path, "-b", "7", *settings)) == [0, 0]
    checkpoint = tmp_path / "run" / "last.pth.tar"
    folder = train(images, tmp_path, "--resume", str(checkpoint), "--start-epoch", "1", name="alone")
    assert {row["epoch"] for row in rows(folder)} == {1}


def test_another_number_of_processes_is_refused_with_the_remedy(images, tmp_path, capfd):
    assert train_together(command(images, tmp_path, "-b", "7", "--epochs", "1")) == [0, 0]
    checkpoint = tmp_path / "run" / "last.pth.tar"
    assert main(command(images, tmp_path, "--resume", str(checkpoint), name="other")) == 1
    assert "--start-epoch" in capfd.readouterr().err


def test_batch_norm_statistics_are_shared_after_each_epoch(images, tmp_path):
    model = ["--model", "resnet10t", "--num-classes", "3", "--input-size", "3", "32", "32"]
    words = ("-b", "7", "--epochs", "1", "--model-ema", "--dist-bn", "reduce")
    assert train_together(command(images, tmp_path, *words, model=model)) == [0, 0]
    header = (tmp_path / "run" / "summary.csv").read_text().splitlines()[0]
    assert header.split(",")[-3:] == ["eval_peak_abs", "train_tweo_weight", "train_tweo_grad_ratio"]


def test_synchronised_batch_norm_on_the_cpu_is_refused(images, tmp_path, capfd):
    model = ["--model", "resnet10t", "--num-classes", "3", "--input-size", "3", "32", "32"]
    assert train_together(command(images, tmp_path, "-b", "7", "--sync-bn", model=model)) == [1, 1]
    assert "--dist-bn reduce" in capfd.readouterr().err


def test_second_derivatives_in_several_processes_are_refused(images, tmp_path, capfd):
    assert train_together(command(images, tmp_path, "-b", "7", "--opt", "adahessian")) == [1, 1]
    assert "--opt adahessian" in capfd.readouterr().err


RESUMED = ["-b", "4", "--model-ema", "--mixup", "0.5", "--reprob", "0.5", "--tweo-weight", "0.1"]


def wait_for(folder, pattern, processes):
    """Wait until a run has written a file, or one of its processes has ended."""
    wait_until(lambda: list(folder.glob(pattern)), processes)


def test_two_processes_stopped_by_sigterm_continue_bit_for_bit(images, tmp_path):
    settings = [*RESUMED, "--epochs", "2", "--recovery-interval", "1"]
    assert train_together(command(images, tmp_path, *settings, name="whole")) == [0, 0]
    words = command(images, tmp_path, *settings, "--resume", "auto", name="cut")
    processes = start_together(words)
    wait_for(tmp_path / "cut", "recovery-0-*", processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [128 + signal.SIGTERM] * 2
    assert train_together(words) == [0, 0]
    for key in ("state_dict", "state_dict_ema", "optimizer"):
        assert same_tensors(last(tmp_path / "cut")[key], last(tmp_path / "whole")[key]), key


@pytest.mark.parametrize("how", ["--no-ddp-bb", "--fsdp"])
def test_batch_norms_of_two_processes_continue_inside_an_epoch_from_what_each_had_measured(how, images, tmp_path):
    settings = ["-b", "4", "--model-ema", "--epochs", "1", "--recovery-interval", "1", how]
    assert train_together(command(images, tmp_path, *settings, name="whole", model=NORMED)) == [0, 0]
    words = command(images, tmp_path, *settings, "--resume", "auto", name="cut", model=NORMED)
    processes = start_together(words)
    wait_for(tmp_path / "cut", "recovery-0-3*", processes)
    for process in processes:
        process.kill()
        process.join()
    assert not (tmp_path / "cut" / "last.pth.tar").exists()
    assert train_together(words) == [0, 0]
    for key in ("state_dict", "state_dict_ema", "optimizer"):
        assert same_tensors(last(tmp_path / "cut")[key], last(tmp_path / "whole")[key]), key


def gloo_threads(words):
    assert main(words) == 0
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux lists them")
def test_threads_of_the_process_group_end_with_the_run(images, tmp_path):
    words = command(images, tmp_path, "-b", "28", "--epochs", "1", "--model-ema", "--tweo-weight", "0.2")
    assert run_together(lambda: gloo_threads(words)) == [0, 0]


@pytest.mark.slow
def test_torchrun_runs_the_script(images, tmp_path):
    """As in the README; the other tests fork their processes, which is ten times faster."""
    script = Path(__file__).parents[2] / "train.py"
    words = command(images, tmp_path, "-b", "28", "--epochs", "1", "--tweo-weight", "0.2")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows(tmp_path / "run")


@pytest.mark.slow
def test_two_processes_killed_at_random_moments_continue_bit_for_bit(images, tmp_path):
    settings = [*RESUMED, "-j", "1", "--epochs", "12", "--recovery-interval", "1"]
    assert train_together(command(images, tmp_path, *settings, name="whole")) == [0, 0]
    words = command(images, tmp_path, *settings, "--resume", "auto", name="killed")
    rng = random.Random(7)
    hit = 0
    for _ in range(20):
        hit += killed_after_an_update(tmp_path / "killed", start_together(words), rng)
    assert hit >= 5
    assert train_together(words) == [0, 0]
    for key in ("state_dict", "state_dict_ema", "optimizer"):
        assert same_tensors(last(tmp_path / "killed")[key], last(tmp_path / "whole")[key]), key
