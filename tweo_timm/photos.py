"""A small set of real images that a machine without a dataset can have: crops of photographs inside two wheels.

scikit-image and scikit-learn ship 14 photographs; which of them a 32-pixel crop comes from is the task. It is an easy
texture task, made to see activations, not to measure generalisation. Training and validation crops come from disjoint
64-pixel tiles of each photograph. Refuses to overwrite a folder that it did not write.

    python -m tweo_timm.photos quickstart/photos
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tweo_timm.extras import installation

TILE = 64
CROP = 32
MARKER = "photos.json"

_SKIMAGE = (
    ("astronaut", "astronaut"),
    ("brick", "brick"),
    ("camera", "camera"),
    ("chelsea", "cat"),
    ("coffee", "coffee"),
    ("grass", "grass"),
    ("gravel", "gravel"),
    ("hubble_deep_field", "galaxies"),
    ("immunohistochemistry", "tissue"),
    ("retina", "retina"),
    ("rocket", "rocket"),
    ("stereo_motorcycle", "motorcycle"),
)
_SKLEARN = (("china.jpg", "temple"), ("flower.jpg", "flower"))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the crops into a folder that train.py and validate.py take as `--data-dir`; see `--help`.

    Args:
        argv: the words after the program's name; None takes the process's own.

    Returns:
        The exit status: 0 if the folder holds the crops.
    """
    parser = argparse.ArgumentParser(prog="python -m tweo_timm.photos", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where to")
    parser.add_argument("--train", type=int, default=128, metavar="N", help="training crops a photograph (128)")
    parser.add_argument("--validation", type=int, default=100, metavar="N", help="validation crops of each (100)")
    options = parser.parse_args(argv)
    try:
        write_photo_crops(options.folder, options.train, options.validation)
    except ValueError as error:
        print(f"photos: {error}", file=sys.stderr)
        return 1
    print(f"14 photographs, {options.train} training and {options.validation} validation crops each: {options.folder}")
    return 0


def photographs() -> dict[str, Image.Image]:
    """Return the 14 photographs by name, in RGB.

    Raises:
        ValueError: if scikit-image or scikit-learn is missing.
    """
    try:
        import skimage.data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ValueError(
            f"the photographs ship with scikit-image and scikit-learn ({error}): {installation('quickstart')}"
        ) from error
    found: dict[str, Image.Image] = {}
    for source, name in _SKIMAGE:
        pixels: Any = getattr(skimage.data, source)()
        found[name] = _rgb(pixels[0] if isinstance(pixels, tuple) else pixels)
    for source, name in _SKLEARN:
        found[name] = _rgb(load_sample_image(source))
    return dict(sorted(found.items()))


def _rgb(pixels: Any) -> Image.Image:
    return Image.fromarray(np.asarray(pixels)).convert("RGB")


def write_photo_crops(folder: Path, train: int = 128, validation: int = 100, seed: int = 0) -> Path:
    """Write the crops as an image folder: folder/{train,validation}/<photograph>/<number>.png.

    Args:
        folder: where to; reused as it is if it holds the same crops already.
        train: training crops of each photograph.
        validation: validation crops of each photograph.
        seed: of the choice of tiles and offsets.

    Returns:
        `folder`.

    Raises:
        ValueError: if the folder holds something else, or no crops are asked for.
    """
    if min(train, validation) < 1:
        raise ValueError(f"{train} training and {validation} validation crops a photograph: each is 1 or more")
    wanted = {"train": train, "validation": validation, "seed": seed, "tile": TILE, "crop": CROP}
    marker = folder / MARKER
    if marker.exists() and json.loads(marker.read_text()) == wanted:
        return folder
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise ValueError(f"{folder} holds other files: name an empty folder, or delete it")
    photos = photographs()
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text("{}")  # ours from here on, but not complete
    for split in ("train", "validation"):
        shutil.rmtree(folder / split, ignore_errors=True)
    for name, photo in photos.items():
        for split, count, of_split in (("train", train, _is_train), ("validation", validation, _is_validation)):
            target = folder / split / name
            target.mkdir(parents=True, exist_ok=True)
            crops = _crops(photo, count, of_split, random.Random(f"{seed}-{split}-{name}"))
            for number, crop in enumerate(crops):
                crop.save(target / f"{number:04d}.png")
    marker.write_text(json.dumps(wanted))
    return folder


def _is_validation(column: int, row: int) -> bool:
    return (column + 2 * row) % 4 == 0


def _is_train(column: int, row: int) -> bool:
    return not _is_validation(column, row)


def _crops(
    photo: Image.Image, count: int, of_split: Callable[[int, int], bool], choice: random.Random
) -> Iterator[Image.Image]:
    """Yield crops that lie inside one tile of the split each, going round the tiles."""
    columns, rows = photo.width // TILE, photo.height // TILE
    tiles = [(i, j) for i in range(columns) for j in range(rows) if of_split(i, j)]
    choice.shuffle(tiles)
    for number in range(count):
        i, j = tiles[number % len(tiles)]
        left, top = (TILE * k + choice.randrange(TILE - CROP + 1) for k in (i, j))
        yield photo.crop((left, top, left + CROP, top + CROP))


if __name__ == "__main__":
    raise SystemExit(main())
