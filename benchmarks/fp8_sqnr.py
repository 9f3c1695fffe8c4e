"""Signal-to-noise ratio of an FP8 layer against the unquantized one: the table of docs/numerics.md.

    python benchmarks/fp8_sqnr.py

Standard normal inputs and output gradients, PyTorch's default weights, 20 seeds; decibels of the output, the input
gradient and the weight gradient, least and mean over the seeds.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

from tweo_timm import Fp8Recipe, patch_fp8

SHAPES = [(64, 64, 96), (197, 48, 100), (50, 96, 10), (3, 5, 7), (1, 16, 33)]


def sqnr_db(reference: Tensor, actual: Tensor) -> float:
    reference, actual = reference.double(), actual.double()
    return 10 * math.log10(reference.square().sum() / (actual - reference).square().sum())


def one_step(model: nn.Sequential, x: Tensor, dy: Tensor, autocast: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.backward(dy.to(y.dtype))
    dw = model[0].weight.grad.clone()
    model.zero_grad()
    return y.detach(), x.grad, dw


def measure(shape: tuple[int, int, int], recipe: Fp8Recipe, autocast: bool, seed: int) -> list[float]:
    tokens, num_in, num_out = shape
    torch.manual_seed(seed)
    model, reference = (nn.Sequential(nn.Linear(num_in, num_out)) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    patch_fp8(model, recipe)
    x, dy = torch.randn(tokens, num_in), torch.randn(tokens, num_out)
    one_step(model, x, dy, autocast)  # a delayed scale arrives one step late
    pairs = zip(one_step(reference, x, dy, False), one_step(model, x, dy, autocast), strict=True)
    return [sqnr_db(expected, actual) for expected, actual in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    print("| tokens x in -> out | format | activations | y least / mean | dx least / mean | dw least / mean |")
    print("|---|---|---|---|---|---|")
    for shape in SHAPES:
        for fmt in ("hybrid", "e4m3"):
            for autocast in (False, True):
                recipe = Fp8Recipe(format=fmt, backend="emulated")
                runs = torch.tensor([measure(shape, recipe, autocast, seed) for seed in range(options.seeds)])
                cells = [f"{column.min():.1f} / {column.mean():.1f}" for column in runs.T]
                name = f"{shape[0]} x {shape[1]} -> {shape[2]}"
                print(f"| {name} | {fmt} | {'bf16' if autocast else 'float32'} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
