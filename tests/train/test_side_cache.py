"""Features from a cache are those of this backbone and these images, whole or not at all."""

import contextlib
import json
import logging
import os
import resource
import shutil
import signal

import numpy as np
import pytest
import torch

from tests.train.runs import (
    TINY,
    command,
    last,
    same_tensors,
    session_of,
    start,
    train,
    train_together,
    wait_until,
)
from tests.train.test_resume import assert_same_run
from tweo_timm.side.cache import FeatureCache
from tweo_timm.side.network import SideNetwork
from tweo_timm.train.cli import main

SIDE = ["--side", "last", "--side-gap", "1", "--side-rank", "4", "--drop-path", "0.1"]


def cached(folder, *words):
    return [*SIDE, "--no-aug", "--side-cache", str(folder), *words]


@pytest.fixture(scope="module")
def cache(images, tmp_path_factory):
    """A cache, and the run that wrote it."""
    root = tmp_path_factory.mktemp("cache")
    return root / "features", train(images, root, *cached(root / "features"))


@pytest.mark.parametrize("kind", ["last", pytest.param("miet", marks=pytest.mark.slow)])
def test_a_run_from_a_cache_is_the_run_from_images(kind, images, tmp_path):
    words = ["--side", kind, *SIDE[2:], "--no-aug", "--opt", "sgd", "--lr", "0.1"]  # AdamW would enlarge rounding
    live = train(images, tmp_path, *words, name="live")
    from_cache = train(images, tmp_path, *words, "--side-cache", str(tmp_path / "features"), name="cache")
    for name, value in last(live)["state_dict"].items():
        torch.testing.assert_close(last(from_cache)["state_dict"][name], value, rtol=1e-5, atol=1e-6)
    assert last(live)["metric"] == last(from_cache)["metric"]


def test_the_backbone_is_not_run_again(cache, images, tmp_path, monkeypatch):
    compute = SideNetwork.features

    def features(self, images):
        assert len(images) == 1, "the backbone was run on more than the blank image that tries its size"
        return compute(self, images)

    session = session_of(images, tmp_path, *cached(cache[0]))
    monkeypatch.setattr(SideNetwork, "features", features)
    assert session.model.from_cache
    again = train(images, tmp_path, *cached(cache[0]))
    assert same_tensors(last(again)["state_dict"], last(cache[1])["state_dict"])


def test_the_size_is_said_before_anything_is_written(images, tmp_path, caplog, monkeypatch):
    written = []
    monkeypatch.setattr(FeatureCache, "begin", lambda self: (written.append(caplog.text), 1 / 0))
    with caplog.at_level(logging.INFO), pytest.raises(ZeroDivisionError):
        session_of(images, tmp_path, *cached(tmp_path / "features"))
    assert "split train: 56 images x 1 of 3x17x32, 0.000 GB" in written[0]


def test_a_cache_that_does_not_fit_is_refused(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert main(command(images, tmp_path, *cached(tmp_path / "features"))) == 1
    assert "do not fit" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["begin", "write", "finish"])
def test_a_full_disk_is_one_line_and_leaves_no_cache_that_is_believed(place, cache, images, tmp_path, capsys):
    words = command(images, tmp_path, *cached(tmp_path / "features"))
    limit = {"begin": 10_000, "write": 10_000, "finish": 56 * 3 * 17 * 32 * 4 + 200}[place]
    with pytest.MonkeyPatch.context() as patch:
        if place == "write":  # a file system that takes no space beforehand
            patch.delattr(os, "posix_fallocate")
            patch.setattr(FeatureCache, "begin", lambda self: (self.folder / f"{self.name}.features").touch())
        limited = start(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)) or main(words))
        limited.join()
    assert limited.exitcode == 1
    assert not (tmp_path / "features" / "train.json").exists() or place == "finish"
    assert main(words) == 0
    assert same_tensors(last(tmp_path / "run")["state_dict"], last(cache[1])["state_dict"])


def test_features_that_another_run_has_written_anew_are_not_read(images, tmp_path):
    folder = tmp_path / "features"
    dataset = session_of(images, tmp_path, *cached(folder)).data.replay.loader.dataset
    before = dataset[0][0]
    shutil.rmtree(folder)
    other = session_of(images, tmp_path, *cached(folder, "--seed", "7")).data.replay.loader.dataset
    assert not torch.equal(other[0][0], before)
    assert torch.equal(dataset[0][0], before)
    dataset._features = None  # as in a loader's process that is not forked
    with pytest.raises(OSError, match="written anew while this run read it"):
        dataset[0]


def test_a_cache_that_another_run_completes_in_between_is_not_computed_again(cache, images, tmp_path, monkeypatch):
    folder = tmp_path / "features"

    @contextlib.contextmanager
    def other_run_ends_first(path, flag):
        assert flag == "--side-cache"
        shutil.copytree(cache[0], folder, dirs_exist_ok=True)
        yield

    monkeypatch.setattr("tweo_timm.train.side_data.locked", other_run_ends_first)
    monkeypatch.setattr(FeatureCache, "begin", None)
    session_of(images, tmp_path, *cached(folder))


def test_a_cache_whose_writing_was_killed_is_written_anew(cache, images, tmp_path):
    words = command(images, tmp_path, *cached(tmp_path / "features"))
    process = start(words)
    wait_until((tmp_path / "features" / "train.features").exists, [process])
    process.kill()
    process.join()
    assert main(words) == 0
    assert same_tensors(last(tmp_path / "run")["state_dict"], last(cache[1])["state_dict"])


def test_a_cache_without_its_description_is_not_believed(cache, images, tmp_path):
    folder = shutil.copytree(cache[0], tmp_path / "features")
    (folder / "train.json").unlink()
    (folder / "train.features").write_bytes(b"half")
    again = train(images, tmp_path, *cached(folder))
    assert same_tensors(last(again)["state_dict"], last(cache[1])["state_dict"])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--seed", "7"], "fingerprint"),  # another backbone: it has no weights of its own
        (["--side-precision", "bfloat16"], "precision float32, not bfloat16"),
        (["--side-gap", "2"], "reads"),
        (["--mean", "0.1", "0.2", "0.3"], "mean=tensor([0.1000"),
        (["--crop-pct", "0.5"], "split validation is of something else: images"),
        (["--interpolation", "nearest"], "split train is of something else: images"),
        (["--model-kwargs", *TINY[:-1], "num_heads=4"], "num_heads 2, not 4"),  # of the same weights
    ],
)
def test_features_of_something_else_are_refused(words, part, cache, images, tmp_path, capsys):
    assert main(command(images, tmp_path, *cached(cache[0]), *words)) == 1
    said = capsys.readouterr().err
    assert "is of something else" in said
    assert part in said
    assert not (tmp_path / "run").exists()


def test_features_of_other_images_are_refused_and_so_are_changed_files(cache, images, tmp_path, capsys):
    other = shutil.copytree(images, tmp_path / "images")
    one, two = sorted(other.glob("train/*/*.png"))[:2]
    pixels = two.read_bytes()
    two.write_bytes(one.read_bytes())
    one.write_bytes(pixels)
    assert main(command(other, tmp_path, *cached(cache[0]))) == 1
    assert "data" in capsys.readouterr().err
    folder = shutil.copytree(cache[0], tmp_path / "features")
    values = np.fromfile(folder / "train.features", np.float32)
    values[1000] += 1
    values.tofile(folder / "train.features")
    assert main(command(images, tmp_path, *cached(folder))) == 1
    assert "train.features is not as it was written" in capsys.readouterr().err
    for odd in ("{", "{}", "[]", '{"of": {}, "checksums": 1}'):
        (folder / "train.json").write_text(odd)
        assert main(command(images, tmp_path, *cached(folder))) == 1
        said = capsys.readouterr().err
        assert "description cannot be read" in said
        assert "delete this one" in said


def test_a_run_from_a_cache_continues_bit_for_bit(images, tmp_path, interrupt):
    words = [*SIDE, "--side-cache", str(tmp_path / "features"), "--side-augmentations", "2", "--model-ema"]
    words += ["--grad-accum-steps", "2", "--reprob", "0.5", "--aa", "rand-m9-mstd0.5"]
    whole = train(images, tmp_path / "whole", *words)
    words = command(images, tmp_path, *words, "--resume", "auto")
    interrupt(10)
    assert main(words) == 128 + signal.SIGTERM
    assert main(words) == 0
    for folder in (whole, tmp_path / "run"):
        (folder / "outliers.jsonl").touch()
    assert_same_run(tmp_path / "run", whole)


def test_a_split_that_is_trained_on_and_validated_has_features_of_both_transforms(images, tmp_path):
    session_of(images, tmp_path, *cached(tmp_path / "features", "--val-split", "train", "--crop-pct", "0.5"))
    one, two = (tmp_path / "features" / f"{name}.features" for name in ("train", "train-validation"))
    assert one.stat().st_size == two.stat().st_size
    assert one.read_bytes() != two.read_bytes()


def test_no_file_of_a_cache_is_written_through_a_link(images, tmp_path):
    (tmp_path / "features").mkdir()
    for name in ("train.features", "train.targets", "train.json"):
        (tmp_path / "features" / name).symlink_to(tmp_path / f"victim of {name}")
    session_of(images, tmp_path, *cached(tmp_path / "features"))
    assert not list(tmp_path.glob("victim*"))


def test_augmentations_are_fixed_and_each_epoch_reads_another(images, tmp_path):
    words = [*SIDE, "--side-augmentations", "2", "--side-cache"]
    one, two = (
        session_of(images, tmp_path, *words, str(tmp_path / name), "-j", workers).data.replay.loader.dataset
        for name, workers in (("a", "0"), ("b", "2"))
    )
    assert torch.equal(one[5][0], two[5][0])  # whoever reads it
    first = one[5][0]
    one.set_epoch(1)
    assert not torch.equal(one[5][0], first)
    one.set_epoch(2)
    assert torch.equal(one[5][0], first)


def test_two_processes_write_the_cache_of_one(cache, images, tmp_path):
    assert train_together(command(images, tmp_path, *cached(tmp_path / "both"))) == [0, 0]
    for split, dtype in (("train", np.float32), ("validation", np.float32)):
        theirs = np.fromfile(cache[0] / f"{split}.features", dtype)
        np.testing.assert_allclose(np.fromfile(tmp_path / "both" / f"{split}.features", dtype), theirs, rtol=1e-5)
        keys = [json.loads((folder / f"{split}.json").read_text())["of"] for folder in (cache[0], tmp_path / "both")]
        assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--side", "last", "--side-cache", "x"], "give --no-aug"),
        (["--side", "last", "--side-cache", "x", "--no-aug", "--mixup", "0.1"], "--mixup needs images"),
        (["--side", "last", "--side-augmentations", "2"], "give --side-cache DIR"),
        (["--side-cache", "x"], "does nothing without --side"),
    ],
)
def test_settings_that_need_images_are_refused(words, part, images, tmp_path, capsys):
    assert main(command(images, tmp_path, *words)) == 1
    assert part in capsys.readouterr().err
