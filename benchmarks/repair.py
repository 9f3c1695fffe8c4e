"""What a rotation of the stream gives a real DINOv2 in INT8: the rows of docs/repair.md.

A checkpoint of timm's vit_small_patch14_dinov2 for images of 224 pixels is needed, float32:

    OMP_NUM_THREADS=1 python benchmarks/repair.py dinov2_small_224.safetensors

Images are the photograph crops of the quickstart (32 pixels, resized to 224): 28 of the training tiles calibrate, 28
others are scored. The error is that of all final tokens, |y' - y| / |y|; the cosine that of the class token, averaged
over images; k-NN takes the class of the nearest of 56 training crops, whose features are the float model's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

from tweo_timm import machine, quantize_static, rotate
from tweo_timm.photos import write_photo_crops
from tweo_timm.rewrite.head import add_feature_head

ARCH = "vit_small_patch14_dinov2"
SCHEMES = ("w8a8-tt+res", "w8a8-ct+res", "w8a8-tt", "w6a6-tt+res")
SEEDS = (0, 1, 2)
CALIBRATION, BATCH = 28, 14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", help="of vit_small_patch14_dinov2, position embeddings for 224 pixels")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--methods", nargs="+", default=["none", "random", "learned"])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, timm {timm.__version__}, float32, {torch.get_num_threads()} thread, "
        f"{machine.describe()['processor']}"
    )
    bank, bank_labels = crops("train", 4)
    images, labels = crops("validation", 2)
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))[:CALIBRATION]
    calibration = list(torch.split(bank[order], BATCH))
    original = dinov2(options.checkpoint)
    bank_features, expected = features_of(original, bank), features_of(original, images)
    score = Score(expected, bank_features[:, 0], bank_labels, labels)
    print("| rotation | last block: peak, kurtosis | " + " | ".join(options.schemes) + " |")
    for name, model, note in _models(options, calibration):
        rows = [score(features_of(quantize_static(model, calibration, s), images)) for s in options.schemes]
        print(f"| {name} | {note} | {' | '.join(rows)} |", flush=True)


def _models(options: Any, calibration: list[Tensor]) -> Iterator[tuple[str, nn.Module, str]]:
    for method in options.methods:
        for seed in options.seeds if method != "none" else (0,):
            model, start = dinov2(options.checkpoint), time.process_time()
            # Random matrices need no images, but the report's peaks are those of the images it is given.
            report = rotate(model, "random" if method == "none" else method, calibration, seed)
            took = time.process_time() - start
            site = next(site for site in report.sites if site.name == "blocks.11")
            if method == "none":
                yield "none", dinov2(options.checkpoint), f"{site.before.peak_abs:.1f}, {site.before.kurtosis:.1f}"
            else:
                note = f"{site.after.peak_abs:.1f}, {site.after.kurtosis:.1f}"
                yield f"{method}, seed {seed} ({took:.0f} s)", model, note


def dinov2(checkpoint: str) -> nn.Module:
    """DINOv2 with a head that returns its features, without which it could not be rotated."""
    model = timm.create_model(ARCH, img_size=224, num_classes=0, checkpoint_path=checkpoint).eval()
    add_feature_head(model)
    return model


def features_of(model: Any, images: Tensor) -> Tensor:
    """All final tokens, in the basis of the original: through the head."""
    with torch.inference_mode():
        return torch.cat([model.head(model.forward_features(part)) for part in torch.split(images, BATCH)])


class Score:
    """Compares features with the original's.

    Args:
        expected: all final tokens of the scored images, (B, N, C).
        bank: class tokens of other images, (M, C), of the original.
        bank_labels: their photographs.
        labels: the photographs of the scored images.
    """

    def __init__(self, expected: Tensor, bank: Tensor, bank_labels: list[str], labels: list[str]) -> None:
        self._expected, self._labels, self._bank_labels = expected, labels, bank_labels
        self._bank = nn.functional.normalize(bank, dim=1)

    def __call__(self, got: Tensor) -> str:
        """Return error of all tokens, cosine of class tokens, and k-NN Top-1 in percent, of features (B, N, C)."""
        error = float((got - self._expected).norm() / self._expected.norm())
        cosine = float(torch.cosine_similarity(got[:, 0], self._expected[:, 0]).mean())
        nearest = (nn.functional.normalize(got[:, 0], dim=1) @ self._bank.T).argmax(1).tolist()
        right = [self._bank_labels[i] == label for i, label in zip(nearest, self._labels, strict=True)]
        return f"{error:.3f}, {cosine:.3f}, {100 * sum(right) / len(right):.0f}"


def crops(split: str, each: int) -> tuple[Tensor, list[str]]:
    folder = write_photo_crops(Path(tempfile.gettempdir()) / "tweo_repair_crops", 8, 8)
    config = timm.get_pretrained_cfg(ARCH)
    transform = create_transform((3, 224, 224), mean=config.mean, std=config.std, crop_pct=1.0, interpolation="bicubic")
    files = [file for name in sorted((folder / split).iterdir()) for file in sorted(name.glob("*.png"))[:each]]
    return torch.stack([transform(Image.open(file).convert("RGB")) for file in files]), [f.parent.name for f in files]


if __name__ == "__main__":
    main()
