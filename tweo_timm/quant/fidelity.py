"""How far a quantized model is from the float one, layer by layer: signal to noise, and the error of the logits.

The noise at a layer is what has accumulated up to it. The signal-to-noise ratio of a whole tensor *rises* with an
outlier, which adds signal and little noise while everything else loses resolution: so it is given again without the
largest element of every image, where the damage shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from tweo_timm.blocks import find_blocks
from tweo_timm.layers import projections_called
from tweo_timm.modes import evaluating
from tweo_timm.quant.quantizer import is_quantizable
from tweo_timm.stats import decibels
from tweo_timm.stream import answers_of, stream_of
from tweo_timm.wide import wide

_CHUNK = 8
"""Images compared at a time: the outputs of all layers of both models are alive together."""


def fidelity(
    reference: nn.Module, quantized: nn.Module, batches: Tensor | Iterable[Tensor], blocks: str | None = None
) -> dict[str, Any]:
    """Compare a quantized model with its float original on given images.

    Args:
        reference: the float model; run in evaluation mode, and every module keeps its own.
        quantized: what `quantize_static` made of it.
        batches: preprocessed images (B, C, H, W), or batches of them; how they are batched does not matter.
        blocks: regular expression naming the blocks by hand; None finds them by structure.

    Returns:
        relative_error (of the logits: norm of the difference over norm), top1_agreement (share of images), num_images,
        and layers: one dict for each quantized layer and each block, in the order of execution, with name, kind
        ("layer" or "block"), sqnr_db and sqnr_without_peak_db; null where there is no noise or no signal.

    Raises:
        ValueError: without images, or if `quantized` is not what `quantize_static` made.
    """
    reference, quantized = unwrap_model(reference), unwrap_model(quantized)
    if not hasattr(quantized, "quantization"):
        raise ValueError("the second model has no quantized layer: pass what quantize_static returned")
    kinds = {name: "layer" for name, module in reference.named_modules() if is_quantizable(module)}
    kinds |= dict.fromkeys(find_blocks(reference, blocks), "block")
    batches = [batches] if isinstance(batches, Tensor) else batches
    device = next(reference.parameters()).device
    sums: dict[str, Tensor] = {}
    logits, agreements, num_images = torch.zeros(2, dtype=torch.float64), 0, 0
    with (
        evaluating(reference),
        torch.no_grad(),
        projections_called(reference),
        _Outputs(reference, kinds) as target,
        _Outputs(quantized, kinds) as got,
    ):
        for images in (chunk for batch in batches for chunk in torch.split(batch, _CHUNK)):
            y, y_q = (answers_of(m(images.to(device)), len(images)) for m in (reference, quantized))
            num_images += len(images)
            agreements += int((y.argmax(-1) == y_q.argmax(-1)).sum())
            logits += _powers(y, y_q)[:2]
            for name in got.seen:
                new = _powers(target.seen[name], got.seen[name])
                sums[name] = sums[name] + new if name in sums else new
    if not num_images:
        raise ValueError("fidelity is measured on at least one image")
    return {
        "relative_error": math.sqrt(float(logits[1] / logits[0])) if logits[0] > 0 else None,
        "top1_agreement": agreements / num_images,
        "num_images": num_images,
        "layers": [
            {
                "name": name,
                "kind": kinds[name],
                "sqnr_db": decibels(powers[0], powers[1]),
                "sqnr_without_peak_db": decibels(powers[2], powers[3]),
            }
            for name, powers in sums.items()
        ],
    }


class _Outputs:
    """The outputs of named modules in the last forward pass."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._modules = {name: model.get_submodule(name) for name in names}
        self.seen: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> _Outputs:
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in self._modules.items()]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.seen[name] = stream_of(output, module)

        return hook


def _powers(y: Tensor, y_q: Tensor) -> Tensor:
    """Return signal and noise, and both without each image's largest element, summed over images in float64."""
    y, noise = wide(y.flatten(1)), wide((y - y_q).flatten(1))
    peak = y.abs().argmax(1, keepdim=True)
    signal_power, noise_power = y.square(), noise.square()
    whole = [signal_power.sum(), noise_power.sum()]
    rest = [whole[0] - signal_power.gather(1, peak).sum(), whole[1] - noise_power.gather(1, peak).sum()]
    return torch.stack([*whole, *(power.clamp(min=0) for power in rest)]).cpu()
