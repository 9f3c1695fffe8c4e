"""Whether the survey's order of layers is that of the damage each does alone: the table of docs/survey.md.

    python benchmarks/survey_sensitivity.py quickstart/healthy/last.pth.tar --data-dir quickstart/photos

Each layer and site is quantized alone, all others in float, and the divergence of the softmax from the float model's is
measured on 256 images of the validation split; the score sees 64 of them. Spearman's rank correlation of the two.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from tweo_timm import machine, quantize_static
from tweo_timm.evaluate.case import num_classes_of
from tweo_timm.evaluate.images import sample_images
from tweo_timm.evaluate.options import parse_validate_options
from tweo_timm.evaluate.subject import find_sources, load_subject
from tweo_timm.quant.static import quantization_scales
from tweo_timm.survey.sensitivity import sensitivities

SCHEMES = ("w8a8-tt", "w4a4-tt", "w8a8-tt+res", "fp8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--images", type=int, default=64, help="that the score sees")
    words = parser.parse_args()
    print(f"float32, {machine.describe()['processor']}, torch {torch.__version__}")
    print("| checkpoint | scheme | sites | rank correlation | score s | one by one s (processor time) |")
    print("|---|---|---|---|---|---|")
    for checkpoint in words.checkpoints:
        options = ["--checkpoint", checkpoint, "--data-dir", words.data_dir, "--device", "cpu", "-j", "0"]
        parsed = parse_validate_options(options)
        subject = load_subject(find_sources(parsed)[0], parsed, torch.device("cpu"))
        calibration, images = (
            sample_images(subject.options, subject.data_config, num_classes_of(subject), split, 256, 64)
            for split in ("train", "validation")
        )
        for scheme in words.schemes:
            row = _compare(subject.model, scheme, calibration, torch.cat(images), words.images)
            print(f"| {subject.name} | {scheme} | {' | '.join(row)} |", flush=True)


def _compare(model: nn.Module, scheme: str, calibration: list[Tensor], images: Tensor, seen: int) -> list[str]:
    began = time.process_time()
    quantized = quantize_static(model, calibration, scheme)
    scores = {site.name: site.score for site in sensitivities(model, quantized, [images[:seen]])}
    scored, names = time.process_time(), list(quantization_scales(quantized))
    with torch.no_grad():
        wanted = model(images).log_softmax(-1)
    damage = [
        _divergence(wanted, model, calibration, scheme, images, [n for n in names if n != name]) for name in names
    ]
    ranks = torch.stack([_ranks([scores[name] for name in names]), _ranks(damage)])
    correlation = float(torch.corrcoef(ranks)[0, 1])
    return [str(len(names)), f"{correlation:.3f}", f"{scored - began:.1f}", f"{time.process_time() - scored:.1f}"]


def _divergence(
    wanted: Tensor, model: nn.Module, calibration: list[Tensor], scheme: str, images: Tensor, kept: list[str]
) -> float:
    with torch.no_grad():
        got = quantize_static(model, calibration, scheme, keep_float=kept)(images).log_softmax(-1)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


def _ranks(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


if __name__ == "__main__":
    main()
