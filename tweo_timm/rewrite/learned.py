"""A learned rotation: descent on the orthogonal matrices that fix ones, for a stream without peaks.

The objective is TWEO's idea as one that changes nothing but the basis: a high norm (p = 8, between TWEO's 4 and the
maximum that a quantizer's step follows) of the stream at every site, relative to its rms there, which no rotation
changes. Relative, because the last blocks are the largest and would otherwise be all that counts; L_TWEO itself, taken
literally, did worse for that reason. The sites are what enters and what leaves every norm of the blocks: the stream
that is quantized, and the inputs of the layers that read it.

Steps are Cayley transforms of a skew matrix that annihilates ones, so that every iterate is a rotation that fixes them.
Their size is an angle, which needs no tuning from model to model: it grows while the objective falls, and is halved
when it does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tweo_timm.rewrite.change import observed
from tweo_timm.rewrite.orthogonal import nearest_orthogonal
from tweo_timm.structure import Stream

POWER = 8
STEPS = 200
ROWS = 512
"""Tokens, or rows of a weight, kept for each site: half of them those with the largest values, half drawn."""
_ANGLE = 0.02
"""By how much the first step turns a direction, in radians (rms)."""
_GROWTH = 1.1
_MOMENTUM = 0.7
_REPORT = 20


def stream_samples(
    model: nn.Module, stream: Stream, batches: Sequence[Tensor], generator: torch.Generator
) -> dict[str, list[Tensor]]:
    """Collect what a rotation turns at each stage's sites, from a folded model.

    Returns:
        Stage -> its sites, each (rows, width) float32: tokens for what goes in and out of norms, rows of weights.
    """
    samples: dict[str, dict[str, Tensor]] = {stage.name: {} for stage in stream.stages}
    share = max(2, ROWS // len(batches))

    stages = {norm: stage for stage in stream.stages for norm in stage.norms}

    def collect(norm: str, entered: Tensor, output: Tensor) -> None:
        sites, width = samples[stages[norm].name], stages[norm].width
        for name, value in ((f"{norm}, in", entered), (f"{norm}, out", output)):
            chosen = _choose(value.reshape(-1, width), share, generator)
            sites[name] = torch.cat([sites[name], chosen]) if name in sites else chosen

    observed(model, stages, batches, collect)
    for stage in stream.stages:
        for port in stage.ports:
            if port.module and port.parameter == "weight":
                rows = model.get_parameter(port.name).movedim(port.axis, -1).reshape(-1, stage.width)
                samples[stage.name][port.name] = _choose(rows, ROWS, generator)
    return {name: list(sites.values()) for name, sites in samples.items()}


def _choose(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The half of `count` rows with the largest values, and as many drawn from all."""
    rows = rows.detach().float().cpu()
    peaks = rows.abs().amax(1).topk(min(count // 2, len(rows))).indices
    drawn = torch.randint(len(rows), (min(count // 2, len(rows)),), generator=generator)
    return rows[torch.cat([peaks, drawn])]


def learn_orthogonal(
    sites: Sequence[Tensor],
    start: Tensor,
    steps: int = STEPS,
    progress: Callable[[str], None] = lambda line: None,
) -> Tensor:
    """Descend from `start` to a Q that fixes ones and under which no site has large values.

    Args:
        sites: activations (tokens, width) each.
        start: (width, width), orthogonal, fixing ones.
        steps: tried; one that does not help is taken back and halves those that follow.
        progress: called with a line every 20 steps.

    Returns:
        (width, width) float64.
    """
    scaled = [site / site.square().mean().sqrt() for site in sites if bool(site.any())]
    angle = _ANGLE * math.sqrt(len(start))
    rotation, velocity = start.float(), torch.zeros_like(start, dtype=torch.float32)
    reached, gradient = _peakedness(scaled, rotation)
    for step in range(steps):
        if step % _REPORT == 0:
            progress(f"step {step} of {steps}: {POWER}-norm over rms {reached:.3f}")
        direction = _skew(gradient, rotation) + _MOMENTUM * velocity
        tried = _cayley(direction * (angle / direction.norm().clamp(min=1e-30))) @ rotation
        value, its_gradient = _peakedness(scaled, tried)
        if value < reached:
            rotation, reached, gradient, velocity = tried, value, its_gradient, direction
            angle *= _GROWTH
        else:
            velocity = torch.zeros_like(velocity)
            angle /= 2
    progress(f"step {steps} of {steps}: {POWER}-norm over rms {reached:.3f}")
    return nearest_orthogonal(rotation)


def _peakedness(sites: Sequence[Tensor], rotation: Tensor) -> tuple[float, Tensor]:
    """The mean over sites of the p-norm of x Q (a mean over elements, for an rms of 1), and its gradient in Q."""
    total, gradient = 0.0, torch.zeros_like(rotation)
    for site in sites:
        turned = site @ rotation
        powers = turned.abs().pow_(POWER - 1)
        norm = float((powers * turned.abs()).mean()) ** (1 / POWER)
        total += norm
        gradient += site.T @ (powers.mul_(turned.sign_()).mul_(norm ** (1 - POWER) / site.numel()))
    return total / len(sites), gradient / len(sites)


def _skew(gradient: Tensor, rotation: Tensor) -> Tensor:
    """The direction of descent as a skew matrix that annihilates ones."""
    product = rotation @ gradient.T
    skew = product - product.T
    skew = skew - skew.mean(0, keepdim=True)
    return skew - skew.mean(1, keepdim=True)


def _cayley(skew: Tensor) -> Tensor:
    """(I - A / 2)^-1 (I + A / 2), orthogonal."""
    identity = torch.eye(len(skew))
    turned: Tensor = torch.linalg.solve(identity - skew / 2, identity + skew / 2)
    return turned
