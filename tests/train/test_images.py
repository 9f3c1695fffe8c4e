"""What is trained on and validated: augmentation, sizes, classes, targets, splits."""

import random
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, posterize
from timm.loss import compute_class_weights

from tests.images import write_images
from tests.train.runs import VIT, command, session_of, train
from tweo_timm.train import data
from tweo_timm.train.cli import main


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "v0"])
def test_augmentation_at_its_strongest_keeps_no_bit_of_an_image_whatever_pillow_says(policy, images, tmp_path):
    session = session_of(images, tmp_path, "--aa", policy)
    augment = session.data.replay.loader.dataset.transform
    random.seed(0)
    for _ in range(200):
        augment(Image.new("RGB", (32, 32), "white"))
    posterizing = [NAME_TO_OP[name] for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")]
    assert posterizing == [posterize] * 3  # for everybody else, timm is as it was


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("bits", range(9))
def test_posterizing_keeps_the_highest_bits(bits, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3) if mode == "RGB" else (4, 5), dtype=np.uint8)
    kept = np.asarray(data.posterize_to_bits(Image.fromarray(pixels), bits))
    assert np.array_equal(kept, pixels >> (8 - bits) << (8 - bits))


def test_scheduled_image_sizes_change_the_batches(images, tmp_path):
    sizes = ("--train-img-sizes", "16", "32", "--train-batch-sizes", "8", "4", "--train-batches-per-epoch", "9")
    model = [*VIT[:-6], "dynamic_img_size=True", *VIT[-6:]]
    words = (*sizes, "--variable-batch-loss-scale", "linear")
    session = session_of(images, tmp_path, *words, model=model)
    shapes = [tuple(batch[0].shape) for batch in session.data.train]
    assert len(shapes) == 9
    assert set(shapes) == {(8, 3, 16, 16), (4, 3, 32, 32)}
    assert session.data.loss_scale(8) == pytest.approx(8 / 6)
    train(images, tmp_path, *words, "--epochs", "1", model=model)


def test_an_image_size_that_the_model_does_not_take_is_refused(images, tmp_path, capsys):
    assert main(command(images, tmp_path, "--train-img-sizes", "16", "32")) == 1
    assert "dynamic_img_size" in capsys.readouterr().err


def test_augmentation_splits_feed_the_jsd_loss(images, tmp_path):
    words = ("--aug-splits", "3", "--jsd-loss", "--aa", "augmix-m3-w2", "--resplit", "--reprob", "0.5")
    session = session_of(images, tmp_path, *words)
    batch, _ = next(iter(session.data.train))
    assert tuple(batch.shape) == (24, 3, 32, 32)
    assert type(session.task.criterion).__name__ == "JsdCrossEntropy"
    train(images, tmp_path, *words, "--epochs", "1")


def test_multi_label_targets_come_from_folders_too(images, tmp_path):
    folder = train(images, tmp_path, "--task", "multilabel", "--epochs", "1", "--mixup", "0.3")
    header = (folder / "summary.csv").read_text().splitlines()[0]
    assert "eval_map" in header


def test_a_class_map_names_the_classes_of_a_subset(tmp_path):
    data = write_images(tmp_path / "data", train=24, val=6)
    (tmp_path / "map.txt").write_text("class0\nclass1\n")
    session = session_of(data, tmp_path, "--class-map", str(tmp_path / "map.txt"))
    assert session.data.class_names == {"class0": 0, "class1": 1}
    assert len(session.data.train.dataset) == 16


@pytest.mark.parametrize(("folder", "split"), [("train", "train"), ("val", "validation")])
def test_a_class_without_images_in_one_split_is_named_unless_a_class_map_numbers_all(folder, split, tmp_path, capsys):
    data = write_images(tmp_path / "data", train=24, val=6)
    shutil.rmtree(data / folder / "class1")
    assert main(command(data, tmp_path)) == 1
    assert f"{split} has no image of class1. " in capsys.readouterr().err
    (tmp_path / "map.txt").write_text("class0\nclass1\nclass2\n")
    loaders = session_of(data, tmp_path, "--class-map", str(tmp_path / "map.txt")).data
    held = {"train": loaders.train.dataset, "validation": loaders.val.dataset}
    assert {name: {target for _, target in images} for name, images in held.items()} == {
        "train": {0, 1, 2},
        "validation": {0, 1, 2},
        split: {0, 2},
    }


def test_mixup_ends_at_its_epoch(images, tmp_path):
    for extra in ([], ["--no-prefetcher"]):
        session = session_of(images, tmp_path, "--mixup", "1.0", "--smoothing", "0", "--mixup-off-epoch", "1", *extra)
        mixed = []
        for epoch in (0, 1):
            session.data.start_epoch(epoch, 1)
            mixed.append(any(((t > 0) & (t < 1)).any() for _, t in session.data.batches()))
        assert mixed == [True, False]


def test_images_are_validated_with_the_models_crop_and_normalized_in_its_dtype(images, tmp_path, monkeypatch):
    calls = []
    original = data.create_loader
    monkeypatch.setattr(
        data, "create_loader", lambda *args, **kwargs: (calls.append(kwargs), original(*args, **kwargs))[1]
    )
    session = session_of(images, tmp_path, "--model-dtype", "bfloat16")
    assert [call["img_dtype"] for call in calls] == [torch.bfloat16] * 2
    assert calls[1]["crop_mode"] == session.data_config["crop_mode"]
    batch, _ = next(iter(session.data.val))
    assert batch.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["flat folder", "tar"])
def test_without_validation_the_data_need_no_split(layout, images, tmp_path):
    data_dir = images / "train"
    if layout == "tar":
        data_dir = tmp_path / "train.tar"
        with tarfile.open(data_dir, "w") as tar:
            for path in sorted((images / "train").rglob("*.png")):
                tar.add(path, arcname=str(path.relative_to(images / "train")))
    train(images, tmp_path, "--data-dir", str(data_dir), "--val-split", "", "--epochs", "1")


def test_class_statistics_give_the_weights_that_timm_computes_from_them(images, tmp_path):
    stats = tmp_path / "stats.json"
    stats.write_text('{"pos_counts": [4, 2, 1], "num_samples": 8}')
    words = ["--task", "multilabel", "--loss", "bce", "--class-stats", str(stats), "--loss-pos-weight", "neg_pos"]
    words += ["--loss-class-weight", "effective_num", "--loss-weight-power", "0.5"]
    criterion = session_of(images, tmp_path, *words).task.criterion
    _, positive = compute_class_weights([4, 2, 1], 8, method="neg_pos", power=0.5)
    _, weight = compute_class_weights([4, 2, 1], 8, method="effective_num")
    assert torch.equal(criterion.pos_weight, positive)
    assert torch.equal(criterion.weight, weight)


def test_batch_norm_splits_with_the_augmentation(images, tmp_path):
    model = ["--model", "resnet10t", "--num-classes", "3", "--input-size", "3", "32", "32"]
    words = ("--split-bn", "--aug-splits", "2", "--aa", "augmix-m3-w2")
    session = session_of(images, tmp_path, *words, model=model)
    norms = [module for module in session.model.modules() if type(module).__name__ == "SplitBatchNorm2d"]
    assert norms
    train(images, tmp_path, "--epochs", "1", *words, model=model)
