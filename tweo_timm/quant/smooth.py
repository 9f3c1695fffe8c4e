"""SmoothQuant (arXiv:2211.10438), as a comparator: peaks of a norm's output move into the weights that read it.

TWEO claims to make this redundant; measuring `w8a8-tt+smooth` beside `w8a8-tt` tests the claim. For a norm with output
X whose only readers are Linear layers with weights W, channel j of X is divided by
s_j = max|X_j|^a / max|W_j|^(1 - a) and column j of every W multiplied by it: the float model computes the same, the
integers do not.

The readers are found by following values through one forward pass, because module order does not tell (Swin rolls and
partitions between norm and qkv, XCiT concatenates a norm's output back into its stream). A norm that anything but a
Linear reads is left alone and reported. Exactness is checked on the images before the model is handed back.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tweo_timm.flow import Flow, name_of, tensors_in
from tweo_timm.stream import answers_of

_logger = logging.getLogger(__name__)

_PROBE_IMAGES = 2
_TOLERANCE = 1e-3


def smooth(model: nn.Module, batches: Sequence[Tensor], alpha: float = 0.5) -> dict[str, Any]:
    """Migrate scale from norms into the Linear layers that read them, in place.

    Args:
        model: float model in evaluation mode; its norms and Linear layers are changed, its function is not.
        batches: calibration images, as for `quantize_static`.
        alpha: 0 leaves the activations, 1 moves all of their range into the weights.

    Returns:
        {"alpha", "smoothed": {norm: [layers]}, "skipped": {norm: reason}}.

    Raises:
        ValueError: if `alpha` is outside [0, 1], there are no images, or no norm can be smoothed.
        RuntimeError: if the model does not compute the same afterwards.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; SmoothQuant takes 0 (weights keep their range) to 1")
    if not batches:
        raise ValueError("smoothing needs at least one calibration image")
    device = next(model.parameters()).device
    probe = batches[0][:_PROBE_IMAGES].to(device)
    watch = Readers(model)
    with torch.no_grad():
        watch.follow(model, probe)
        readers, skipped = watch.verdict()
        if not readers:
            raise ValueError("no norm of this model is read by Linear layers alone: +smooth has nothing to migrate")
        with watch:
            for images in batches:
                model(images.to(device))
        before = answers_of(model(probe), len(probe))
        for norm, layers in readers.items():
            _migrate(model, norm, layers, watch.amax[layers[0]], alpha)
        after = answers_of(model(probe), len(probe))
    error = float((after - before).norm() / before.norm().clamp(min=1e-12))
    if not error <= _TOLERANCE:
        raise RuntimeError(
            f"smoothing changed the float model's output by {error:.2g} (relative): the model was not followed"
        )
    _logger.info("smoothed %d norms, left %d", len(readers), len(skipped))
    return {"alpha": alpha, "smoothed": readers, "skipped": skipped}


class Readers(TorchFunctionMode):
    """Finds who reads the output of each norm, and the largest magnitudes of what Linear layers read.

    Attributes:
        linears: of each norm, by name, the Linear layers that read its output.
        others: of each norm, the other functions that read its output.
        amax: of each Linear layer, by name, the largest magnitude of each input channel, shape (channels,).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._flow = Flow()
        self._layers = {id(layer.weight): name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        self._norms = {name: module for name, module in model.named_modules() if hasattr(module, "normalized_shape")}
        self.linears: dict[str, list[str]] = defaultdict(list)
        self.others: dict[str, set[str]] = defaultdict(set)
        self._sources: dict[str, set[frozenset[str]]] = defaultdict(set)
        self.amax: dict[str, Tensor] = {}

    def follow(self, model: nn.Module, images: Tensor) -> None:
        """Follow the outputs of norms through one forward pass."""

        def label(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda norm, args, output: self._flow.label(output, {name})

        handles = [norm.register_forward_hook(label(name)) for name, norm in self._norms.items()]
        with self:
            model(images)
        for handle in handles:
            handle.remove()
        self._flow = Flow()  # it keeps tensors alive

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        labels = self._flow.of(args, kwargs)
        if name_of(func) == "linear":
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            layer = self._layers.get(id(weight), "")
            self._sources[layer].add(labels)
            peak = args[0].detach().abs().flatten(0, -2).amax(0)
            self.amax[layer] = torch.maximum(self.amax[layer], peak) if layer in self.amax else peak
            for norm in labels:
                self.linears[norm].append(layer)
        elif name_of(func) in ("cat", "concat") or not self._flow.moves(func, args, kwargs, result):
            for norm in labels if tensors_in(result) else ():
                self.others[norm].add(name_of(func))
        return result

    def verdict(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Return norm -> its Linear layers where those alone read it, and norm -> reason where not."""
        readers, skipped = {}, {}
        for name, norm in self._norms.items():
            layers = list(dict.fromkeys(self.linears[name]))
            mixed = [layer for layer in layers if self._sources[layer] != {frozenset({name})}]
            if getattr(norm, "weight", None) is None:
                skipped[name] = "has no weight that could hold the factors"
            elif self.others[name]:
                skipped[name] = f"its output is also read by {', '.join(sorted(self.others[name]))}"
            elif mixed:
                skipped[name] = f"{mixed[0] or 'a linear function'} reads other inputs too"
            elif not layers:
                skipped[name] = "nothing reads it"
            else:
                readers[name] = layers
        return readers, skipped


def _migrate(model: nn.Module, norm_name: str, layers: Sequence[str], amax_x: Tensor, alpha: float) -> None:
    norm: Any = model.get_submodule(norm_name)
    linears: list[Any] = [model.get_submodule(name) for name in layers]
    amax_w = torch.stack([linear.weight.abs().amax(0) for linear in linears]).amax(0)
    factor = amax_x.clamp(min=1e-5) ** alpha / amax_w.clamp(min=1e-5) ** (1 - alpha)
    factor = torch.where(amax_x > 0, factor, 1.0).clamp(min=1e-5)
    norm.weight.div_(factor)
    if getattr(norm, "bias", None) is not None:
        norm.bias.div_(factor)
    for linear in linears:
        linear.weight.mul_(factor)
