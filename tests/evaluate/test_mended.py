"""A file of tweo-repair says how it was built, and is validated as its original: model, images and class names."""

import random

import pytest
from safetensors.torch import load_file, save_file

from tests.evaluate.conftest import make_model, run, save_checkpoint
from tests.models import VIT_ARCH
from tweo_timm.repair.cli import main as repair
from tweo_timm.run.checkpoint_file import read


@pytest.fixture
def pair(tmp_path):
    """A checkpoint that knows its classes, and its mended file."""
    names = ["ant", "bee", "cat"]
    original = save_checkpoint(tmp_path / "run" / "last.pth.tar", make_model(0), class_names=names)
    mended = tmp_path / "mended" / "out.safetensors"
    assert repair(["--model", VIT_ARCH, "--checkpoint", str(original), "--output", str(mended)]) == 0
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


def test_any_flipped_bit_of_a_mended_files_weights_is_found_and_a_strangers_file_is_read_as_it_is(pair, tmp_path):
    whole = pair[1].read_bytes()
    weights = read(pair[1], "weights").weights
    begin = 8 + int.from_bytes(whole[:8], "little")
    flipped, places = tmp_path / "flipped.safetensors", random.Random(0)
    for _ in range(20):
        content = bytearray(whole)
        content[places.randrange(begin, len(whole))] ^= 1 << places.randrange(8)
        flipped.write_bytes(content)
        with pytest.raises(ValueError, match="its checksum does not hold"):
            read(flipped, "weights")
    save_file(load_file(pair[1]), tmp_path / "strange.safetensors")
    assert read(tmp_path / "strange.safetensors", "weights").weights.keys() == weights.keys()


def test_a_changed_record_of_a_mended_file_is_found(pair, tmp_path):
    whole = pair[1].read_bytes()
    assert whole.count(b"random") >= 1
    (tmp_path / "other.safetensors").write_bytes(whole.replace(b"random", b"ransom", 1))
    with pytest.raises(ValueError, match="its checksum does not hold"):
        read(tmp_path / "other.safetensors", "weights")
