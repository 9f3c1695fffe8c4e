"""Contradiction stethoscope: is an outlier caused by the data, or by the trained weights?

Three runs of arXiv:2511.23225 contradict each other if data is the cause: trained weights on real data, trained weights
on random pixels (uniform in [0, 255], then the model's normalisation), random weights on real data. Controls make the
verdict trustworthy: random weights with LayerScale at 1, where the usual initialisation makes every block an identity
and the third run says nothing; trained weights shuffled within each layer, which keeps their distribution and destroys
their alignment; and images of one colour, which keep brightness and have no content.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from tweo_timm.blocks import find_blocks
from tweo_timm.diagnose.random_init import open_blocks, random_model
from tweo_timm.diagnose.samples import as_batches
from tweo_timm.modes import evaluating
from tweo_timm.records import plain
from tweo_timm.tap import BlockTap

PRESENT = 0.5
"""A peak is still there in another arm if it is at least this share of the trained one on real data."""

ABSENT = 0.2
"""A peak is gone in another arm if it is at most this share."""

RULE = (
    "Each ratio is a mean image peak over that of trained weights on real data. A block is data-independent if random "
    f"pixels keep at least {PRESENT} of its peak and random weights at most {ABSENT}, data-dependent if random pixels "
    f"keep at most {ABSENT}, and inconclusive otherwise. Where the usual initialisation makes blocks identities, the "
    "random weights are those with LayerScale at 1."
)


def stethoscope(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    model_factory: Callable[[], nn.Module] | None = None,
    seed: int = 0,
    blocks: str | None = None,
) -> dict[str, Any]:
    """Run the arms and controls, and say for every block whether its peak depends on data.

    Args:
        model: trained timm model; it is run in evaluation mode, not changed, and every module keeps its mode.
        images: preprocessed images (B, C, H, W), or batches of them.
        mean: of the preprocessing, in units of pixel / 255; None takes that of the model's pretrained_cfg.
        std: likewise.
        model_factory: returns the same architecture with random weights; None creates it
            by name, or draws the parameters of a copy again.
        seed: of random pixels, random weights and the shuffle.
        blocks: regular expression naming the transformer blocks by hand; None finds them by structure.

    Returns:
        arms: name -> list of one dict a block with name, avg_max, avg_min (means over images of the largest and the
        smallest value), mean_abs, mean_peak (mean over images of the largest magnitude), peak_abs. Names: trained_data,
        trained_random_pixels, random_data, and the controls random_opened_data (only if degenerate), shuffled_data,
        trained_constant.
        verdicts: one dict a block with name, verdict, random_pixel_ratio, random_weight_ratio, shuffled_ratio,
        constant_ratio; counts: verdict -> number of blocks; rule.
        degenerate (the random arm's blocks are identities), opened_parameters (set to 1 in the control), random_init
        ("factory", "created" by timm from the name of the architecture, or "drawn again"), drawn_by_rule (parameter ->
        rule), num_images, seed.

    Raises:
        ValueError: without images, or without mean and std where the model names none.

    Source: arXiv:2511.23225, Contradiction Stethoscope; the controls and the rule are ours.
    """
    model = unwrap_model(model)
    mean, std = _normalisation(model, mean, std)
    batches = as_batches(images)
    fresh, origin, drawn = (model_factory(), "factory", {}) if model_factory else random_model(model, seed)
    fresh.to(next(model.parameters()).device)
    random_pixels = _random_pixels(batches, mean, std, seed)
    constant = [batch.mean((-2, -1), keepdim=True).expand_as(batch) for batch in batches]
    arms = {
        "trained_data": _run(model, batches, blocks),
        "trained_random_pixels": _run(model, random_pixels, blocks),
        "random_data": _run(fresh, batches, blocks),
    }
    opened_model = copy.deepcopy(fresh)
    opened = open_blocks(opened_model)
    if opened:
        arms["random_opened_data"] = _run(opened_model, batches, blocks)
    arms["shuffled_data"] = _run(_shuffled(model, seed), batches, blocks)
    arms["trained_constant"] = _run(model, constant, blocks)
    verdicts = _verdicts(arms)
    names = [row["verdict"] for row in verdicts]
    record: dict[str, Any] = plain(
        {
            "arms": arms,
            "verdicts": verdicts,
            "counts": {name: names.count(name) for name in ("data-independent", "data-dependent", "inconclusive")},
            "rule": RULE,
            "degenerate": bool(opened),
            "opened_parameters": opened,
            "random_init": origin,
            "drawn_by_rule": drawn,
            "num_images": sum(len(batch) for batch in batches),
            "seed": seed,
        }
    )
    return record


def _normalisation(
    model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Sequence[float], Sequence[float]]:
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    mean, std = mean or config.get("mean"), std or config.get("std")
    if not mean or not std:
        raise ValueError("random pixels need the preprocessing's mean and std: pass them, the model names none")
    return mean, std


def _random_pixels(batches: list[Tensor], mean: Sequence[float], std: Sequence[float], seed: int) -> list[Tensor]:
    """Uniform integers in [0, 255], normalised; the same images however they are batched."""
    generator = torch.Generator().manual_seed(seed)
    noise = []
    for batch in batches:
        pixels = torch.stack([torch.randint(0, 256, image.shape, generator=generator) for image in batch])
        centre, spread = (torch.tensor(value).reshape(1, -1, 1, 1) for value in (mean, std))
        noise.append(((pixels / 255 - centre) / spread).to(batch.dtype))
    return noise


def _shuffled(model: nn.Module, seed: int) -> nn.Module:
    """A copy with the elements of every Linear weight in random order."""
    shuffled = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in shuffled.modules():
            if isinstance(module, nn.Linear):
                flat = module.weight.flatten()
                order = torch.randperm(flat.numel(), generator=generator).to(flat.device)
                module.weight.copy_(flat[order].reshape(module.weight.shape))
    return shuffled


def _run(model: nn.Module, batches: list[Tensor], blocks: str | None) -> list[dict[str, Any]]:
    """Return one row a block: means over images of the extremes, summed in float64.

    Blocks that see an image in several rows (the patches of MobileViT) have them one after the other.
    """
    sums: dict[str, Tensor] = {}
    peaks: dict[str, Tensor] = {}

    def observe(name: str, block: nn.Module, output: Tensor) -> None:
        x = output.detach().reshape(len(images), -1).float()
        peak_B = x.abs().amax(1)
        columns = torch.stack([x.amax(1), x.amin(1), x.abs().mean(1), peak_B]).double().sum(1)
        sums[name] = sums[name] + columns if name in sums else columns
        peaks[name] = torch.maximum(peaks[name], peak_B.max()) if name in peaks else peak_B.max()

    num_images, device = 0, next(model.parameters()).device
    with evaluating(model), torch.no_grad(), BlockTap(find_blocks(model, blocks), observe):
        for images in batches:
            model(images.to(device))
            num_images += len(images)
    keys = ("avg_max", "avg_min", "mean_abs", "mean_peak")
    return [
        {"name": name, **dict(zip(keys, (total / num_images).tolist(), strict=True)), "peak_abs": float(peaks[name])}
        for name, total in sums.items()
    ]


def _verdicts(arms: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    weights = "random_opened_data" if "random_opened_data" in arms else "random_data"
    columns = {
        "random_pixel_ratio": "trained_random_pixels",
        "random_weight_ratio": weights,
        "shuffled_ratio": "shuffled_data",
        "constant_ratio": "trained_constant",
    }
    rows = []
    for index, trained in enumerate(arms["trained_data"]):
        peak = trained["mean_peak"]
        ratios = {
            column: arms[arm][index]["mean_peak"] / peak if peak > 0 else float("nan")
            for column, arm in columns.items()
        }
        rows.append({"name": trained["name"], "verdict": _verdict(ratios), **ratios})
    return rows


def _verdict(ratios: dict[str, float]) -> str:
    if ratios["random_pixel_ratio"] >= PRESENT and ratios["random_weight_ratio"] <= ABSENT:
        return "data-independent"
    if ratios["random_pixel_ratio"] <= ABSENT:
        return "data-dependent"
    return "inconclusive"
