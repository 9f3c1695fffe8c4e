"""No flag is silently ignored: each is read where it acts, read by timm, or refused with a reason."""

import csv
import dataclasses
import json
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import resolve_data_config
from timm.data.auto_augment import NAME_TO_OP, posterize
from timm.loss import compute_class_weights
from timm.optim import optimizer_kwargs
from timm.scheduler import scheduler_kwargs
from timm.utils import unwrap_model

import tweo_timm.train
from tests.train.runs import VIT, command, last, load, rows, same_tensors, train, write_images
from tweo_timm.train import data, loop
from tweo_timm.train.build import build_session
from tweo_timm.train.cli import main
from tweo_timm.train.options import TrainOptions, parse_train_options
from tweo_timm.train.watch import SignalWatch
from tweo_timm.train.world import World

# Files that define and check flags, but act on none.
DECLARING = {"checks.py", "flags.py", "legacy.py"}
REFUSED = {
    "torchscript": ["--torchscript"],
    "fuser": ["--fuser", "te"],
    "tta": ["--tta", "2"],
    "drop_connect": ["--drop-connect", "0.1"],
    "naflex_loader": ["--naflex-loader"],
    "persistent_workers": ["--persistent-workers"],
}
# Read before there are options: by the parser, and by timm from the environment that torchrun sets.
OF_THE_PARSER = {"config", "config_unknown", "data", "local_rank"}


class Listening(dict):
    """A namespace and a mapping that remembers what was read."""

    def __init__(self, values):
        super().__init__(values)
        self.read = set()

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        self.read.add(name)
        return self[name]

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.read.add(name)
        return super().get(name, default)


def read_by_timm():
    values = Listening({field.name: getattr(TrainOptions(), field.name) for field in dataclasses.fields(TrainOptions)})
    optimizer_kwargs(cfg=values)
    scheduler_kwargs(values)
    resolve_data_config(values, pretrained_cfg={"input_size": (3, 32, 32)})
    return values.read


def test_every_flag_is_read_or_refused():
    folder = Path(tweo_timm.train.__file__).parent
    source = "".join(path.read_text() for path in folder.glob("*.py") if path.name not in DECLARING)
    read = set(re.findall(r"\b(?:options|self\._options)\.(\w+)", source)) | read_by_timm() | OF_THE_PARSER
    of_naflex = {field.name for field in dataclasses.fields(TrainOptions) if field.name.startswith("naflex_")}
    assert {field.name for field in dataclasses.fields(TrainOptions)} - read - of_naflex - REFUSED.keys() == set()


@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_honoured_is_refused_before_anything_is_written(words, images, tmp_path, capsys):
    assert main(command(images, tmp_path, *words)) == 1
    assert words[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def session_of(data, out, *words, **kwargs):
    return build_session(parse_train_options(command(data, out, *words, **kwargs)), World(torch.device("cpu")))


def test_outlier_statistics_of_training_count_the_armed_batches_only(images, tmp_path, monkeypatch):
    from tweo_timm.stats import ActivationStats

    counted = []
    original = ActivationStats.update
    monkeypatch.setattr(ActivationStats, "update", lambda self, x: (counted.append(x.requires_grad), original(self, x)))
    folder = train(
        images,
        tmp_path,
        *(
            "--epochs",
            "1",
            "--outlier-interval",
            "3",
            "--grad-checkpointing",
            "--tensorboard",
            "--grad-accum-steps",
            "2",
        ),
    )
    assert sum(counted) == 2 * 2  # batches 1 and 4 of 7, two blocks, none of them again in the backward pass
    row = rows(folder)[0]
    assert {"train_mean_abs", "train_kurtosis", "train_p999_abs", "eval_mean_abs", "eval_kurtosis"} <= row.keys()
    assert row["train_peak_abs"] > row["train_mean_abs"] > 0


def test_tensorboard_holds_scalars_by_update_and_histograms_of_blocks(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(images, tmp_path, "--epochs", "1", "--tensorboard", "--log-interval", "2")
    board = EventAccumulator(str(folder)).Reload()
    assert {"train_loss", "eval_top1", "step/loss", "step/lr", "train_peak_abs/blocks.0"} <= set(
        board.Tags()["scalars"]
    )
    assert {"train_abs_activation/blocks.1", "eval_abs_activation/blocks.1"} <= set(board.Tags()["histograms"])
    assert [event.step for event in board.Scalars("step/loss")] == [2, 4, 6, 7]


def test_fp8_health_is_reported_every_so_many_updates(images, tmp_path):
    settings = ("--epochs", "1", "--fp8", "emulated", "--fp8-health-interval", "3")
    folder = train(images, tmp_path, *settings)
    found = rows(folder, "fp8_health.jsonl")
    assert {row["update"] for row in found} == {0, 3, 6}
    assert {row["tensor"] for row in found} == {"x", "w", "dy"}


def test_fp8_health_without_fp8_is_refused(images, tmp_path, capsys):
    assert main(command(images, tmp_path, "--fp8-health-interval", "3")) == 1
    assert "--fp8 auto" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "v0"])
def test_augmentation_at_its_strongest_keeps_no_bit_of_an_image_whatever_pillow_says(policy, images, tmp_path):
    session = session_of(images, tmp_path, "--aa", policy)
    augment = session.data.replay.loader.dataset.transform
    random.seed(0)
    for _ in range(200):
        augment(Image.new("RGB", (32, 32), "white"))
    posterizing = [NAME_TO_OP[name] for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")]
    assert posterizing == [posterize] * 3  # for everybody else, timm is as it was


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("bits", range(9))
def test_posterizing_keeps_the_highest_bits(bits, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3) if mode == "RGB" else (4, 5), dtype=np.uint8)
    kept = np.asarray(data._posterize(Image.fromarray(pixels), bits))
    assert np.array_equal(kept, pixels >> (8 - bits) << (8 - bits))


def test_a_missing_wandb_is_a_clear_error(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tweo_timm.train.build.importlib.util.find_spec", lambda name: None)
    assert main(command(images, tmp_path, "--log-wandb")) == 1
    assert "pip install wandb" in capsys.readouterr().err


def test_wandb_gets_the_rows_of_the_summary(images, tmp_path, monkeypatch):
    import sys
    import types

    calls = []
    run = types.SimpleNamespace(log=calls.append, finish=lambda: calls.append("finish"))
    module = types.SimpleNamespace(init=lambda **kwargs: (calls.append(kwargs), run)[1], __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", module)
    words = ("--log-wandb", "--wandb-project", "tweo", "--wandb-tags", "a", "b", "--wandb-resume-id", "x1")
    train(images, tmp_path, "--epochs", "1", *words)
    started, row, end = calls
    assert (started["project"], started["name"], started["tags"]) == ("tweo", "run", ["a", "b"])
    assert (started["id"], started["resume"]) == ("x1", "must")
    assert started["config"]["batch_size"] == 8
    assert row["epoch"] == 0
    assert "eval_top1" in row
    assert end == "finish"


def test_input_batches_are_saved_at_each_log_line(images, tmp_path):
    folder = train(images, tmp_path, "--epochs", "1", "--save-images", "--log-interval", "4")
    assert sorted(path.name for path in folder.glob("*.jpg")) == ["train-batch-0-4.jpg", "train-batch-0-7.jpg"]


def test_scheduled_image_sizes_change_the_batches(images, tmp_path):
    sizes = ("--train-img-sizes", "16", "32", "--train-batch-sizes", "8", "4", "--train-batches-per-epoch", "9")
    model = [*VIT[:-6], "dynamic_img_size=True", *VIT[-6:]]
    words = (*sizes, "--variable-batch-loss-scale", "linear")
    session = session_of(images, tmp_path, *words, model=model)
    shapes = [tuple(batch[0].shape) for batch in session.data.train]
    assert len(shapes) == 9
    assert set(shapes) == {(8, 3, 16, 16), (4, 3, 32, 32)}
    assert session.data.loss_scale(8) == pytest.approx(8 / 6)
    train(images, tmp_path, *words, "--epochs", "1", model=model)


def test_an_image_size_that_the_model_does_not_take_is_refused(images, tmp_path, capsys):
    assert main(command(images, tmp_path, "--train-img-sizes", "16", "32")) == 1
    assert "dynamic_img_size" in capsys.readouterr().err


def test_augmentation_splits_feed_the_jsd_loss(images, tmp_path):
    words = ("--aug-splits", "3", "--jsd-loss", "--aa", "augmix-m3-w2", "--resplit", "--reprob", "0.5")
    session = session_of(images, tmp_path, *words)
    batch, _ = next(iter(session.data.train))
    assert tuple(batch.shape) == (24, 3, 32, 32)
    assert type(session.task.criterion).__name__ == "JsdCrossEntropy"
    train(images, tmp_path, *words, "--epochs", "1")


def test_multi_label_targets_come_from_folders_too(images, tmp_path):
    folder = train(images, tmp_path, "--task", "multilabel", "--epochs", "1", "--mixup", "0.3")
    header = (folder / "summary.csv").read_text().splitlines()[0]
    assert "eval_map" in header


def test_a_class_map_names_the_classes_of_a_subset(tmp_path):
    data = write_images(tmp_path / "data", train=24, val=6)
    (tmp_path / "map.txt").write_text("class0\nclass1\n")
    session = session_of(data, tmp_path, "--class-map", str(tmp_path / "map.txt"))
    assert session.data.class_names == {"class0": 0, "class1": 1}
    assert len(session.data.train.dataset) == 16


def test_mixup_ends_at_its_epoch(images, tmp_path):
    for extra in ([], ["--no-prefetcher"]):
        session = session_of(images, tmp_path, "--mixup", "1.0", "--smoothing", "0", "--mixup-off-epoch", "1", *extra)
        mixed = []
        for epoch in (0, 1):
            session.data.start_epoch(epoch, 1)
            mixed.append(any(((t > 0) & (t < 1)).any() for _, t in session.data.batches()))
        assert mixed == [True, False]


def test_an_epoch_that_is_not_validated_is_kept_for_recovery_only(images, tmp_path):
    settings = ("--epochs", "3", "--val-interval", "2", "--save-epochs", "3", "--checkpoint-hist", "1")
    folder = train(images, tmp_path, *settings)
    lines = (folder / "summary.csv").read_text().splitlines()
    assert lines[0].startswith("epoch,train_loss,eval_loss,eval_top1,eval_top5,lr,train_task_loss")
    assert lines[1].split(",")[3] == ""
    assert lines[2].split(",")[3] != ""
    assert (folder / "recovery-0-7.pth.tar").exists()
    assert (folder / "milestone-3.pth.tar").exists()
    assert len(list(folder.glob("checkpoint-*"))) == 1


def test_without_a_validation_split_the_training_loss_decides(images, tmp_path, interrupt, capsys):
    settings = ("--val-split", "", "--epochs", "3", "--checkpoint-hist", "1", "--resume", "auto")
    interrupt(10)
    assert main(command(images, tmp_path, *settings)) == 143
    folder = train(images, tmp_path, *settings)
    with open(folder / "summary.csv") as file:
        table = list(csv.DictReader(file))
    losses = [float(row["train_loss"]) for row in table]
    assert not any(name.startswith("eval_") and name != "eval_peak_abs" for name in table[0])
    assert load(folder / "model_best.pth.tar")["metric"] == pytest.approx(min(losses))
    printed = json.loads(capsys.readouterr().out.split("--result\n")[1])
    assert printed[-1]["train"]["loss"] == pytest.approx(min(losses[1:]))  # of this process
    assert "validation" not in printed[-1]


def test_images_are_validated_with_the_models_crop_and_normalized_in_its_dtype(images, tmp_path, monkeypatch):
    calls = []
    original = data.create_loader
    monkeypatch.setattr(
        data, "create_loader", lambda *args, **kwargs: (calls.append(kwargs), original(*args, **kwargs))[1]
    )
    session = session_of(images, tmp_path, "--model-dtype", "bfloat16")
    assert [call["img_dtype"] for call in calls] == [torch.bfloat16] * 2
    assert calls[1]["crop_mode"] == session.data_config["crop_mode"]
    batch, _ = next(iter(session.data.val))
    assert batch.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model-dtype", "bfloat16"], torch.bfloat16),
        (["--model-dtype", "bfloat16", "--model-ema-force-fp32"], torch.float32),
        (["--model-dtype", "float16"], torch.float32),
        ([], torch.float32),
    ],
    ids=str,
)
def test_the_average_is_kept_in_a_dtype_that_holds_its_steps(words, expected, images, tmp_path):
    session = session_of(images, tmp_path, *words, "--model-ema", "--seed", "7")
    ema = session.task.get_trainable_module(ema=True)
    assert {p.dtype for p in ema.parameters()} == {expected} == {session.ema_dtype}
    assert ema._sr_generator.initial_seed() == 7


def test_a_float32_average_of_a_bfloat16_model_is_validated_in_float32(images, tmp_path):
    words = ("--model-dtype", "bfloat16", "--model-ema", "--model-ema-force-fp32", "--epochs", "1")
    folder = train(images, tmp_path, *words)
    assert {tensor.dtype for tensor in last(folder)["state_dict_ema"].values()} == {torch.float32}
    assert {tensor.dtype for tensor in last(folder)["state_dict"].values()} == {torch.bfloat16}


def test_the_base_rate_grows_with_the_average_of_several_batch_sizes(images, tmp_path):
    sizes = ["--train-img-sizes", "32", "32", "--train-batch-sizes", "8", "4", "--train-size-probs", "1", "1"]
    words = [word for word in command(images, tmp_path, *sizes, "--opt", "sgd") if word not in ("--lr", "1e-3")]
    session = build_session(parse_train_options(words), World(torch.device("cpu")))
    assert session.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 6 / 256)


def test_the_average_of_a_convnet_shares_its_batch_norm_too(images, tmp_path, monkeypatch):
    shared = []
    monkeypatch.setattr(loop, "distribute_bn", lambda model, size, reduce: shared.append((model, size, reduce)))
    convnet = ["--model", "resnet10t", "--num-classes", "3", "--img-size", "32"]
    session = session_of(images, tmp_path, "--model-ema", model=convnet)
    session.world = World(torch.device("cpu"), distributed=True, size=2)
    loop.Trainer(session, SignalWatch())._share_batch_norm()
    averaged = unwrap_model(session.task.get_eval_model(ema=True))
    assert [(model is session.model, model is averaged) for model, _, _ in shared] == [(True, False), (False, True)]


@pytest.mark.parametrize("layout", ["flat folder", "tar"])
def test_without_validation_the_data_need_no_split(layout, images, tmp_path):
    data_dir = images / "train"
    if layout == "tar":
        data_dir = tmp_path / "train.tar"
        with tarfile.open(data_dir, "w") as tar:
            for path in sorted((images / "train").rglob("*.png")):
                tar.add(path, arcname=str(path.relative_to(images / "train")))
    train(images, tmp_path, "--data-dir", str(data_dir), "--val-split", "", "--epochs", "1")


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")
def test_a_plateau_schedule_begins_its_warm_up_where_the_run_does(images, tmp_path):
    words = ("--sched", "plateau", "--warmup-epochs", "5", "--start-epoch", "3", "--epochs", "4", "--val-interval", "2")
    folder = train(images, tmp_path, *words)
    with open(folder / "summary.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["lr"]) == pytest.approx(1e-5 + 3 / 5 * (1e-3 - 1e-5))


def test_a_milestone_is_validated_whatever_the_interval(images, tmp_path):
    folder = train(images, tmp_path, "--epochs", "3", "--val-interval", "3", "--save-epochs", "1")
    with open(folder / "summary.csv") as file:
        scored = [row["eval_top1"] != "" for row in csv.DictReader(file)]
    assert scored == [True, False, True]
    assert load(folder / "milestone-1.pth.tar")["metric"] is not None


def test_class_statistics_give_the_weights_that_timm_computes_from_them(images, tmp_path):
    stats = tmp_path / "stats.json"
    stats.write_text('{"pos_counts": [4, 2, 1], "num_samples": 8}')
    words = ["--task", "multilabel", "--loss", "bce", "--class-stats", str(stats), "--loss-pos-weight", "neg_pos"]
    words += ["--loss-class-weight", "effective_num", "--loss-weight-power", "0.5"]
    criterion = session_of(images, tmp_path, *words).task.criterion
    _, positive = compute_class_weights([4, 2, 1], 8, method="neg_pos", power=0.5)
    _, weight = compute_class_weights([4, 2, 1], 8, method="effective_num")
    assert torch.equal(criterion.pos_weight, positive)
    assert torch.equal(criterion.weight, weight)


def test_an_overlay_of_the_pretrained_configuration_is_what_timm_makes_of_it(images, tmp_path):
    start = session_of(images, tmp_path).model
    torch.save(start.state_dict(), tmp_path / "weights.pth")
    overlay = ["--pretrained", "--seed", "7", "--pretrained-cfg-overlay", f"file={tmp_path / 'weights.pth'}"]
    session = session_of(images, tmp_path, *overlay, "num_classes=3")
    assert same_tensors(session.model.state_dict(), start.state_dict())
    assert session.model.pretrained_cfg["file"] == str(tmp_path / "weights.pth")


def test_a_lookahead_optimizer_is_synchronised_at_the_end_of_an_epoch(images, tmp_path):
    train(images, tmp_path, "--epochs", "1", "--opt", "lookahead_adamw")


def test_a_metric_that_is_not_measured_is_refused(images, tmp_path, capsys):
    assert main(command(images, tmp_path, "--eval-metric", "map")) == 1
    assert "top1" in capsys.readouterr().err


def test_settings_that_an_optimizer_does_not_take_are_named(images, tmp_path, caplog):
    session_of(images, tmp_path, "--opt", "sgd", "--opt-betas", "0.8", "0.9", "--opt-eps", "1e-8")
    assert "--opt sgd takes no --opt-eps, --opt-betas" in caplog.text
    caplog.clear()
    session_of(images, tmp_path, "--opt", "lookahead_adamw", "--opt-betas", "0.8", "0.9", "--opt-eps", "1e-8")
    assert "takes no" not in caplog.text


def test_head_options_scale_and_fill_the_classifier(images, tmp_path):
    plain = session_of(images, tmp_path).model.head
    head = session_of(images, tmp_path, "--head-init-scale", "0.5", "--head-init-bias", "-2").model.head
    assert torch.equal(head.weight, plain.weight * 0.5)
    assert torch.equal(head.bias, torch.full((3,), -2.0))


def test_pretrained_weights_come_from_a_file_and_adapt_to_the_classes(images, tmp_path):
    weights = session_of(images, tmp_path, "--seed", "7").model.state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    words = ("--pretrained", "--pretrained-path", str(tmp_path / "weights.pth"), "--seed", "8")
    loaded = session_of(images, tmp_path, *words).model.state_dict()
    assert torch.equal(loaded["blocks.0.attn.qkv.weight"], weights["blocks.0.attn.qkv.weight"])


def test_batch_norm_splits_with_the_augmentation(images, tmp_path):
    model = ["--model", "resnet10t", "--num-classes", "3", "--input-size", "3", "32", "32"]
    words = ("--split-bn", "--aug-splits", "2", "--aa", "augmix-m3-w2")
    session = session_of(images, tmp_path, *words, model=model)
    norms = [module for module in session.model.modules() if type(module).__name__ == "SplitBatchNorm2d"]
    assert norms
    train(images, tmp_path, "--epochs", "1", *words, model=model)


def test_a_gpu_that_is_not_there_is_one_message(images, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    words = command(images, tmp_path)
    words[words.index("cpu")] = "cuda"
    assert main(words) == 1
    assert "no usable CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--mixup", "0.5", "-b", "7"], "even --batch-size"),
        (["--train-size-schedule", "progressive"], "--train-img-sizes"),
        (["--aug-splits", "2", "--mixup", "0.2"], "cannot be mixed"),
        (["--aug-splits", "2", "--no-prefetcher"], "prefetcher"),
        (["--target-format", "multihot"], "multilabel"),
        (["--mixup", "0.2", "--mixup-off-epoch", "1", "--use-multi-epochs-loader", "-j", "2"], "leave out one"),
        (["--task", "multilabel", "--kd-model-name", "resnet10t"], "single-label"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words, part, images, tmp_path, capsys):
    assert main(command(images, tmp_path, *words)) == 1
    assert part in capsys.readouterr().err


def test_a_loader_kept_across_epochs_says_what_it_costs(images, tmp_path, caplog):
    train(images, tmp_path, "--use-multi-epochs-loader")
    assert "not interrupted" in caplog.text
