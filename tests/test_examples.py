"""The examples run, and do what they show."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from tests.models import penalty
from tweo_timm import Tweo, TweoConfig
from tweo_timm.photos import write_photo_crops
from tweo_timm.stream import stream_of

EXAMPLES = Path(__file__).parents[1] / "examples"


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dino():
    return loaded("dino")


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


def test_a_language_model_learns_bytes_under_the_penalty_of_its_own_blocks():
    transformers = pytest.importorskip("transformers", reason="pip install '.[transformers]'")
    gpt2 = loaded("gpt2")
    rows = list(gpt2.main(["--updates", "8", "--tweo-weight", "0.5"]))
    assert rows[-1]["loss"] < rows[0]["loss"]
    model, config = transformers.GPT2LMHeadModel(gpt2.CONFIG).train(), TweoConfig(weight=0.5, tau=0.5)
    tweo, kept = Tweo(model, config), []
    for block in model.transformer.h:
        block.register_forward_hook(lambda module, args, output: kept.append(stream_of(output, module)))
    model(torch.arange(32)[None])
    assert float(tweo.penalty().detach()) == pytest.approx(0.5 * float(penalty(kept, config).detach()), rel=1e-5)
    assert next(gpt2.main(["--updates", "1", "--tweo-weight", "0"]))["penalty"] == 0
