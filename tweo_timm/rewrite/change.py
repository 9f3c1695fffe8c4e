"""What a rewriting changes: activations at every site, before and after, and the model's output, which it must not.

A description can miss a parameter, so nothing is believed but this comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tweo_timm.modes import evaluating
from tweo_timm.stats import ActivationStats
from tweo_timm.stream import answers_of
from tweo_timm.structure import Stream

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}
"""The largest relative change of the output that rounding may explain, by the dtype of the weights."""


@dataclass(frozen=True)
class Spread:
    """How far the largest activation of a site stands out.

    Attributes:
        peak_abs: max |x|.
        kurtosis: the fourth standardized moment, 3 for a Gaussian.
        max_to_median: max |x| over the median of |x|.
    """

    peak_abs: float
    kurtosis: float
    max_to_median: float


@dataclass(frozen=True)
class Site:
    """A block (its output, the stream) or a norm (its output), before and after."""

    name: str
    before: Spread
    after: Spread


@dataclass
class RotationReport:
    """What `rotate` did, ready for JSON by `to_json`.

    Attributes:
        method: "random", "learned" or "hadamard".
        seed: of the random matrices.
        output_error: the largest relative change of the output, |y' - y| / |y|, over the images that were compared.
        images: how many those were.
        sites: blocks and norms of the rotated stages.
        folded: norm or LayerScale -> where it went.
        left: stages that stay as they were -> the reason.
        digests: stage -> digest of its Q.
        rotations: stage -> Q, (width, width) float64.
        rotated_features: whether the model has no head and hands out features in the new basis.
        norms: stage -> the affine (weight, bias, constant) that its last norm lost, where no head reads it.
    """

    method: str
    seed: int
    output_error: float
    images: int
    sites: list[Site]
    folded: dict[str, str]
    left: dict[str, str]
    digests: dict[str, str]
    rotations: dict[str, Tensor] = field(repr=False)
    norms: dict[str, dict[str, Tensor]] = field(repr=False, default_factory=dict)
    rotated_features: bool = False

    def to_json(self) -> dict[str, Any]:
        """Everything but the matrices."""
        fields = {name: value for name, value in vars(self).items() if name not in ("rotations", "norms", "sites")}
        return {**fields, "sites": [asdict(site) for site in self.sites]}


@dataclass
class View:
    """What was seen in one look at a model: outputs by image, and the spread of each site."""

    outputs: Tensor
    spreads: dict[str, Spread]


def look(model: nn.Module, stream: Stream, batches: Sequence[Tensor]) -> View:
    """Run the model over the images in evaluation mode and record its outputs and its sites.

    Args:
        model: any mode; it is as before afterwards.
        stream: names the blocks and norms.
        batches: images (B, C, H, W).

    Raises:
        ValueError: if an output is not finite or no tensor, or there are no images.
    """
    stats: dict[str, ActivationStats] = {}

    def count(name: str, entered: Tensor, output: Any) -> None:
        stats.setdefault(name, ActivationStats()).update(output)

    names = [name for stage in stream.stages for name in (*stage.blocks, *stage.norms)]
    together = torch.cat([output.flatten(1).double() for output in observed(model, names, batches, count)])
    if not bool(torch.isfinite(together).all()):
        raise ValueError("the model's output is not finite on these images: nothing can be compared")
    fields = ("peak_abs", "kurtosis", "max_to_median")
    summaries = {name: counted.summary() for name, counted in stats.items()}
    return View(together, {name: Spread(*(found[field] for field in fields)) for name, found in summaries.items()})


def observed(
    model: nn.Module, names: Iterable[str], batches: Sequence[Tensor], see: Callable[[str, Tensor, Tensor], None]
) -> list[Tensor]:
    """Run the model as `run` does, and call `see(name, input, output)` at each named module; return the outputs."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, output: see(name, args[0], output)

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        return list(run(model, batches))
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the output for each batch, on the CPU; evaluation mode, no gradients, the model's own device and dtype."""
    parameter = next(model.parameters())
    with evaluating(model), torch.no_grad():
        for images in batches:
            output = model(images.to(parameter.device, parameter.dtype))
            yield (output if isinstance(output, Tensor) else answers_of(output, len(images))).cpu()


def output_error(before: Tensor, after: Tensor) -> float:
    """The largest relative change of an image's output."""
    return float(((after - before).norm(dim=1) / before.norm(dim=1).clamp(min=1e-30)).max())


def tolerance(model: nn.Module) -> float:
    """The largest change that rounding may explain; that of the coarsest weights."""
    return max(TOLERANCES.get(parameter.dtype, 0.0) for parameter in model.parameters())


def generated_images(model: Any, count: int = 4) -> Tensor:
    """Gaussian images of the size that a model takes, for a comparison without data: always the same."""
    channels, *size = _input_size(model)
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(0))


def _input_size(model: Any) -> tuple[int, int, int]:
    """Channels, height and width: timm's, or those in the configuration of a model of transformers."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    side = getattr(config, "image_size", None)
    if side is not None:
        height, width = (side, side) if isinstance(side, int) else side
        return getattr(config, "num_channels", 3), height, width
    size = (
        getattr(model.patch_embed, "img_size", None) or (getattr(model, "default_cfg", None) or {})["input_size"][-2:]
    )
    return getattr(model, "in_chans", None) or 3, size[0], size[1]
