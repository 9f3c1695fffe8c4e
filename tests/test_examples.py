"""The examples run, and do what they show."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from tests.models import penalty
from tweo_timm import Tweo, TweoConfig
from tweo_timm.photos import write_photo_crops

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def dino():
    spec = importlib.util.spec_from_file_location("dino", EXAMPLES / "dino.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_self_distillation_is_shorter_than_a_hundred_lines_and_trains(dino, tmp_path, monkeypatch):
    assert len((EXAMPLES / "dino.py").read_text().splitlines()) < 100
    few = write_photo_crops(tmp_path, train=5, validation=2)
    monkeypatch.setattr(dino, "write_photo_crops", lambda *args: few)
    rows = list(dino.main(["--data-dir", str(tmp_path), "--updates", "2", "--tweo-weight", "0.5"]))
    assert [sorted(row) for row in rows] == [["loss", "peak", "penalty"]] * 2 + [["nearest_neighbour", "peak"]]
    assert all(row["loss"] > 0 and row["penalty"] > 0 for row in rows[:2])
    assert rows[-1]["nearest_neighbour"] > 1 / 14


def test_its_penalty_is_that_of_the_students_four_passes_and_not_of_the_teachers(dino):
    student, config = dino.make_student(), TweoConfig(weight=0.5, tau=0.5)
    tweo, twin = Tweo(student, config), copy.deepcopy(student)
    teacher = copy.deepcopy(student)
    views = [torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size)) for size in (32, 32, 16, 16)]
    _, found, _ = dino.losses(student, teacher, tweo, views, torch.zeros(dino.PROTOTYPES))
    kept = []
    for block in twin.blocks:
        block.register_forward_hook(lambda module, args, output: kept.append(output))
    passes = []
    for view in views:
        twin(view)
        passes.append(penalty(kept, config))
        kept.clear()
    assert found.item() == pytest.approx(0.5 * torch.stack(passes).mean().item(), rel=1e-6)
