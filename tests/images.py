"""Small images of noise: alone, in folders, and in tar files."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def noise(rng: np.random.Generator, height: int = 32, width: int = 32) -> Image.Image:
    """The next RGB image of a generator."""
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_images(
    root: Path, train: int = 48, val: int = 12, classes: int = 3, height: int = 32, width: int = 32
) -> Path:
    """Write an ImageFolder of noise, `train` and `val` images in all."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            write(root / split / f"class{index % classes}" / f"{index}.png", noise(rng, height, width))
    return root


def write(path: Path, image: Image.Image) -> None:
    """Save an image in a folder that may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to a tar file."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
