"""validate.py at image sizes that are not those of the training: as timm resizes and builds models, or not at all."""

import argparse

import pytest
import timm
import torch

from tests.evaluate.conftest import make_model, run, save_checkpoint
from tests.evaluate.reference import timm_batch, timm_top1
from tests.models import SWIN, SWIN_ARCH, VIT, VIT_ARCH, tiny_swin
from tweo_timm import record_outliers


@pytest.mark.parametrize("size", [("--img-size", 48), ("--input-size", 1, 48, 48)])
def test_a_size_on_the_command_line_replaces_that_of_the_training_and_keeps_its_channels(
    capsys, common, tmp_path, size
):
    model = timm.create_model("resnet10t", num_classes=3, in_chans=1)
    args = argparse.Namespace(num_classes=3, in_chans=None, input_size=[1, 32, 32], mean=[0.5], std=[0.5])
    path = tmp_path / "last.pth.tar"
    torch.save({"arch": "resnet10t", "args": args, "state_dict": model.state_dict()}, path)
    status, result, err = run(capsys, "--checkpoint", path, *size, *common)
    assert status == 0, err
    assert result["img_size"] == 48


SIZES = [("--img-size", 48), ("--input-size", 3, 48, 48), ("--model-kwargs", "img_size=48")]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_vit_is_resized_for_images_of_another_size_as_timm_resizes_it(capsys, checkpoints, common, photos, size):
    status, result, err = run(capsys, "--checkpoint", checkpoints[0], *size, *common)
    assert status == 0, err
    top1, summary = timm_top1(checkpoints[0], photos, size=48)
    assert result["img_size"] == 48
    assert result["top1"] == pytest.approx(top1, abs=1e-3)
    assert result["peak_abs"] == pytest.approx(summary["peak_abs"], rel=1e-6)


@pytest.mark.parametrize("trained_at", [224, 48])
def test_weights_alone_fit_at_their_architectures_size_and_at_the_one_asked_for(capsys, common, tmp_path, trained_at):
    path = tmp_path / "weights.pth"
    torch.save(make_model(0, img_size=trained_at).state_dict(), path)
    kwargs = [f"{name}={value}" for name, value in VIT.items() if name != "img_size"]
    words = ["--model", VIT_ARCH, "--num-classes", 3, "--img-size", 48, "--model-kwargs", *kwargs]
    status, result, err = run(capsys, "--checkpoint", path, *words, *common)
    assert status == 0, err
    assert result["img_size"] == 48


def test_a_model_that_cannot_be_resized_says_so(capsys, common, tmp_path):
    path = tmp_path / "weights.pth"
    mixer = timm.create_model("mixer_s32_224", num_classes=3, img_size=32)
    args = argparse.Namespace(num_classes=3, model_kwargs={"img_size": 32})
    torch.save({"arch": "mixer_s32_224", "args": args, "state_dict": mixer.state_dict()}, path)
    status, _, err = run(capsys, "--checkpoint", path, "--img-size", 64, *common)
    assert status == 1
    assert "built for images of 32x32" in err


UNSIZED = {name: value for name, value in SWIN.items() if name != "img_size"}


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("alone", [False, True], ids=["checkpoint", "weights alone"])
def test_a_swin_is_built_for_the_images_as_timm_builds_it(size, alone, capsys, common, photos, tmp_path):
    weights = tiny_swin(seed=3, num_classes=3).state_dict()
    args = argparse.Namespace(num_classes=3, model_kwargs=UNSIZED, img_size=32, crop_pct=1.0)
    torch.save(weights if alone else {"arch": SWIN_ARCH, "args": args, "state_dict": weights}, tmp_path / "swin.pth")
    model = tiny_swin(num_classes=3, img_size=size).eval()
    model.load_state_dict(weights)
    with torch.no_grad(), record_outliers(model) as record:
        model(timm_batch(model, photos, size)[0])
    words = ["--model", SWIN_ARCH, "--num-classes", 3, "--crop-pct", 1.0, "--model-kwargs"]
    words += [f"{name}={str(value).replace(' ', '')}" for name, value in UNSIZED.items()]
    words += ["--img-size", size] if alone or size != 32 else []
    status, result, err = run(capsys, "--checkpoint", tmp_path / "swin.pth", *words, *common)
    assert status == 0, err
    assert result["peak_abs"] == pytest.approx(record.summary()["peak_abs"], rel=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning:timm")  # while it resizes tables of positions
def test_a_size_that_a_model_cannot_take_is_one_line(capsys, common, tmp_path):
    sizes = {"img_size": 64, "embed_dim": (32, 32), "depths": (1, 1)}
    model = timm.create_model("maxvit_tiny_rw_224", num_classes=3, **sizes)
    path = save_checkpoint(tmp_path / "max" / "last.pth.tar", model, arch="maxvit_tiny_rw_224")
    content = torch.load(path, weights_only=False)
    content["args"].model_kwargs, content["args"].input_size = sizes, None
    torch.save(content, path)
    status, _, err = run(capsys, "--checkpoint", path, "--img-size", 100, *common)
    assert status == 1
    assert "maxvit_tiny_rw_224 does not accept images of 100x100" in err
    assert "Traceback" not in err
