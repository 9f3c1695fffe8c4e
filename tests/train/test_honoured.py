"""No flag is silently ignored: each is read where it acts, read by timm, or refused with a reason."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from timm.data import resolve_data_config
from timm.optim import optimizer_kwargs
from timm.scheduler import scheduler_kwargs

import tweo_timm.run
import tweo_timm.train
from tests.train.runs import command, same_tensors, session_of, train
from tweo_timm.train.cli import main
from tweo_timm.train.options import TrainOptions

# Files that define and check flags, but act on none.
DECLARING = {"checks.py", "flags.py", "legacy.py", "rules.py"}
REFUSED = {
    "torchscript": ["--torchscript"],
    "fuser": ["--fuser", "te"],
    "tta": ["--tta", "2"],
    "drop_connect": ["--drop-connect", "0.1"],
    "naflex_loader": ["--naflex-loader"],
    "persistent_workers": ["--persistent-workers"],
}


# Read before there are options: by the parser, and by timm from the environment that torchrun sets.
OF_THE_PARSER = {"config", "config_unknown", "data", "local_rank", "list_recipes", "device_modules"}


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


def read_by_timm_and_by_components():
    values = Listening({field.name: getattr(TrainOptions(), field.name) for field in dataclasses.fields(TrainOptions)})
    optimizer_kwargs(cfg=values)
    scheduler_kwargs(values)
    resolve_data_config(values, pretrained_cfg={"input_size": (3, 32, 32)})
    TrainOptions.tweo_config(values)
    TrainOptions.fp8_recipe(values)
    TrainOptions.side_config(values, 0.0, 0.0)
    return values.read


def test_every_flag_is_read_or_refused():
    folders = [Path(package.__file__).parent for package in (tweo_timm.train, tweo_timm.run)]
    files = [path for folder in folders for path in folder.glob("*.py") if path.name not in DECLARING]
    source = "".join(path.read_text() for path in files)
    read = (
        set(re.findall(r"\b(?:options|self\._options)\.(\w+)", source))
        | read_by_timm_and_by_components()
        | OF_THE_PARSER
    )
    of_naflex = {field.name for field in dataclasses.fields(TrainOptions) if field.name.startswith("naflex_")}
    assert {field.name for field in dataclasses.fields(TrainOptions)} - read - of_naflex - REFUSED.keys() == set()


@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_honoured_is_refused_before_anything_is_written(words, images, tmp_path, capsys):
    assert main(command(images, tmp_path, *words)) == 1
    assert words[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_fp8_health_without_fp8_is_refused(images, tmp_path, capsys):
    assert main(command(images, tmp_path, "--fp8-health-interval", "3")) == 1
    assert "--fp8 auto" in capsys.readouterr().err


def test_a_missing_wandb_is_a_clear_error(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tweo_timm.train.build.importlib.util.find_spec", lambda name: None)
    assert main(command(images, tmp_path, "--log-wandb")) == 1
    assert "pip install wandb" in capsys.readouterr().err


def test_an_overlay_of_the_pretrained_configuration_is_what_timm_makes_of_it(images, tmp_path):
    start = session_of(images, tmp_path).model
    torch.save(start.state_dict(), tmp_path / "weights.pth")
    overlay = ["--pretrained", "--seed", "7", "--pretrained-cfg-overlay", f"file={tmp_path / 'weights.pth'}"]
    session = session_of(images, tmp_path, *overlay, "num_classes=3")
    assert same_tensors(session.model.state_dict(), start.state_dict())
    assert session.model.pretrained_cfg["file"] == str(tmp_path / "weights.pth")


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
