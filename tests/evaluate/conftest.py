"""A folder of small noise images and two checkpoints of the same tiny ViT, made once, and the command that is run."""

import argparse
import json

import numpy as np
import pytest
import torch

from tests.images import noise, write
from tests.models import VIT, VIT_ARCH, tiny_vit
from tweo_timm.evaluate.cli import main


def make_model(seed, **kwargs):
    return tiny_vit(seed, **{"num_classes": 3, **kwargs}).eval()


def save_checkpoint(path, model, **entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    args = argparse.Namespace(model=VIT_ARCH, num_classes=3, model_kwargs=VIT, input_size=[3, 32, 32], crop_pct=1.0)
    content = {"epoch": 1, "arch": VIT_ARCH, "version": 2, "args": args, "state_dict": model.state_dict()}
    torch.save(content | entries, path)
    return path


def run(capsys, *words):
    """Run the command and return its status, its --result and what it said on stderr."""
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    result = json.loads(out.split("--result\n")[-1]) if "--result\n" in out else None
    return status, result, err


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 7)):
        for label in ("ant", "bee", "cat"):
            for number in range(count):
                write(root / split / label / f"{number}.png", noise(rng))
    return root


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    (root / "base").mkdir()
    rows = "".join(
        f'{{"epoch": {epoch}, "block": "blocks.{block}", "train_peak_abs": {peak}}}\n'
        for epoch, block, peak in ((0, 0, 3.0), (0, 1, 5.0), (1, 0, 70.5), (1, 1, 9.0))
    )
    (root / "base" / "outliers.jsonl").write_text(rows)
    lines = ((2, 0, 8, 3.0), (4, 0, 16, 2.5), (6, 1, 8, 1.0))  # update, epoch, samples, mean since the epoch began
    names = ("update", "epoch", "samples", "task_loss")
    losses = "".join(f"{json.dumps(dict(zip(names, line, strict=True)))}\n" for line in lines)
    (root / "base" / "losses.jsonl").write_text(losses + '{"update": "x"}\nno row\n')
    return [
        save_checkpoint(root / name / "last.pth.tar", make_model(seed)) for seed, name in enumerate(("base", "tweo"))
    ]


@pytest.fixture
def common(photos):
    return ["--data-dir", photos, "--device", "cpu", "-j", "0", "-b", "4"]
