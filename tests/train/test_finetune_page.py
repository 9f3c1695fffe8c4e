"""docs/finetune.md: its commands, as they stand there, on photographs."""

import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import yaml
from timm.models import create_model, load_checkpoint

from tweo_timm.evaluate.cli import main as validate
from tweo_timm.photos import write_photo_crops
from tweo_timm.repair.cli import main as repair
from tweo_timm.train.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "finetune.md"
FIVE = ["cat", "coffee", "grass", "rocket", "temple"]
PROGRAMS = {"tweo-train": main, "tweo-validate": validate, "tweo-repair": repair}
HERE = ["--device", "cpu"]  # as the page says for machines without a GPU


def blocks():
    """The indented blocks of the page: the recipe, and the commands."""
    found = re.findall(r"(?:^    .*\n|^\n)+", PAGE.read_text(), re.MULTILINE)
    return [textwrap.dedent(block).strip() for block in found if block.strip()]


def commands():
    lines = "\n".join(block.replace("\\\n", " ") for block in blocks()).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.split(" ")[0] in PROGRAMS]


def prepare(folder, sizes, crops, epochs, base_epochs, monkeypatch):
    """A folder with what the page begins with: photographs of five classes, and weights that know nine others."""
    monkeypatch.chdir(folder)
    photos = write_photo_crops(folder / "all", *crops)
    for split in ("train", "validation"):
        for photo in sorted((photos / split).iterdir()):
            target = folder / ("photos" if photo.name in FIVE else "others") / split / photo.name
            target.parent.mkdir(parents=True, exist_ok=True)
            photo.rename(target)
    recipe = yaml.safe_load(next(block for block in blocks() if block.startswith("# finetune.yaml")))
    recipe |= {"img_size": 32, "model_kwargs": sizes, "epochs": epochs, "warmup_epochs": 0, "workers": 0}
    Path("finetune.yaml").write_text(yaml.safe_dump(recipe))
    train_anew("base", "--num-classes", "9", "--data-dir", "others", "--epochs", str(base_epochs))
    Path("output/train/base/last.pth.tar").rename("base.pth.tar")


def train_anew(name, *more):
    anew = ["--no-pretrained", "--pretrained-path", "", "--layer-decay", "none", "--lr", "2e-3"]
    assert main(["-c", "finetune.yaml", "--experiment", name, *anew, *more, *HERE]) == 0


def run(program, *words):
    assert PROGRAMS[program]([*words, *HERE, *([] if program == "tweo-repair" else ["-j", "0"])]) == 0


def test_its_training_and_its_repair_say_what_they_begin_with_and_end_in_a_plain_timm_model(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    prepare(tmp_path, sizes, (16, 4), 1, 1, monkeypatch)
    train, _, mend, _ = commands()
    run(*train)
    assert "Loaded 30 of 32 tensors from base.pth.tar; these are new: head" in caplog.text
    assert "The head begins anew: the 9 classes of base.pth.tar are not those of the data" in caplog.text
    run(*mend)
    model = create_model("vit_small_patch16_224", **sizes, img_size=32, num_classes=5)
    load_checkpoint(model, "mended.safetensors")


@pytest.mark.slow
def test_its_four_commands_lead_from_own_images_to_checked_int8_files(tmp_path, monkeypatch):
    prepare(tmp_path, {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}, (32, 30), 2, 6, monkeypatch)
    for words in commands():
        run(*words)
    original, mended = json.loads(Path("result/report.json").read_text())["checkpoints"]
    assert original["class_names"] == mended["class_names"] == FIVE
    assert original["top1"] == mended["top1"] > 40  # chance is 20; 66.7 when this was written
    assert [one["scheme"] for one in mended["quantized"]] == ["w8a8-tt", "w8a8-tt+res"]
    assert list(Path("result").rglob("*.onnx"))
