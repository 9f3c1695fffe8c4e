"""Activation statistics at every site of a model, not only at block outputs.

The largest activation of a model is often not a block output: LayerNorm outputs and the inputs of fc2 exceed it, and
those are what FP8 and INT8 layers read. Sites are the outputs of norms, the inputs and outputs of Linear layers, the
inputs of attention modules, and block outputs. The small networks that turn coordinates into position biases (SwinV2,
MaxViT) see no image and are left out.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.utils import unwrap_model
from torch import Tensor, nn

from tweo_timm.blocks import channel_axis, find_blocks
from tweo_timm.layers import projections_called, sees_images
from tweo_timm.quant.quantizer import QuantizedLayer
from tweo_timm.records import plain
from tweo_timm.stats import ActivationStats, gather, nan_largest
from tweo_timm.stream import stream_of

KINDS = ("block", "norm", "attention_input", "linear_input", "linear_output")
_ATTENTION = re.compile(r"attn|attention|^XCA$", re.IGNORECASE)


class SiteRecorder:
    """Counts the activations at every site while its context is open; see `record_sites`."""

    def __init__(self, model: nn.Module, blocks: str | None = None, kinds: tuple[str, ...] = KINDS) -> None:
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise ValueError(f"site kind {unknown[0]!r} is not known; accepted are {', '.join(KINDS)}")
        self._model = unwrap_model(model)
        self._kinds = kinds
        self._blocks = find_blocks(self._model, blocks)
        self._num_images = 0
        self.stats: dict[tuple[str, str], ActivationStats] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> SiteRecorder:
        self._handles.append(self._model.register_forward_pre_hook(self._begin))
        for name, module in self._model.named_modules():
            for kind, value in self._sites(name, module):
                self._handles.append(module.register_forward_hook(self._hook(name, kind, value)))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _sites(self, name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
        """Yield (kind, "input" or "output") of what is counted at a module."""
        if not sees_images(name):
            return
        is_linear = isinstance(module, nn.Linear) or (isinstance(module, QuantizedLayer) and module.geometry is None)
        candidates = {
            "block": (name in self._blocks, "output"),
            "norm": (hasattr(module, "normalized_shape"), "output"),
            "attention_input": (name not in self._blocks and _is_attention(module), "input"),
            "linear_input": (is_linear, "input"),
            "linear_output": (is_linear, "output"),
        }
        for kind in self._kinds:
            wanted, value = candidates[kind]
            if wanted:
                yield kind, value

    def _begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self._num_images = len(args[0]) if args and isinstance(args[0], Tensor) else 0

    def _hook(self, name: str, kind: str, value: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = args[0] if value == "input" else stream_of(output, module) if kind == "block" else output
            if isinstance(x, Tensor):
                with torch.no_grad(), torch._C.DisableTorchFunction():  # so that a StreamQuantizer counts no addition
                    self._count((kind, name), module, x)

        return hook

    def _count(self, site: tuple[str, str], module: nn.Module, x: Tensor) -> None:
        axis = _channel_axis(site[0], module, x)
        if 0 < self._num_images < len(x) and len(x) % self._num_images == 0:  # windows: an image's are consecutive
            x = x.movedim(axis, -1)
            x, axis = x.reshape(self._num_images, -1, x.shape[-1]), -1
        if site not in self.stats:
            self.stats[site] = ActivationStats(axis)
        self.stats[site].update(x)

    def gather(self) -> None:
        """Merge what all processes of the default group have counted, so that every one holds the whole."""
        self.stats = {site: stats for site, stats in gather(self.stats).items() if stats is not None}

    def summary(self) -> dict[str, Any]:
        """Return the largest peak and the statistics of every site.

        Returns:
            peak_abs, peak_site, peak_kind, and sites: one dict a site in the order of first execution, with name (the
            module's), kind (one of KINDS) and the fields of `ActivationStats.summary`; null where not finite.

        Raises:
            RuntimeError: if no forward pass was seen.
        """
        if not self.stats:
            raise RuntimeError("no activation was seen: run the model inside the context")
        rows = [{"name": name, "kind": kind, **stats.summary()} for (kind, name), stats in self.stats.items()]
        worst = max(rows, key=lambda row: nan_largest(row["peak_abs"]))
        peak = {"peak_abs": worst["peak_abs"], "peak_site": worst["name"], "peak_kind": worst["kind"]}
        record: dict[str, Any] = plain({**peak, "sites": rows})
        return record


def _is_attention(module: nn.Module) -> bool:
    """Say whether this is an attention module with weights, and the innermost one."""
    named = [part for part in module.modules() if _ATTENTION.search(type(part).__name__)]
    has_layers = any(isinstance(part, (nn.Linear, nn.Conv2d, QuantizedLayer)) for part in module.modules())
    return has_layers and named == [module]


def _channel_axis(kind: str, module: nn.Module, x: Tensor) -> int:
    if kind == "block":
        return channel_axis(module, x)
    if kind == "norm":
        return 1 if isinstance(module, LayerNorm2d) else -1
    convolves = any(isinstance(child, nn.Conv2d) for child in module.children())
    return 1 if kind == "attention_input" and x.ndim == 4 and convolves else -1


@contextlib.contextmanager
def record_sites(model: nn.Module, blocks: str | None = None, kinds: tuple[str, ...] = KINDS) -> Iterator[SiteRecorder]:
    """Count the activations at every site of every forward pass inside the context.

    Windowed layers see windows, not images: their windows are folded back, so that "token" counts an image's tokens in
    the order of its windows. Statistics do not depend on the batch size.

    Args:
        model: a timm model, float or quantized, in any mode; nothing about it is changed.
        blocks: regular expression naming the blocks by hand; None finds them by structure.
        kinds: which kinds of sites to count, all by default.

    Raises:
        ValueError: for an unknown kind, or a model without transformer blocks.
    """
    with projections_called(unwrap_model(model)), SiteRecorder(model, blocks, kinds) as recorder:
        yield recorder
