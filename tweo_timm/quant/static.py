"""Static AbsMax quantization of a timm model: calibrate on float activations, freeze the scales, return a copy.

"Quantization for dummies" (arXiv:2511.23225): no search, no learning, no exception list. Every Linear and convolution,
patch embedding and head included, has its input and its weight rounded to integers; `+res` rounds the residual stream
too (the case that separates models with outliers from models without), `+attn` the operands of both attention products.
Norms, softmax, GELU and biases stay float, as in the engines that run such models.

Refused: training (rounding has no gradient here), scripted models, torch.nn.MultiheadAttention and layers whose weight
is read past their forward, because a scale that is never applied would be a lie.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from tweo_timm.batches import image_batches
from tweo_timm.blocks import find_blocks
from tweo_timm.flow import HookedMode, name_of
from tweo_timm.fp8.patch import is_patched
from tweo_timm.layers import call_projections
from tweo_timm.quant.calibration import ABSMAX, cut_off, percentile_of, refuse_percentile
from tweo_timm.quant.compensate import compensate
from tweo_timm.quant.convert import Observation
from tweo_timm.quant.quantizer import QuantizedLayer, Quantizer, is_quantizable
from tweo_timm.quant.scheme import BASES, Scheme
from tweo_timm.quant.smooth import smooth
from tweo_timm.quant.stream import BlockSites, SiteWatcher, StreamQuantizer
from tweo_timm.rewrite.rotate import rotate

_logger = logging.getLogger(__name__)


def quantize_static(
    model: nn.Module,
    calibration_batches: Iterable[Tensor],
    scheme: str | Scheme,
    blocks: str | None = None,
    *,
    keep_float: Collection[str] = (),
    calibration: str = ABSMAX,
) -> nn.Module:
    """Return a copy of a model that computes with quantized weights and activations, its scales frozen.

    Args:
        model: a timm model, also wrapped by DDP or torch.compile; it is not changed.
        calibration_batches: preprocessed image batches (B, C, H, W) of the training split; a few hundred images are
            usual. The scales depend on the images only, not on how they are batched.
        scheme: such as "w8a8-tt+res"; see `Scheme`.
        blocks: regular expression naming the transformer blocks by hand; None finds them by structure.
        keep_float: names of layers ("blocks.0.mlp.fc2") and of the stream's sites ("blocks.0.add1", as
            `quantization_scales` has them) that stay in float32; for fp16 and bf16 any modules.
        calibration: "absmax", or "percentile:99.99" for comparison: what is larger in a layer's input is cut off.

    Returns:
        A model in evaluation mode with the float model's interface. Its Linear layers and convolutions are
        QuantizedLayers; `quantization_scales` lists every scale. Its attribute `quantization` is a dict that is ready
        for JSON: scheme, calibration, calibration_images, unused_layers (float), kept_float, and what +rot, +smooth
        and +qwt did. With fp16 and bf16 it is the model in that precision, between casts.

    Raises:
        ValueError: for a scheme that cannot be parsed, no calibration images or batches of something else, activations
            that are not finite, a name in `keep_float` that nothing has, or a model that is quantized or in FP8 now.
        RuntimeError: if a layer's weight is read past its forward, or a block multiplies activations where +attn cannot
            see the operands.
        TypeError: for scripted models, and layers whose effective weight is not stored.

    Source: arXiv:2511.23225, PTQ protocol; suffixes +rot, +smooth and +qwt: see `rotate`, `smooth`, `compensate`.
    """
    scheme, percent = Scheme.parse(scheme), percentile_of(calibration)
    if percent is not None:
        refuse_percentile(scheme)
    batches = image_batches(calibration_batches)
    quantized = _working_copy(model, fused_attention=not scheme.attention)
    found = find_blocks(quantized, blocks)
    report: dict[str, Any] = {"scheme": str(scheme), "calibration": calibration}
    if scheme.rotation:
        _refuse_no_images(batches)
        report["rotation"] = rotate(quantized, scheme.rotation_method, batches).to_json()
    reference = copy.deepcopy(quantized) if scheme.compensation else None
    if scheme.smooth:
        report["smooth"] = smooth(quantized, batches)
    base = BASES[scheme.base]
    observation = observe(quantized, batches, found) if base.calibrated else Observation()
    if percent is not None:
        cut_off(quantized, batches, observation, percent)
    report |= {"calibration_images": observation.num_images, "unused_layers": observation.unused}
    report |= {"kept_float": sorted(keep_float)} if keep_float else {}
    base.by.load()(quantized, found, observation, scheme, keep_float)
    quantized.eval().requires_grad_(False)
    if reference is not None:
        report["compensation"] = compensate(reference, quantized, batches, scheme.compensation, blocks)
    quantized.quantization = report  # type: ignore[assignment]
    return quantized


def quantization_scales(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return every scale of a quantized model as plain numbers, by name, ready for JSON.

    Returns:
        For each quantized layer, by its own name: kind ("linear" or "conv"), format ("e4m3", of FP8 only), weight_bits,
        weight_scale (a list with one step for each output channel, or one for the tensor), input_bits, input_scale (the
        step; None: computed at run time, a step a token), input_zero_point. For each site of the stream, by
        "<block>.<site>": kind ("stream" or "product"), bits, scale. A value is its integer, less the zero point, times
        the scale (of FP8 its E4M3 number times the scale); integers are within +-(2^(bits-1) - 1); zero points are 0
        but with +zero.
    """
    scales: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            scales[name] = {
                "kind": "linear" if module.geometry is None else "conv",
                **({"format": module.number_format} if module.number_format != "int" else {}),
                "weight_bits": module.bits,
                "weight_scale": module.weight_scale.reshape(-1).tolist(),
                "input_bits": module.input_quantizer.bits,
                "input_scale": _number(module.input_quantizer),
                "input_zero_point": module.input_quantizer.zero_point,
            }
        elif isinstance(module, StreamQuantizer):
            for site, quantizer in module.quantizers.items():
                assert isinstance(quantizer, Quantizer)
                kind = "product" if site.startswith("product") else "stream"
                scales[f"{module.block_name}.{site}"] = {
                    "kind": kind,
                    "bits": quantizer.bits,
                    "scale": _number(quantizer),
                }
    if not scales:
        raise ValueError("the model has no quantized layer: pass what quantize_static returned")
    return scales


def _number(quantizer: Quantizer) -> float | None:
    return None if quantizer.scale is None else float(quantizer.scale)


def _working_copy(model: nn.Module, *, fused_attention: bool) -> nn.Module:
    """Copy a model for evaluation, with every weight read through its layer and, if wanted, attention in the open."""
    model = unwrap_model(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("a scripted model cannot be quantized: quantize the model that torch.jit.script was given")
    if hasattr(model, "quantization") or any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise ValueError("the model is quantized already: pass the float model that it was made from")
    if is_patched(model):
        raise ValueError(
            "the model computes in FP8, where scales of floats mean nothing: call unpatch_fp8(model) first"
        )
    working = copy.deepcopy(model).eval()
    set_grad_checkpointing: Any = getattr(working, "set_grad_checkpointing", None)
    if callable(set_grad_checkpointing):
        set_grad_checkpointing(False)
    call_projections(working)
    for name, module in working.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            raise RuntimeError(
                f"{name!r} is a torch.nn.MultiheadAttention, whose projections cannot be quantized as layers"
            )
        if not fused_attention and hasattr(module, "fused_attn"):
            module.fused_attn = False
    return working


def observe(model: nn.Module, batches: Iterable[Tensor], blocks: Mapping[str, nn.Module]) -> Observation:
    """Run the float model over the calibration images and record what each scale needs.

    Raises:
        ValueError: without images.
        RuntimeError: if a weight is read past its layer.
    """
    seen = Observation(blocks={name: BlockSites() for name in blocks})
    watch = _Watch(model, blocks, seen)
    device = next(model.parameters()).device
    batches = list(batches)
    with torch.no_grad():
        for images in batches[:1]:  # some models (ConViT) do more in their first forward than in all others
            model(images.to(device))
    with watch, torch.no_grad():
        for images in batches:
            seen.num_images += len(images)
            model(images.to(device))
    _refuse_no_images(batches)
    watch.check()
    return seen


def _refuse_no_images(batches: Sequence[Tensor]) -> None:
    if not any(len(images) for images in batches):
        raise ValueError("calibration needs at least one image: pass batches of the training split")


class _Watch(HookedMode):
    """The hooks of one calibration, and the count of the times that a weight is read."""

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], seen: Observation) -> None:
        super().__init__()
        self.seen = seen
        self._layers = {name: layer for name, layer in model.named_modules() if is_quantizable(layer)}
        self._by_weight = {id(layer.weight): name for name, layer in self._layers.items()}
        self._blocks = blocks
        self._calls: Counter[str] = Counter()
        self._reads: Counter[str] = Counter()
        self._watchers: list[SiteWatcher] = []

    def hooks(self) -> Iterator[Any]:
        """Of every layer and block."""
        for name, layer in self._layers.items():
            yield layer.register_forward_pre_hook(self._layer_hook(name))
        for name, block in self._blocks.items():
            yield block.register_forward_pre_hook(self._enter_hook(name), with_kwargs=True)
            yield block.register_forward_hook(self._leave_hook(), always_call=True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if name_of(func) in ("linear", "conv1d", "conv2d", "conv3d"):
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            if id(weight) in self._by_weight:
                self._reads[self._by_weight[id(weight)]] += 1
        return func(*args, **kwargs)

    def check(self) -> None:
        """Refuse weights that were read past their layer; report layers that were not used."""
        past = [name for name in self._layers if self._reads[name] > self._calls[name]]
        if past:
            raise RuntimeError(
                f"{len(past)} layers have their weight read past their forward, the first is {past[0]!r}: "
                "their input cannot be quantized; call the layer in the model's code"
            )
        self.seen.unused = [name for name in self._layers if name not in self.seen.layers]
        if self.seen.unused:
            _logger.warning("layers that no calibration image reached stay float: %s", ", ".join(self.seen.unused))

    def _layer_hook(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._calls[name] += 1
            least, most = (extreme.float() for extreme in args[0].detach().aminmax())
            if name in self.seen.ranges:
                known = self.seen.ranges[name]
                least, most = torch.minimum(known[0], least), torch.maximum(known[1], most)
            self.seen.ranges[name] = least, most
            self.seen.layers[name] = torch.maximum(-least, most)

        return hook

    def _enter_hook(self, name: str) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            tensors = {key: value for key, value in given if isinstance(value, Tensor)}
            self._watchers.append(SiteWatcher(block, tensors, self.seen.blocks[name]).__enter__())

        return hook

    def _leave_hook(self) -> Callable[..., None]:
        def hook(block: nn.Module, args: Any, output: Any) -> None:
            watcher = self._watchers.pop()
            watcher.__exit__(None, None, None)
            if output is not None:
                watcher.finish(output)

        return hook
