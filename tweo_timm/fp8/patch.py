"""Put the linear layers of a timm model into FP8, and take them out again.

Every nn.Linear that the model calls is converted, the head included: that is TWEO's configuration. The projections of
torch.nn.MultiheadAttention (open_clip, torchvision) are no such layers; they are named as skipped. How a layer is
converted is the backend's business (backend.py), which is known by its name only. Parameters, names and hooks are
shared with the originals, so optimizers, EMA and checkpoints do not notice.

Refuses scripted models, a model without a convertible layer, and a second patch. Layers whose weight is used without
calling them are found twice: known timm attention classes are told to call their ``qkv``, and the first training
forward raises if a converted layer did not run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from timm.layers import Linear as TimmLinear
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tweo_timm.fp8.backend import Region, Replaced, backend_named, choose_backend
from tweo_timm.fp8.recipe import Fp8Recipe
from tweo_timm.layers import call_projections, restore_projections

_logger = logging.getLogger(__name__)
_ATTRIBUTE = "_fp8_patch"
# timm's Linear only casts its weight to the input's dtype, which the FP8 layer's rounding makes moot.
_CONVERTIBLE = (nn.Linear, TimmLinear)

_TORCH_ATTENTION = (
    "torch.nn.MultiheadAttention, which multiplies by its weights without calling a layer: build the model with an "
    "attention of Linear layers, as timm's ViTs have"
)


@dataclass(frozen=True)
class Fp8Report:
    """What `patch_fp8` did.

    Attributes:
        converted: names of the layers that now compute in FP8, in module order.
        skipped: names of the linear layers left alone, each with the reason; for torch's own attention, whose
            projections are no layers, the names of their weights.
        backend: the name of the backend that computes them.
        backend_reason: why that backend.
    """

    converted: tuple[str, ...]
    skipped: dict[str, str]
    backend: str
    backend_reason: str

    def __str__(self) -> str:
        skipped = f", {len(self.skipped)} Linear layers skipped" if self.skipped else ""
        lines = [
            f"FP8: {len(self.converted)} linear layers converted{skipped}, "
            f"backend {self.backend} ({self.backend_reason})"
        ]
        lines += [f"  left alone: {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


@dataclass
class Fp8Patch:
    """All that is needed to use and to undo a patch; a plain attribute of the patched root, copied with it."""

    region: Region
    report: Fp8Report
    replaced: list[Replaced]
    switched: list[nn.Module] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)


def patch_fp8(model: nn.Module, recipe: Fp8Recipe | None = None) -> Fp8Report:
    """Convert the linear layers of ``model`` to FP8 in place.

    Patch after the weights are loaded and the model is on its device, before the optimizer's first step, EMA,
    torch.compile and DDP. Parameters keep their identity and their names. The default recipe is TWEO's.

    Raises:
        ValueError: no layer can be converted, or the model is patched already.
        TypeError: the model is scripted.
        RuntimeError: the backend named by the recipe cannot run here.
    """
    recipe = recipe or Fp8Recipe()
    if is_patched(model):
        raise ValueError("the model is already in FP8: call unpatch_fp8(model) first")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError(
            "a scripted model cannot be put into FP8: patch the model before scripting it, or do not script it"
        )
    linears = {name: module for name, module in model.named_modules() if name and isinstance(module, nn.Linear)}
    skipped = {name: reason for name, linear in linears.items() if (reason := _reason_to_skip(name, linear, recipe))}
    skipped |= _inside_torch_attention(model)
    converted = tuple(name for name in linears if name not in skipped)
    if not converted:
        raise ValueError(
            f"no layer of {type(model).__name__} was converted to FP8; it has {len(linears)} linear layers below its "
            f"root, left alone: {skipped}"
        )
    device = linears[converted[0]].weight.device
    backend, reason = choose_backend(recipe, device)
    report = Fp8Report(converted, skipped, backend, reason)
    region, replaced = backend_named(backend).convert(model, converted, recipe)
    patch = model.__dict__[_ATTRIBUTE] = Fp8Patch(region, report, replaced)
    faces = {place.face for place in replaced}
    patch.switched = call_projections(model, lambda attention: getattr(attention, "qkv", None) in faces)
    patch.handles = region.attach(model)
    _logger.info("%s", report)
    return report


def unpatch_fp8(model: nn.Module) -> None:
    """Put the original layers back; the forward is then bit for bit the one before `patch_fp8`.

    A layer that was replaced in the meantime stays.

    Raises:
        ValueError: the model is not patched.
    """
    root, patch = _find(model)
    for handle in patch.handles:
        handle.remove()
    patch.region.close()
    for parent, name, original, face in patch.replaced:
        if parent._modules.get(name) is not face:  # reset_classifier, say, has put another layer there
            _logger.info("left as it is, since it was replaced after patch_fp8: %s of %s", name, type(parent).__name__)
            continue
        original.training = parent._modules[name].training  # type: ignore[union-attr]
        parent._modules[name] = original
    restore_projections(patch.switched)
    del root.__dict__[_ATTRIBUTE]


def is_patched(model: nn.Module) -> bool:
    """Return whether a model, or a part of it, is in FP8."""
    return any(_ATTRIBUTE in module.__dict__ for module in model.modules())


def fp8_state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the delayed scales and histories, keyed by layer; empty where scaling keeps no state.

    Save it beside the model's ``state_dict``, which it is deliberately not part of. For each layer:
    ``NAME.scaling_fwd.scale`` ``[2]`` (input, weight), ``NAME.scaling_fwd.amax_history`` ``[L, 2]``,
    ``NAME.scaling_bwd.scale`` ``[1]`` (output gradient), ``NAME.scaling_bwd.amax_history`` ``[L, 1]``, all float32.
    Take it between steps. ``model`` may be wrapped in DDP, torch.compile or a task.
    """
    return patch_of(model).region.state()


def load_fp8_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Restore what `fp8_state` returned, so that training continues bit for bit.

    Raises:
        ValueError: the state belongs to other layers, another history length or another scaling.
    """
    patch_of(model).region.load_state(state)


@contextlib.contextmanager
def held_fp8(model: nn.Module) -> Iterator[None]:
    """Let backward passes inside the context leave scales and histories as they are."""
    state = fp8_state(model)
    try:
        yield
    finally:
        load_fp8_state(model, state)


def check_fp8_ran(model: nn.Module) -> None:
    """Raise unless a training forward has run every converted layer in FP8.

    The first training forward raises by itself when it missed a layer; this also catches that there was no such
    forward.

    Raises:
        RuntimeError: no training forward has run yet.
    """
    if not patch_of(model).region.all_layers_ran:
        raise RuntimeError(
            "no training forward of the patched model has run in FP8: call the patched model in training mode, "
            "with gradients enabled"
        )


def warm_up_fp8(model: nn.Module, forward_backward: Callable[[], object], passes: int = 2) -> None:
    """Let delayed scales settle before the first update, by running forward and backward without an optimizer step.

    With all scales at 1, the first E5M2 gradients below 7.6e-6 are flushed to zero. Parameters, their gradients,
    buffers and random state are left as they were; only scales move.

    Args:
        model: a patched model in training mode.
        forward_backward: runs one forward and backward of it.
        passes: how often; the second already sees sensible gradient scales.
    """
    gradients = [parameter.grad for parameter in model.parameters()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    devices = sorted(
        {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    )
    with torch.random.fork_rng(devices):
        for _ in range(passes):
            for parameter in model.parameters():
                parameter.grad = None
            forward_backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)


def patch_of(model: nn.Module) -> Fp8Patch:
    """Return how a model, or a part of it, was put into FP8.

    Raises:
        ValueError: it was not.
    """
    return _find(model)[1]


def _find(model: nn.Module) -> tuple[nn.Module, Fp8Patch]:
    for module in model.modules():
        if _ATTRIBUTE in module.__dict__:
            return module, module.__dict__[_ATTRIBUTE]
    raise ValueError("the model is not in FP8: call patch_fp8(model, recipe) first")


def _inside_torch_attention(model: nn.Module) -> dict[str, str]:
    """The projections of every torch.nn.MultiheadAttention, which it computes past its layers, if it has layers."""
    attentions = {name: module for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    return {
        f"{name}.{weight}" if name else weight: f"{name or 'the model'} is a {_TORCH_ATTENTION}"
        for name, attention in attentions.items()
        for weight in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj")
        if getattr(attention, weight) is not None
    }


def _reason_to_skip(name: str, linear: nn.Linear, recipe: Fp8Recipe) -> str | None:
    if type(linear) not in _CONVERTIBLE:
        kind = type(linear).__name__
        return f"{kind} is a subclass of nn.Linear whose forward may differ, or whose weight is used without calling it"
    if not linear.weight.is_floating_point():
        return f"its weight is {linear.weight.dtype}"
    return recipe.selects(name)
