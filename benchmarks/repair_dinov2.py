"""Does a short training with the penalty help a real DINOv2 beyond a rotation: the last table of docs/repair.md.

    OMP_NUM_THREADS=1 python benchmarks/repair_dinov2.py dinov2_small_224.safetensors

Weights, crops, calibration and scores are those of repair.py. The model is distilled from its frozen self, all final
tokens, for 40 updates of 14 images (AdamW, 1e-5), with the penalty; without it nothing would change. Each is then
quantized as it is, and with a random rotation of its stream. Errors are against the features of the model that it was.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from repair import BATCH, CALIBRATION, Score, crops, dinov2, features_of
from torch import Tensor, nn

from tweo_timm import Tweo, TweoConfig, machine, quantize_static, record_outliers, rotate

SCHEMES = ("w8a8-tt+res", "w8a8-ct+res", "w8a8-tt")
UPDATES, RATE = 40, 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", help="of vit_small_patch14_dinov2, position embeddings for 224 pixels")
    parser.add_argument("--weights", nargs="+", type=float, default=[0.001, 0.01])
    options = parser.parse_args()
    start = time.process_time()
    (bank, bank_labels), (images, labels) = crops("train", 8), crops("validation", 2)
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))
    calibration = list(torch.split(bank[order[:CALIBRATION]], BATCH))
    original = dinov2(options.checkpoint)
    expected = features_of(original, images)
    score = Score(expected, features_of(original, bank)[:, 0], bank_labels, labels)
    print(f"| trained | largest activation | rotation | float | {' | '.join(SCHEMES)} |")
    print("|---" * (4 + len(SCHEMES)) + "|", flush=True)
    for weight in (None, *options.weights):
        model = original if weight is None else _distilled(original, bank, weight)
        peak = _peak(model, images)
        turned = copy.deepcopy(model)
        rotate(turned, "random", calibration)
        trained = "no" if weight is None else f"weight {weight:g}"
        for rotation, one in (("none", model), ("random", turned)):
            rows = [score(features_of(quantize_static(one, calibration, s), images)) for s in SCHEMES]
            float_row = score(features_of(one, images))
            print(f"| {trained} | {peak:.1f} | {rotation} | {float_row} | {' | '.join(rows)} |", flush=True)
    minutes = (time.process_time() - start) / 60
    print(f"float32, {machine.describe()['processor']}, {minutes:.1f} minutes of processor time")


def _distilled(original: nn.Module, bank: Tensor, weight: float) -> nn.Module:
    """Train a copy to return what the original returns, with the penalty; the head that returns features stays."""
    model: Any = copy.deepcopy(original)
    model.head.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, weight_decay=0.0)
    tweo = Tweo(model, TweoConfig(weight=weight))
    choice = torch.Generator().manual_seed(0)
    seen: list[Tensor] = []
    handle = model.norm.register_forward_hook(lambda norm, args, output: seen.append(output))
    model.train()
    for _ in range(UPDATES):
        images = bank[torch.randperm(len(bank), generator=choice)[:BATCH]]
        wanted = features_of(original, images).clone()
        model(images)
        loss = (model.head(seen.pop()) - wanted).square().mean() / wanted.square().mean()
        optimizer.zero_grad()
        (loss + tweo.penalty()).backward()
        optimizer.step()
    tweo.remove()
    handle.remove()
    return model.eval()  # type: ignore[no-any-return]


def _peak(model: nn.Module, images: Tensor) -> float:
    with torch.inference_mode(), record_outliers(model) as record:
        features_of(model, images)
    return float(record.summary()["peak_abs"])


if __name__ == "__main__":
    main()
