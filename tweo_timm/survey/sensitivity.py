"""Which layers and sites a low-precision format hurts most, found by one backward pass and not by trying each.

The score of a site: the mean over images of (sum over the site of gradient times error)^2. The error is what the format
does to the site's output when everything before it is float; the gradient is that of the cross-entropy against labels
drawn from the model's own softmax. So its square is, on average over labels, twice the divergence that the site alone
would cause (the Fisher information in the direction of the error). A model without a head has no softmax: there the
gradient is that of a random direction of its features, and the score is the mean square of their change.

The sum is squared after it is taken: errors of a layer cancel, or add up. Sites whose error is not finite come first.

A gradient speaks for small errors. Where whole channels are rounded away (q and k beside a v that is a thousand times
larger: attention becomes uniform, and a softmax that was saturated has no gradient to say so) the site is tried alone
on the first batch, and its score is twice the divergence that was found. So is a layer that sees no images, such as
those of SwinV2's position bias: its gradient is that of all images together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tweo_timm.layers import sees_images
from tweo_timm.quant.quantizer import QuantizedLayer, Quantizer
from tweo_timm.quant.stream import StreamQuantizer

_CHUNK = 8
"""Images at a time: the outputs of all sites are alive together."""
DRAWS = 8
"""Labels drawn for each image."""
_LOST_ERROR, _LOST_CHANNELS = 0.5, 0.1
"""A channel is lost if its error has this share of its root mean square; a site is tried alone if so many are."""


@dataclass(frozen=True)
class Sensitivity:
    """How much a format hurts one layer or site.

    Attributes:
        name: as `quantization_scales` has it, and `keep_float` takes it.
        score: see the module; infinite where the error is not finite.
        peak_abs: the largest magnitude of what is rounded there.
    """

    name: str
    score: float
    peak_abs: float


def sensitivities(
    model: nn.Module, quantized: nn.Module, batches: Iterable[Tensor], *, features: bool = False, seed: int = 0
) -> list[Sensitivity]:
    """Score every layer and site that a scheme rounds, the most sensitive first.

    Args:
        model: the float model.
        quantized: what `quantize_static` made of it, without +rot and +smooth, which change the float model itself.
        batches: preprocessed images (B, C, H, W); a few dozen.
        features: the model returns features, not logits.
        seed: of labels or directions.

    Raises:
        ValueError: if nothing is quantized, or without images.
    """
    watched, spies = _watched(model, quantized)
    if not spies:
        raise ValueError("the model has no quantized layer: pass what quantize_static returned")
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    sums, count, batches = dict.fromkeys(spies, 0.0), 0, list(batches)
    for images in (part for batch in batches for part in torch.split(batch, _CHUNK)):
        logits = watched(images.to(device))
        count += len(images)
        for draw in range(DRAWS):
            loss = _loss(logits, features, generator)
            reached = {name: spy for name, spy in spies.items() if sees_images(name)}
            outputs = [spy.output for spy in reached.values()]
            gradients = torch.autograd.grad(loss, outputs, retain_graph=draw + 1 < DRAWS, allow_unused=True)
            for (name, spy), gradient in zip(reached.items(), gradients, strict=True):
                sums[name] += spy.squared_sum(gradient, len(images))
    if not count:
        raise ValueError("sensitivity is measured on at least one image")
    scores = {name: total / count / DRAWS for name, total in sums.items()} | _tried_alone(
        watched, spies, batches[0].to(device), features
    )
    found = [Sensitivity(name, _finite_or_infinite(score), spies[name].peak) for name, score in scores.items()]
    return sorted(found, key=lambda site: -site.score)


@torch.no_grad()
def _tried_alone(watched: nn.Module, spies: dict[str, _Spy], images: Tensor, features: bool) -> dict[str, float]:
    """The scores of sites that no gradient speaks for, each rounded while the others are float."""
    lost = {name: spy for name, spy in spies.items() if spy.lost_share() >= _LOST_CHANNELS or not sees_images(name)}
    if not lost:
        return {}
    exact, scores = watched(images).double(), {}
    for name, spy in lost.items():
        spy.rounds = True
        changed = watched(images).double()
        spy.rounds = False
        scores[name] = _damage(exact, changed, features)
    return scores


def _damage(exact: Tensor, changed: Tensor, features: bool) -> float:
    """What the score of a small error would be: twice the divergence, or the squared change of features."""
    if features:
        return float((changed - exact).square().sum(-1).mean())
    wanted = exact.log_softmax(-1)
    return 2 * float((wanted.exp() * (wanted - changed.log_softmax(-1))).sum(-1).mean())


def _loss(logits: Tensor, features: bool, generator: torch.Generator) -> Tensor:
    """The sum over images of what is differentiated."""
    if features:
        return (logits * torch.randn(logits.shape, generator=generator).to(logits)).sum()
    drawn = torch.multinomial(logits.detach().float().softmax(-1).cpu(), 1, generator=generator)
    return F.cross_entropy(logits.float(), drawn.flatten().to(logits.device), reduction="sum")


def _finite_or_infinite(score: float) -> float:
    return score if math.isfinite(score) else math.inf


class _Spy(nn.Module):
    """Stands at a site: computes in float, and keeps its output and the error that the format would make of it.

    Args:
        exact: the float layer; None where the site is a value that is rounded.
        rounded: the quantized layer, or the quantizer.
    """

    stream = 0
    rounds = False
    output: Tensor
    error: Tensor

    def __init__(self, exact: nn.Module | None, rounded: nn.Module) -> None:
        super().__init__()
        self.exact, self.rounded = exact, rounded
        self.peak = 0.0
        self.squares = torch.zeros(2, 1, dtype=torch.float64)
        """Of errors and of outputs, summed over everything but channels, (2, C)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # some models read kernel_size, weight and the like
            return getattr(self.__dict__["_modules"]["exact"], name)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the float model has here; when it `rounds`, what the format makes of it."""
        if self.rounds:
            with torch._C.DisableTorchFunction():
                return self.rounded(x)  # type: ignore[no-any-return]
        y: Tensor = x if self.exact is None else self.exact(x)
        if not torch.is_grad_enabled():  # another site is tried alone
            return y
        with torch.no_grad(), torch._C.DisableTorchFunction():  # a StreamQuantizer counts additions
            self.peak = max(self.peak, float(x.abs().amax()))
            self.error = self.rounded(x.detach()) - y.detach()
            self._count_channels(y.detach())
        self.output = y
        if not y.requires_grad:  # the first site, or one that sees no images: its weights are not asked for
            y.requires_grad_()
            return y.clone()  # a model may add to what a layer returns, which torch forbids where a graph begins
        return y

    def _count_channels(self, y: Tensor) -> None:
        axis = 1 if isinstance(self.exact, nn.Conv2d) else -1
        both = torch.stack([part.double().square().movedim(axis, -1).flatten(0, -2).sum(0) for part in (self.error, y)])
        self.squares = self.squares.to(both) + both

    def lost_share(self) -> float:
        """The share of channels of which the format leaves little."""
        error, output = self.squares
        return float((error > _LOST_ERROR**2 * output).double().mean())

    def squared_sum(self, gradient: Tensor | None, num_images: int) -> float:
        """The sum over images of (sum of gradient times error)^2; windows of an image are consecutive."""
        if gradient is None:
            return 0.0
        products = (gradient.double() * self.error.double()).reshape(num_images, -1).sum(1)
        return float(products.square().sum())


def _watched(model: nn.Module, quantized: nn.Module) -> tuple[nn.Module, dict[str, _Spy]]:
    """The float model in the shape of its quantized copy, with a spy at every layer and site."""
    watched = copy.deepcopy(quantized)
    for module in watched.modules():  # what a spy keeps must stay as it is
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    spies: dict[str, _Spy] = {}
    for name, module in list(watched.named_modules()):
        if isinstance(module, QuantizedLayer):
            exact = copy.deepcopy(model.get_submodule(name)).requires_grad_(False)
            spies[name] = _Spy(exact, module)
            watched.set_submodule(name, spies[name])
        elif isinstance(module, StreamQuantizer):
            for site, quantizer in list(module.quantizers.items()):
                assert isinstance(quantizer, Quantizer)
                spies[f"{module.block_name}.{site}"] = spy = _Spy(None, quantizer)
                module.quantizers[site] = spy
    return watched.eval(), spies


def share_of(sites: list[Sensitivity], count: int) -> float:
    """The share of all scores that the first `count` have; 1 where one of them is infinite."""
    scores = [site.score for site in sites]
    if any(math.isinf(score) for score in scores[:count]):
        return 1.0
    return sum(scores[:count]) / max(sum(scores), 1e-300)
