"""tweo-repair: what it writes is loaded by plain timm and computes what the checkpoint did; else nothing is written."""

import argparse
import json
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.rewrite.families import FAMILIES, make_images, make_model
from tests.rewrite.test_rotate import relative
from tweo_timm.repair.cli import main
from tweo_timm.rewrite.features import RotatedFeatures

_SIZES = ["img_size=16", "patch_size=8", "embed_dim=24", "depth=2", "num_heads=2"]


def arguments(family, path, out, *more):
    arch, kwargs = FAMILIES[family]
    words = [f"{key}={value}" for key, value in kwargs.items() if key != "num_classes"]
    return ["--model", arch, "--model-kwargs", *words, "--checkpoint", str(path), "--output", str(out), *more]


def saved(family, tmp_path, **overrides):
    model = make_model(family, dtype=torch.float32, **overrides)
    torch.save(model.state_dict(), tmp_path / "in.pth")
    return model


def rebuilt(family, out, **overrides):
    arch, kwargs = FAMILIES[family]
    return timm.create_model(arch, checkpoint_path=str(out), **{"num_classes": 10, **kwargs, **overrides})


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for split in ("train", "val"):
        for index in range(6):
            target = folder / split / f"class{index % 2}"
            target.mkdir(parents=True, exist_ok=True)
            noise = torch.randint(0, 256, (20, 24, 3), generator=torch.Generator().manual_seed(index)).byte()
            Image.fromarray(noise.numpy()).save(target / f"{index}.png")
    return folder


@pytest.mark.parametrize("family", ["vit", "dinov2 giant", "siglip", "distilled", "swin", "eva02", "dinov3", "cait"])
def test_plain_timm_loads_the_output_and_it_computes_the_same(family, tmp_path, caplog):
    caplog.set_level("INFO")
    model = saved(family, tmp_path)
    out = tmp_path / "new" / "out.safetensors"
    assert main(arguments(family, tmp_path / "in.pth", out)) == 0
    assert f"The folder of --output {out} is not there, and will be made" in caplog.text
    assert relative(model, rebuilt(family, out), make_images(family).float()) < 1e-5
    assert not torch.equal(load_file(out)["patch_embed.proj.weight"], model.patch_embed.proj.weight) or "swin" in family
    assert sorted(path.name for path in out.parent.iterdir()) == ["config.json", "out.md", "out.safetensors"]


def test_the_file_says_what_it_is_and_a_folder_is_enough_to_load_it(tmp_path, caplog):
    caplog.set_level("INFO")
    model = saved("vit", tmp_path)
    out = tmp_path / "new" / "model.safetensors"
    assert main(arguments("vit", tmp_path / "in.pth", out, "--method", "hadamard", "--seed", "3")) == 0
    with safe_open(out, "pt") as file:
        record = json.loads(file.metadata()["tweo_timm"])
    assert (record["method"], record["seed"]) == ("hadamard", 3)
    assert record["output_error"] < 1e-5
    assert len(record["source"]["sha256"]) == 64
    assert len(record["rotations"]["blocks"]) == 16
    loaded = timm.create_model(f"local-dir:{out.parent}", pretrained=True)
    assert relative(model, loaded, make_images("vit").float()) < 1e-5
    card = out.with_suffix(".md").read_text()
    assert len([line for line in card.splitlines() if line]) <= 10
    assert "vit_tiny_patch16_224" in card
    (line,) = [line for line in card.splitlines() if line.startswith("Largest activation of the residual stream ")]
    assert ", of the norms that read it " in line
    assert line in caplog.text


def test_averaged_weights_are_taken_and_what_is_dropped_is_said(tmp_path, caplog):
    raw, averaged = make_model("vit", 0, torch.float32), make_model("vit", 1, torch.float32)
    arch, kwargs = FAMILIES["vit"]
    args = argparse.Namespace(model=arch, num_classes=10, model_kwargs=kwargs, img_size=None)
    content = {"state_dict": raw.state_dict(), "state_dict_ema": averaged.state_dict(), "optimizer": {"state": {}}}
    torch.save({"arch": arch, "args": args, "epoch": 3, **content}, tmp_path / "last.pth.tar")
    out = tmp_path / "out.safetensors"
    with caplog.at_level("INFO"):
        assert main(["--checkpoint", str(tmp_path / "last.pth.tar"), "--output", str(out)]) == 0
    assert "state_dict_ema" in caplog.text
    assert "optimizer" in caplog.text
    assert relative(averaged, rebuilt("vit", out), make_images("vit").float()) < 1e-5


def test_learned_from_images(tmp_path, photos):
    model = saved("deit3", tmp_path)
    out = tmp_path / "out.safetensors"
    more = ["--method", "learned", "--data-dir", str(photos), "--images", "5", "-b", "2"]
    assert main(arguments("deit3", tmp_path / "in.pth", out, *more)) == 0
    assert relative(model, rebuilt("deit3", out), make_images("deit3").float()) < 1e-5


def test_settings_come_from_a_file_too(tmp_path, capsys):
    saved("vit", tmp_path)
    arch, kwargs = FAMILIES["vit"]
    settings = {"model": arch, "model_kwargs": kwargs, "checkpoint": str(tmp_path / "in.pth"), "method": "hadamard"}
    (tmp_path / "repair.yaml").write_text(json.dumps({**settings, "output": str(tmp_path / "out.safetensors")}))
    assert main(["-c", str(tmp_path / "repair.yaml"), "--print-config"]) == 0
    assert "hadamard" in capsys.readouterr().out
    assert main(["-c", str(tmp_path / "repair.yaml")]) == 0
    assert (tmp_path / "out.safetensors").exists()


def test_bfloat16_stays_unless_asked_otherwise(tmp_path):
    weights = make_model("vit", dtype=torch.bfloat16).state_dict()
    save_file(weights, tmp_path / "in.safetensors")
    for more, dtype in ((), torch.bfloat16), (("--dtype", "float32"), torch.float32):
        out = tmp_path / "out.safetensors"
        assert main(arguments("vit", tmp_path / "in.safetensors", out, *more)) == 0
        assert {value.dtype for value in load_file(out).values()} == {dtype}


def test_features_without_a_head(tmp_path, capsys):
    model, images = saved("dinov2", tmp_path, num_classes=0), make_images("dinov2").float()
    out = tmp_path / "out.safetensors"
    assert main(arguments("dinov2", tmp_path / "in.pth", out)) == 1
    assert "no head" in capsys.readouterr().err
    assert not out.exists()
    assert main(arguments("dinov2", tmp_path / "in.pth", out, "--as-head")) == 0
    assert relative(model, rebuilt("dinov2", out, num_classes=24), images) < 1e-5
    assert main(arguments("dinov2", tmp_path / "in.pth", out, "--allow-rotated-features")) == 0
    rotated = rebuilt("dinov2", out, num_classes=0).eval()
    features = RotatedFeatures.load(tmp_path / "out.rotation.safetensors")
    with torch.no_grad():
        assert torch.allclose(features.unrotate(rotated(images)), model.eval()(images), atol=1e-3)


REFUSED = {
    "no checkpoint": (lambda path: ["--output", "o.safetensors"], "--checkpoint is missing"),
    "absent": (lambda path: ["--checkpoint", "no.pth", "--output", "o.safetensors"], "does not exist"),
    "suffix": (lambda path: ["--checkpoint", str(path), "--output", "o.pth"], r"ends in \.safetensors"),
    "no name": (lambda path: ["--checkpoint", str(path), "--output", "o.safetensors"], "does not say its architecture"),
    "learned": (lambda path: arguments("vit", path, "o.safetensors", "--method", "learned"), "--data-dir"),
    "does not fit": (lambda path: arguments("deit3", path, "o.safetensors"), "do not fit"),
    "unknown": (lambda path: ["--model", "vit_tinny_patch16_224", *arguments("vit", path, "o.safetensors")[2:]], "did"),
    "no device": (lambda path: arguments("vit", path, "o.safetensors", "--device", "cuda:77"), "--device cuda:77"),
    "two ways": (
        lambda path: arguments("vit", path, "o.safetensors", "--as-head", "--allow-rotated-features"),
        "choose one",
    ),
    "has a head": (lambda path: arguments("vit", path, "o.safetensors", "--as-head"), "has a head"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_remedy_and_leave_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved("vit", tmp_path)
    words, reason = REFUSED[name]
    assert main(words(tmp_path / "in.pth")) == 1
    import re

    assert re.search(reason, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


def test_a_checkpoint_of_a_clipped_softmax_is_refused_because_plain_timm_computes_another(tmp_path, capsys):
    args = argparse.Namespace(clipped_softmax=0.5)
    torch.save({"state_dict": saved("vit", tmp_path).state_dict(), "args": args}, tmp_path / "in.pth")
    assert main(arguments("vit", tmp_path / "in.pth", tmp_path / "o.safetensors")) == 1
    assert "trained with --clipped-softmax 0.5, which plain timm does not compute" in capsys.readouterr().err


def test_a_damaged_file_is_one_line(tmp_path, capsys):
    (tmp_path / "in.pth").write_bytes(b"PK\3\4 no checkpoint")
    assert main(arguments("vit", tmp_path / "in.pth", tmp_path / "o.safetensors")) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_output_that_would_differ_is_not_written(tmp_path, monkeypatch, capsys):
    """The comparison is of what plain timm loads, not of what is in memory."""
    import tweo_timm.repair.output as output

    saved("vit", tmp_path)
    write = output.save_file

    def damaged(tensors, path, metadata):
        write({**tensors, "head.bias": tensors["head.bias"] + 1}, path, metadata)

    monkeypatch.setattr(output, "save_file", damaged)
    assert main(arguments("vit", tmp_path / "in.pth", tmp_path / "out.safetensors")) == 1
    assert "would differ" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


def test_the_module_is_the_command_and_help_is_quick_to_ask_for():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tweo_timm.rewrite", "-h"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--allow-rotated-features" in done.stdout
    assert " torch\n" not in done.stderr
