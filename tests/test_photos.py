"""The quickstart's images and its driver."""

import json

import numpy as np
import pytest
from PIL import Image

from tweo_timm import quickstart
from tweo_timm.photos import CROP, TILE, main, photographs, write_photo_crops
from tweo_timm.run.shipped import recipe_names


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return write_photo_crops(tmp_path_factory.mktemp("photos"), train=3, validation=2)


def tiles_holding(crop, photo):
    """Tiles of the photograph in which the crop is found, pixel by pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(photo[..., 0], (CROP, CROP))
    rows, columns = np.nonzero((windows[:, :, 0, 0] == crop[0, 0, 0]) & (windows[:, :, -1, -1] == crop[-1, -1, 0]))
    places = [(x, y) for y, x in zip(rows, columns, strict=True) if (photo[y : y + CROP, x : x + CROP] == crop).all()]
    return [(x // TILE, y // TILE) for x, y in places if x // TILE == (x + CROP - 1) // TILE]


def test_every_photograph_gives_both_splits_their_crops(crops):
    names = sorted(photographs())
    assert len(names) == 14
    for split, count in (("train", 3), ("validation", 2)):
        assert sorted(path.name for path in (crops / split).iterdir()) == names
        for name in names:
            files = list((crops / split / name).iterdir())
            assert len(files) == count
            assert all(Image.open(file).size == (CROP, CROP) for file in files)


@pytest.mark.parametrize("name", ["astronaut", "cat", "temple"])
def test_validation_crops_come_from_tiles_that_training_never_sees(crops, name):
    photo = np.asarray(photographs()[name])
    for split in ("train", "validation"):
        for file in (crops / split / name).iterdir():
            tiles = tiles_holding(np.asarray(Image.open(file)), photo)
            assert tiles
            assert all(((i + 2 * j) % 4 == 0) == (split == "validation") for i, j in tiles)


def test_same_crops_are_not_written_twice_and_a_strangers_folder_is_left_alone(crops, tmp_path):
    marker = crops / "photos.json"
    before = marker.stat().st_mtime_ns
    write_photo_crops(crops, train=3, validation=2)
    assert marker.stat().st_mtime_ns == before
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(ValueError, match="holds other files"):
        write_photo_crops(tmp_path)


def test_another_choice_of_crops_replaces_the_one_before_even_where_that_was_never_finished(tmp_path):
    write_photo_crops(tmp_path, train=3, validation=2)
    (tmp_path / "photos.json").write_text("{}")
    write_photo_crops(tmp_path, train=1, validation=1)
    assert len(list(tmp_path.glob("*/*/*.png"))) == 2 * 14


def test_photos_are_a_command_of_their_own(tmp_path, capsys):
    folder = tmp_path / "photos"
    assert main([str(folder), "--train", "1", "--validation", "2"]) == 0
    assert len(list(folder.glob("train/*/*.png"))) == 14
    assert len(list(folder.glob("validation/*/*.png"))) == 28
    assert str(folder) in capsys.readouterr().out
    assert main([str(folder), "--train", "0"]) == 1
    assert "1 or more" in capsys.readouterr().err


def test_quickstart_runs_every_recipe_once_a_seed_and_compares_all(monkeypatch, tmp_path, capsys):
    commands = []
    monkeypatch.setattr(quickstart, "run_command", commands.append)
    monkeypatch.setattr(quickstart, "write_photo_crops", lambda folder: folder)
    report = tmp_path / "report"
    report.mkdir()
    header = "name,top1,training_peak_abs,peak_abs\n"
    rows = "".join(f"{run}{seed},{80 + n},30,20\n" for run in quickstart.RUNS for n, seed in enumerate(("", "_seed1")))
    (report / "report.csv").write_text(header + rows)
    for name in quickstart.RUNS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.yaml").write_text("amp: true\namp_dtype: bfloat16\n")
    assert quickstart.main(["--output", str(tmp_path), "--seeds", "0", "1"]) == 0
    trained = [command for command in commands if command[0] == "train"]
    assert len(trained) == 8
    assert {command[2] for command in trained} <= set(recipe_names())
    (validated,) = (command for command in commands if command[0] == "evaluate")
    assert sum(word.endswith("last.pth.tar") for word in validated) == 8
    shown = capsys.readouterr().out
    assert "| stress_tweo | 2 | 80.5 (80.0 to 81.0) |" in shown
    assert "Training 8 of 8, about 0 s left: stress_tweo_seed1" in shown
    assert "Trained in bfloat16 autocast on " in shown


def test_failing_step_stops_the_quickstart_with_its_status(capfd):
    with pytest.raises(SystemExit) as stop:
        quickstart.run_command(["train", "--no-such-flag"])
    assert stop.value.code == 2
    assert "failed with status 2" in capfd.readouterr().err


def test_wrong_folder_is_one_message(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "other.txt").write_text(json.dumps(1))
    assert quickstart.main(["--output", str(tmp_path)]) == 1
    assert "holds other files" in capsys.readouterr().err
