"""What a real DINOv2 ViT-S/14 survives: the table and the picture of docs/survey.md, on 64 named images.

    OMP_NUM_THREADS=1 python benchmarks/survey_dinov2.py dinov2_small_224.safetensors

The weights are timm's vit_small_patch14_dinov2 with position embeddings for 224 pixels. The images are the first 64
validation crops of tweo_timm.photos, going round its 14 photographs by name (astronaut/0000 ... grass/0004), 32 pixels
resized to 224; scales are calibrated on the first 32 training crops. There is no head: an image is right if its nearest
other image shows the same photograph. 64 images decide no single point, so the limit is two.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what is measured is this tree

from tweo_timm import machine
from tweo_timm.evaluate import cli
from tweo_timm.photos import photographs, write_photo_crops

COUNTS = {"train": 32, "validation": 64}


def write_images(folder: Path) -> Path:
    """Write the first images of each split, going round the photographs: folder/{train,validation}/NAME/NUMBER.png."""
    names = list(photographs())
    every = write_photo_crops(folder.with_name(f"{folder.name}_all"), train=3, validation=5)
    shutil.rmtree(folder, ignore_errors=True)
    for split, count in COUNTS.items():
        for number in range(count):
            image = Path(split, names[number % len(names)], f"{number // len(names):04d}.png")
            (folder / image).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(every / image, folder / image)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--output", type=Path, default=Path("quickstart/survey_dinov2"), metavar="DIR")
    words = parser.parse_args()
    model = ["--model", "vit_small_patch14_dinov2", "--checkpoint", words.checkpoint, "--img-size", "224"]
    images = ["--data-dir", str(write_images(words.output / "images")), "-j", "0", "-b", "16"]
    survey = ["--survey", "--max-drop", "2", "--calibration-images", "32", "--report", str(words.output / "report")]
    status = cli.main([*model, *images, "--device", "cpu", *survey])
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        f"float32, {machine.describe()['processor']}, {(used.ru_utime + used.ru_stime) / 60:.1f} min of processor time"
    )
    return status


if __name__ == "__main__":
    raise SystemExit(main())
