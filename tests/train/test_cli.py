"""The command as a whole: help, configuration, compilation, FP8, distillation."""

import subprocess
import sys

import pytest
import torch
import yaml

from tests.models import tiny_vit
from tests.train.runs import command, last, rows, same_tensors, train
from tweo_timm.train.cli import main


def test_help_comes_without_waiting_for_torch():
    code = (
        "import sys, tweo_timm.train.cli as cli\n"
        "try: cli.main(['-h'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "--tweo-weight" in found.stdout


def test_print_config_shows_the_run_and_starts_nothing(images, tmp_path, capsys):
    assert main([*command(images, tmp_path, "--tweo-weight", "0.3"), "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["tweo_weight"] == 0.3
    assert not list(tmp_path.iterdir())


def test_args_yaml_of_a_run_is_the_same_run_again(images, tmp_path):
    first = train(images, tmp_path, "--tweo-weight", "0.3", "--mixup", "0.2", "--epochs", "1", name="first")
    assert main(["-c", str(first / "args.yaml"), "--experiment", "second"]) == 0
    assert same_tensors(last(tmp_path / "second")["state_dict"], last(first)["state_dict"])


def test_the_checkpoint_is_plain_timm(images, tmp_path):
    folder = train(images, tmp_path, "--epochs", "1", "--fp8", "emulated", "--tweo-weight", "0.1", "--model-ema")
    model = tiny_vit(num_classes=3, checkpoint_path=str(folder / "last.pth.tar"))
    ema = last(folder)["state_dict_ema"]
    assert all(torch.equal(value, ema[key]) for key, value in model.state_dict().items())


def test_img_size_says_how_large_the_model_is_built(images, tmp_path):
    sizes = ["patch_size=8", "embed_dim=32", "depth=2", "num_heads=2"]
    model = ["--model", "vit_tiny_patch16_224", "--num-classes", "3", "--img-size", "48", "--model-kwargs", *sizes]
    folder = train(images, tmp_path, "--epochs", "1", model=model)
    assert last(folder)["state_dict"]["pos_embed"].shape == (1, 1 + 6 * 6, 32)


def test_a_size_that_the_model_cannot_take_is_one_line(images, tmp_path, capsys):
    sizes = ["embed_dim=(32,32)", "depths=(1,1)"]
    model = ["--model", "maxvit_tiny_rw_224", "--num-classes", "3", "--img-size", "100", "--model-kwargs", *sizes]
    assert main(command(images, tmp_path, model=model)) == 1
    assert "maxvit_tiny_rw_224 does not accept images of 100x100" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_fp8_scales_survive_an_interruption(scaling, images, tmp_path, interrupt):
    settings = ("--fp8", "emulated", "--fp8-scaling", scaling, "--epochs", "2", "--fp8-health-interval", "2")
    whole = train(images, tmp_path, *settings, name="whole")
    words = command(images, tmp_path, *settings, "--resume", "auto", name="cut")
    interrupt(9)
    assert main(words) == 143
    assert main(words) == 0
    assert same_tensors(last(tmp_path / "cut")["exact"]["processes"], last(whole)["exact"]["processes"])
    assert same_tensors(last(tmp_path / "cut")["state_dict"], last(whole)["state_dict"])
    assert rows(tmp_path / "cut", "fp8_health.jsonl") == rows(whole, "fp8_health.jsonl")


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo, where recording leaves the graph
@pytest.mark.parametrize("more", [pytest.param([], marks=pytest.mark.slow), ["--grad-checkpointing"]], ids=str)
def test_a_compiled_run_sees_the_same_outliers(more, images, tmp_path, dynamo):
    settings = ("--epochs", "1", "--tweo-weight", "0.2", "--tweo-tau", "0.5", "--outlier-interval", "3", *more)
    eager = train(images, tmp_path, *settings, name="eager")
    compiled = train(images, tmp_path, *settings, "--torchcompile", "aot_eager", "--model-ema", name="compiled")
    for ours, theirs in zip(rows(compiled), rows(eager), strict=True):
        for key in ("train_peak_abs", "train_kurtosis"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
    for key, value in last(eager)["state_dict"].items():
        torch.testing.assert_close(last(compiled)["state_dict"][key], value, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_average_continues_bit_for_bit(images, tmp_path, interrupt):
    settings = ("--model-dtype", "bfloat16", "--model-ema", "--model-ema-decay", "0.9", "--opt", "sgd")
    whole = train(images, tmp_path, *settings, name="whole")
    words = command(images, tmp_path, *settings, "--resume", "auto", name="cut")
    interrupt(9)
    assert main(words) == 143
    assert main(words) == 0
    assert same_tensors(last(tmp_path / "cut")["state_dict_ema"], last(whole)["state_dict_ema"])


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")
def test_a_plateau_schedule_continues_with_its_memory(images, tmp_path, interrupt):
    settings = ("--sched", "plateau", "--patience-epochs", "1", "--epochs", "3")
    whole = train(images, tmp_path, *settings, name="whole")
    words = command(images, tmp_path, *settings, "--resume", "auto", name="cut")
    interrupt(9)
    assert main(words) == 143
    assert main(words) == 0
    assert same_tensors(last(tmp_path / "cut")["optimizer"], last(whole)["optimizer"])


def test_autocast_of_a_low_precision_model_is_refused(images, tmp_path, capsys):
    assert main(command(images, tmp_path, "--amp", "--model-dtype", "bfloat16")) == 1
    assert "--amp" in capsys.readouterr().err


def test_a_model_without_blocks_trains_without_statistics_but_not_with_tweo(images, tmp_path, capsys):
    model = ["--model", "resnet10t", "--num-classes", "3", "--input-size", "3", "32", "32"]
    folder = train(
        images, tmp_path, "--epochs", "1", "--amp", "--amp-dtype", "bfloat16", "--channels-last", model=model
    )
    assert not rows(folder)
    assert main(command(images, tmp_path, "--tweo-weight", "0.1", model=model)) == 1
    assert "block" in capsys.readouterr().err
