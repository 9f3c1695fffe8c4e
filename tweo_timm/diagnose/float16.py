"""What overflows in float16, site by site, and by which factor: four readings, because these are four failures.

    fp16            a value that is stored: 65504 over the largest
    fp16-logits     attention's logits, which a fused product never stores and an unfused one does
    fp16-squares    the square inside a LayerNorm that an engine computes in float16: 255.9 over the largest |x - mean|
    fp16-sums       the sum of those squares over the channels: the rms of a token, against 255.9 over the root of the
                    width (13 for 384 channels, 9 for 768, 8 for 1024)

PyTorch's own float16 LayerNorm computes inside in float32, so the last two do not show in a half-precision module;
TensorRT and onnxruntime do them in float16 where the norm reaches them in pieces. A rotation of the stream leaves every
token's rms as it is: it mends values and squares, and no sum.

Every value that the model computes from images is seen. Functions between modules belong to the module whose code
calls them (the residual adds of a block to the block), so that names of sites are names of modules. Read in float32,
and compared with float16's largest number; tests hold it against arithmetic in float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.utils import unwrap_model
from torch import Tensor, nn

from tweo_timm.flow import HookedMode, name_of, tensors_in
from tweo_timm.layers import projections_called, sees_images
from tweo_timm.modes import evaluating

LARGEST = 65504.0
"""The largest number of float16."""
SQUARE = math.sqrt(LARGEST)
"""The largest number whose square it holds: 255.9."""
VALUES, LOGITS, SQUARES, SUMS = READINGS = ("fp16", "fp16-logits", "fp16-squares", "fp16-sums")

_PRODUCTS = {"matmul", "__matmul__", "bmm", "einsum", "baddbmm"}
_CHANGES_NOTHING = {"dropout", "__get__"}
_FUSED = "scaled_dot_product_attention"
WHOLE = "model"
"""The site of what the model's own forward computes, such as the sum with position embeddings."""


@dataclass
class Site:
    """One reading at one place.

    Attributes:
        name: of the module.
        peak_abs: the largest value; of squares the largest |x - mean|, of sums the largest rms of a token.
        limit: what it may be.
        began: a number that orders sites by when they first overflowed; None where nothing did.
    """

    name: str
    peak_abs: float
    limit: float
    began: int | None = None

    @property
    def factor(self) -> float:
        """By how much everything here may grow; below 1 it overflows."""
        if not math.isfinite(self.peak_abs):
            return 0.0
        return self.limit / self.peak_abs if self.peak_abs else math.inf

    def to_json(self) -> dict[str, Any]:
        """Return name, peak_abs and factor."""
        return {"name": self.name, "peak_abs": self.peak_abs, "factor": self.factor}


@dataclass
class Float16Readings:
    """All readings of one model.

    Attributes:
        sites: reading -> its sites in the order of execution.
        outputs: module -> the largest value that it returns, whatever it computes inside.
    """

    sites: dict[str, list[Site]] = field(default_factory=lambda: {reading: [] for reading in READINGS})
    outputs: dict[str, float] = field(default_factory=dict)

    def headroom(self, reading: str) -> float | None:
        """The smallest factor of a reading; None where the model has no such site."""
        return min((site.factor for site in self.sites[reading]), default=None)

    def overflowing(self, reading: str) -> list[Site]:
        """The sites that overflow, in the order in which they do: the first is where it begins."""
        return sorted((site for site in self.sites[reading] if site.factor < 1), key=lambda site: site.began or 0)

    def merged(self, other: Float16Readings) -> Float16Readings:
        """Return the larger of two readings of one model, on other images, at each site."""
        both = Float16Readings()
        for reading, sites in self.sites.items():
            theirs = {site.name: site for site in other.sites[reading]}
            pairs = [(site, theirs.get(site.name, site)) for site in sites]
            both.sites[reading] = [min(pair, key=lambda site: site.factor) for pair in pairs]
        both.outputs = {name: _larger(peak, other.outputs.get(name, peak)) for name, peak in self.outputs.items()}
        return both


def float16_readings(model: nn.Module, batches: Iterable[Tensor]) -> Float16Readings:
    """Read what float16 would have to hold.

    Args:
        model: a float model; run in evaluation mode, and every module keeps its own.
        batches: preprocessed images (B, C, H, W), of one size or of several; at least one.

    Raises:
        ValueError: without images.
    """
    bare, num_images = unwrap_model(model), 0
    device = next(bare.parameters()).device
    with evaluating(bare), _Reader(bare) as reader, torch.no_grad(), projections_called(bare):
        for images in batches:
            num_images += len(images)
            bare(images.to(device))
    if not num_images:
        raise ValueError("float16 is read on at least one image")
    return reader.found()


class _Reader(HookedMode):
    """Sees every function of a forward pass, and knows in whose code it is called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._owners: list[str] = []
        self._products: dict[str, float] = {}
        """Owner -> the largest of a product and what became of it: logits if a softmax follows, values if none does."""
        self._sites: dict[str, dict[str, Site]] = {reading: {} for reading in READINGS}
        self._outputs: dict[str, float] = {}
        self._began = 0

    def hooks(self) -> Iterator[Any]:
        """Of every module, to know whose code runs, and of every norm."""
        for name, module in self._model.named_modules():
            yield module.register_forward_pre_hook(self._begin(name or WHOLE), prepend=True)
            if _is_norm(module) and sees_images(name):
                yield module.register_forward_pre_hook(self._norm(name))
            yield module.register_forward_hook(self._end(name or WHOLE), always_call=True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._owners and sees_images(self._owners[-1]) and name_of(func) not in _CHANGES_NOTHING:
            with torch._C.DisableTorchFunction():
                self._see(name_of(func), args, kwargs, result)
        return result

    def found(self) -> Float16Readings:
        """Return what was read."""
        return Float16Readings(
            {reading: list(sites.values()) for reading, sites in self._sites.items()}, dict(self._outputs)
        )

    def _see(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        owner = self._owners[-1]
        if name == _FUSED:
            self._raise(LOGITS, owner, _largest_logit(*args, **kwargs), LARGEST)
        elif name in ("softmax", "_softmax"):
            self._close_product(LOGITS)
        peak = max((_largest(tensor) for tensor in tensors_in(result)), default=0.0)
        if name in _PRODUCTS:
            self._close_product(VALUES)
            self._products[owner] = peak
        elif owner in self._products:
            self._products[owner] = max(self._products[owner], peak)
        elif not _is_norm(self._model.get_submodule(owner) if owner != WHOLE else self._model):
            self._raise(VALUES, owner, peak, LARGEST)

    def _close_product(self, reading: str) -> None:
        """Say what the product of the innermost owner that has one was."""
        owner = next((owner for owner in reversed(self._owners) if owner in self._products), None)
        if owner is not None and (reading == LOGITS or owner == self._owners[-1]):
            self._raise(reading, owner, self._products.pop(owner), LARGEST)

    def _begin(self, name: str) -> Callable[..., None]:
        return lambda module, args: self._owners.append(name)

    def _end(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if name in self._products:
                self._raise(VALUES, name, self._products.pop(name), LARGEST)
            with torch._C.DisableTorchFunction():
                peak = max((_largest(tensor) for tensor in tensors_in(output)), default=0.0)
            self._outputs[name] = _larger(self._outputs.get(name, 0.0), peak)
            if _is_norm(module) and isinstance(output, Tensor) and sees_images(name):
                self._raise(VALUES, name, peak, LARGEST)
            self._owners.pop()

        return hook

    def _norm(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            with torch._C.DisableTorchFunction():
                axis = 1 if isinstance(module, LayerNorm2d) else -1
                x = args[0].detach().float()
                centred = x if "rms" in type(module).__name__.lower() else x - x.mean(axis, keepdim=True)
                rms = centred.square().mean(axis).sqrt()
                self._raise(SQUARES, name, _largest(centred), SQUARE)
                self._raise(SUMS, name, _largest(rms), SQUARE / math.sqrt(x.shape[axis]))

        return hook

    def _raise(self, reading: str, name: str, peak: float, limit: float) -> None:
        site = self._sites[reading].setdefault(name, Site(name, 0.0, limit))
        site.peak_abs = _larger(site.peak_abs, peak)
        if site.factor < 1 and site.began is None:
            self._began += 1
            site.began = self._began


def _larger(before: float, peak: float) -> float:
    """The larger of two; NaN, once seen, stays."""
    return before if before >= peak or math.isnan(before) else peak


def _is_norm(module: nn.Module) -> bool:
    return hasattr(module, "normalized_shape")


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().amax()) if x.is_floating_point() and x.numel() else 0.0


def _largest_logit(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **kwargs: Any
) -> float:
    """The largest logit of a fused attention, as an unfused one stores it: with its bias, masked ones left out."""
    scale = kwargs.get("scale") or query.shape[-1] ** -0.5
    logits = (query.detach().float() * scale) @ key.detach().float().transpose(-2, -1)
    if attn_mask is not None and attn_mask.is_floating_point():
        biased = logits + attn_mask
        logits = torch.where(attn_mask.isneginf(), logits, biased)
    return _largest(logits)
