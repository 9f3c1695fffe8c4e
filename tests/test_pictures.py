"""Images as they are read: what cannot be used is named, what is altered is counted."""

import logging
import os

import numpy as np
import pytest
from PIL import Image, ImageOps
from timm.data import ImageDataset
from torchvision.datasets import ImageFolder

from tweo_timm.run.folders import check_files
from tweo_timm.run.pictures import Reading, StrictImages, UnreadableImage


@pytest.fixture
def folder(tmp_path):
    noise = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(2):
            pixels = noise.integers(0, 256, (6, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{number}.png")
    return tmp_path


def opened(folder, kind, **settings):
    dataset = ImageDataset(str(folder)) if kind == "timm" else ImageFolder(str(folder))
    return StrictImages(dataset, Reading("RGB", **settings))


KINDS = pytest.mark.parametrize("kind", ["timm", "torchvision"])


def bomb(path):
    Image.new("1", (14000, 14000)).save(path)


@KINDS
@pytest.mark.parametrize("damage", [bomb, lambda path: path.write_bytes(path.read_bytes()[:60])])
def test_what_cannot_be_decoded_is_named(damage, kind, folder):
    damage(folder / "b" / "0.png")
    images = opened(folder, kind)
    assert images[1][1] == 0
    with pytest.raises(UnreadableImage, match=r"cannot read image .*b/0\.png"):
        images[2]


@KINDS
def test_a_label_that_the_model_has_no_output_for_is_named(kind, folder):
    images = opened(folder, kind, num_classes=1)
    assert images[0][1] == 0
    with pytest.raises(UnreadableImage, match=r"b/0\.png has the label 1, and labels are 0 to 0"):
        images[2]


@KINDS
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_cameras_say_or_counted(orientation, kind, folder, caplog):
    note = Image.Exif()
    note[0x0112] = orientation
    path = folder / "a" / "0.png"
    stored = Image.open(path).copy()
    stored.save(path, exif=note)
    assert np.array_equal(opened(folder, kind, exif=True)[0][0], ImageOps.exif_transpose(Image.open(path)))
    images = opened(folder, kind)
    assert np.array_equal(images[0][0], stored)  # as timm reads it
    images.alterations.report()
    images.alterations.report()
    assert caplog.text.count("1 of the images read carry an EXIF orientation") == (orientation > 1)


def test_images_of_more_than_eight_bits_are_counted_where_values_are_cut_off(folder, caplog):
    for label, largest in (("a", 40000), ("b", 255)):
        Image.fromarray(np.full((4, 4), largest, dtype=np.uint16)).save(folder / label / "0.png")
    images = opened(folder, "timm")
    assert [np.asarray(image).max() for image, _ in (images[0], images[2])] == [255, 255]
    images.alterations.report()
    assert "1 of the images read hold values above 255" in caplog.text


def test_images_that_are_not_read_are_counted_with_the_flag_that_reads_them(folder, caplog):
    for number in range(3):
        Image.new("RGB", (4, 4)).save(folder / "a" / f"w{number}.webp")
    (folder / "a" / "notes.txt").write_text("no image")
    check_files(folder, None, {"a"})
    assert "not read are .webp (3); --input-key '.jpeg;.jpg;.png;.webp' reads all" in caplog.text
    assert "--class-map leaves out the images of b (2)" in caplog.text
    caplog.clear()
    caplog.set_level(logging.INFO)
    check_files(folder, ".jpeg;.jpg;.png;.webp", None)
    assert not caplog.text
    assert len(ImageDataset(str(folder), input_key=".jpeg;.jpg;.png;.webp")) == 7


def test_a_pipe_that_is_named_like_an_image_is_refused_and_not_waited_for(folder):
    os.mkfifo(folder / "a" / "9.png")
    with pytest.raises(ValueError, match=r"a/9.png is named like an image and is no file"):
        check_files(folder, None, None)
