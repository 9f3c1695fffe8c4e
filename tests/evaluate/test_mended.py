"""A file of tweo-repair says how it was built, and is validated as its original: model, images and class names."""

import pytest

from tests.evaluate.conftest import ARCH, make_model, run, save_checkpoint
from tweo_timm.repair.cli import main as repair


@pytest.fixture
def pair(tmp_path):
    """A checkpoint that knows its classes, and its mended file."""
    names = ["ant", "bee", "cat"]
    original = save_checkpoint(tmp_path / "run" / "last.pth.tar", make_model(0), class_names=names)
    mended = tmp_path / "mended" / "out.safetensors"
    assert repair(["--model", ARCH, "--checkpoint", str(original), "--output", str(mended)]) == 0
    return original, mended


def test_it_needs_no_more_than_its_original_and_scores_the_same(pair, common, capsys):
    capsys.readouterr()
    status, results, err = run(capsys, "--checkpoint", *pair, *common)
    assert status == 0, err
    assert [(one["crop_pct"], one["img_size"]) for one in results] == [(1.0, 32)] * 2
    assert results[0]["top1"] == results[1]["top1"]


def test_classes_in_another_order_are_refused_for_it_too(pair, common, photos, tmp_path, capsys):
    renamed = tmp_path / "data" / "validation"
    renamed.mkdir(parents=True)
    for name, folder in (("z", "ant"), ("bee", "bee"), ("cat", "cat")):
        (renamed / name).symlink_to(photos / "validation" / folder)
    capsys.readouterr()
    words = [tmp_path / "data" if word == photos else word for word in common]
    status, _, err = run(capsys, "--checkpoint", pair[1], *words)
    assert status == 1
    assert "'ant'" in err
