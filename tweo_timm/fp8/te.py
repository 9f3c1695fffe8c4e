"""The Transformer Engine backend, and the only importer of that package.

NVIDIA's modules are neither nn.Linear nor free of extra checkpoint entries. So the timm model keeps its own modules,
under their own names, as faces that own the parameters; each face holds the Transformer Engine module that computes
for it out of sight, sharing the very same parameters. Optimizers, checkpoints and EMA copies see a timm model.

What runs where:
    training    one te.autocast around the forward of the patched root; te.Linear, te.LayerNorm, LayerNormLinear
    where the norm feeds exactly that
                linear, LayerNormMLP only where the model's GELU is the tanh one that NVIDIA's kernel computes
    evaluation  the original modules in the activation dtype: nothing reaches the histories, and a copy without
    histories evaluates alike
Tokens, inputs and outputs that are not multiples of 16 are padded here; padding tokens repeat the last row, which
changes no maximum, and their gradient is zero. First step: all scales are 1, so E5M2 flushes gradients below 7.6e-6;
run `warm_up_fp8` or warm the learning rate up.

Activation checkpointing goes through te.checkpoint (te_checkpoint.py). Refused: training a layer outside the forward
of the patched root, unit scaling (no such recipe), a CPU. Facts: Transformer Engine 2.20.
"""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tweo_timm.extras import installation
from tweo_timm.fp8.recipe import Fp8Recipe
from tweo_timm.fp8.region import check_same_layout
from tweo_timm.fp8.te_checkpoint import checkpoint, replaced_checkpoint

ALIGNMENT = 16
# Which quantizers of a module the saved state keeps: input and weight of each product, and the output gradient of
# each product.
_STATE_COLUMNS = {"fwd": (3, (0, 1)), "bwd": (2, (0,))}


def obstacle(recipe: Fp8Recipe) -> str | None:
    """Return why Transformer Engine cannot run ``recipe`` on this GPU, or None."""
    if recipe.scaling == "unit":
        return "Transformer Engine has no unit scaling"
    if recipe.scaling == "current" and recipe.margin:
        return "Transformer Engine's current scaling has no margin"
    if importlib.util.find_spec("transformer_engine") is None:
        return f"Transformer Engine is not installed; {installation('te')}"
    try:
        available, reason = _te().is_fp8_available(return_reason=True)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        return f"Transformer Engine does not load: {error}"
    return None if available else f"Transformer Engine says: {reason}"


def build_recipe(recipe: Fp8Recipe) -> Any:
    """Translate ``recipe``; each option's name is checked, because Transformer Engine ignores unknown ones."""
    from transformer_engine.common import recipe as te_recipes

    fp8_format = {"hybrid": te_recipes.Format.HYBRID, "e4m3": te_recipes.Format.E4M3}[recipe.format]
    if recipe.scaling == "current":
        kind, options = te_recipes.Float8CurrentScaling, {"fp8_format": fp8_format}
    else:
        kind = te_recipes.DelayedScaling
        options = {
            "fp8_format": fp8_format,
            "margin": recipe.margin,
            "amax_history_len": recipe.amax_history_len,
            "amax_compute_algo": recipe.amax_compute_algo,
        }
    unknown = options.keys() - kind.__dataclass_fields__.keys()
    if unknown:
        raise RuntimeError(
            f"this Transformer Engine's {kind.__name__} has no field {sorted(unknown)}: install version 2.x"
        )
    return kind(**options)


class TeRegion:
    """Opens one te.autocast around each training forward of the patched root, and knows every hidden module."""

    is_delayed: bool

    def __init__(self, recipe: Fp8Recipe):
        self.recipe = recipe
        self.is_delayed = recipe.scaling == "delayed"
        self.is_open = False
        self.hidden: dict[str, Hidden] = {}
        self._contexts: ExitStack | None = None

    def attach(self, root: nn.Module) -> list[RemovableHandle]:
        """Hook the region to ``root``; the closing hook runs even if the forward raises, to leave te.autocast."""
        return [root.register_forward_pre_hook(self._enter), root.register_forward_hook(self._exit, always_call=True)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(self, root: nn.Module, args: Any) -> None:
        self.close()
        if root.training and torch.is_grad_enabled():
            with ExitStack() as contexts:
                contexts.enter_context(_te().autocast(enabled=True, recipe=build_recipe(self.recipe)))
                contexts.enter_context(replaced_checkpoint(self._checkpoint))
                self._contexts = contexts.pop_all()
            self.is_open = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _exit(self, root: nn.Module, args: Any, output: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the forward, if one is running or was interrupted: torch's hooks miss a KeyboardInterrupt."""
        contexts, self._contexts, self.is_open = self._contexts, None, False
        if contexts is not None:
            contexts.close()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(_te().checkpoint, self, *args, **kwargs)

    @contextmanager
    def reopened(self) -> Iterator[None]:
        """Let layers compute as in the forward while te.checkpoint recomputes them, without moving any scale."""
        # Scales move where the outermost autocast ends, if it is enabled: te.checkpoint's own is not the outermost.
        with _te().autocast(enabled=False, recipe=build_recipe(self.recipe)):
            self.is_open = True
            try:
                yield
            finally:
                self.is_open = False

    def recompute_queues(self) -> list[deque[Any]]:
        """Return Transformer Engine's queues of scales for the recomputation of each layer that has one."""
        manager = _te().quantization.FP8GlobalStateManager
        # Earlier releases, 2.9 say, keep this state on the class itself.
        queues = getattr(manager, "quantization_state", manager).fp8_tensors_recompute_buffer
        modules = [hidden.module for hidden in self._quantized().values() if hidden.module is not None]
        positions = [module.fp8_meta.get("global_fp8_buffer_pos_fwd_recompute") for module in modules]
        return [queues[position] for position in positions if position is not None]

    @property
    def all_layers_ran(self) -> bool:
        """Whether every hidden module has run in FP8."""
        return all(hidden.module is not None and hidden.module.fp8_initialized for hidden in self._quantized().values())

    def state(self) -> dict[str, Tensor]:
        """Return copies of scales and histories as plain tensors; initial ones for a module that has not run yet."""
        return {key: view.clone() for key, view in self._columns().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned, into Transformer Engine's own buffers.

        Raises:
            ValueError: the state belongs to other layers or another history length.
        """
        check_same_layout(self._columns(), state)
        for name, hidden in self._quantized().items():
            for direction, (width, columns) in _STATE_COLUMNS.items():
                buffers = hidden.scaling_state(direction)
                for gemm, layer in enumerate(hidden.layers(name)):
                    for index, column in enumerate(columns):
                        buffers.scale[gemm * width + column] = state[f"{layer}.scaling_{direction}.scale"][index]
                        history = state[f"{layer}.scaling_{direction}.amax_history"]
                        buffers.amax_history[:, gemm * width + column] = history[:, index]

    def _quantized(self) -> dict[str, Hidden]:
        return {name: hidden for name, hidden in self.hidden.items() if hidden.num_gemms}

    def _columns(self) -> dict[str, Tensor]:
        columns_by_key: dict[str, Tensor] = {}
        for name, hidden in self._quantized().items() if self.is_delayed else ():
            for direction, (width, columns) in _STATE_COLUMNS.items():
                buffers = hidden.scaling_state(direction)
                for gemm, layer in enumerate(hidden.layers(name)):
                    chosen = [gemm * width + column for column in columns]
                    columns_by_key[f"{layer}.scaling_{direction}.scale"] = buffers.scale[chosen]
                    columns_by_key[f"{layer}.scaling_{direction}.amax_history"] = buffers.amax_history[:, chosen]
        return columns_by_key


class Hidden:
    """A Transformer Engine module computing for a face, built at its first training forward and never copied.

    Args:
        region: the patch's region.
        original: the module the face stands for; computes in evaluation.
        kind: name of the Transformer Engine class.
        arguments: constructor arguments.
        parameters: for each parameter of the hidden module, the module that owns it and its name there.
        gemms: layers whose products it computes, as suffixes to the face's name.
    """

    def __init__(
        self,
        region: TeRegion,
        original: nn.Module,
        kind: str,
        arguments: dict[str, Any],
        parameters: dict[str, tuple[nn.Module, str]],
        gemms: tuple[str, ...],
    ):
        self.region, self.original, self.kind, self.arguments = region, original, kind, arguments
        self.parameters, self.gemms = parameters, gemms
        self.module: Any = None

    @property
    def num_gemms(self) -> int:
        """How many FP8 products the module computes; 0 for a norm."""
        return len(self.gemms)

    def layers(self, face: str) -> list[str]:
        """Return the names of the linear layers it computes for."""
        return [f"{face}{suffix}" for suffix in self.gemms]

    def __getstate__(self) -> dict[str, Any]:
        # A copied fp8_meta would keep the original's place in Transformer Engine's global buffers: a copy starts
        # without.
        return {**self.__dict__, "module": None}

    def build(self) -> Any:
        """Return the Transformer Engine module, its parameters being those of the model."""
        if self.module is None:
            kind = getattr(_te(), self.kind)
            self.module = kind(**self.arguments, device="meta")
        for name, (owner, attribute) in self.parameters.items():
            parameter = getattr(owner, attribute)
            if parameter is not None and self.module._parameters.get(name) is not parameter:
                self._share(name, parameter)
        return self.module

    def _share(self, name: str, parameter: nn.Parameter) -> None:
        target = self.module.__dict__.get(name, self.module._parameters.get(name))
        if tuple(target.shape) == tuple(parameter.shape):
            setattr(self.module, name, parameter)
            return
        # Padded to the shape the matrix unit takes: a tensor of this step, through which the gradient reaches the
        # parameter.
        self.module._parameters.pop(name, None)
        padding = [
            pad for size, wanted in zip(parameter.shape, target.shape, strict=True) for pad in (wanted - size, 0)
        ]
        self.module.__dict__[name] = F.pad(parameter, padding[::-1])

    def scaling_state(self, direction: str) -> Any:
        """Return Transformer Engine's scale and history buffers of one direction, creating them if it has not run."""
        module = self.build()
        if not module.fp8_initialized:
            with torch.no_grad(), _te().autocast(enabled=True, recipe=build_recipe(self.region.recipe)):
                module.init_fp8_metadata(num_gemms=self.num_gemms)
        return module.fp8_meta[f"scaling_{direction}"]

    def run(self, x: Tensor, out_features: int) -> Tensor:
        """Compute in FP8, with the token count and the last dimension padded to multiples of 16."""
        rows = x.reshape(-1, x.shape[-1])
        tokens = rows.shape[0]
        missing = -tokens % ALIGNMENT
        if missing:
            rows = torch.cat([rows, rows[-1:].expand(missing, -1)])
        rows = F.pad(rows, (0, -rows.shape[1] % ALIGNMENT))
        out: Tensor = self.build()(rows)
        return out[:tokens, :out_features].reshape(*x.shape[:-1], out_features)


class Face(nn.Module):
    """A module of the timm model whose computation happens in a hidden Transformer Engine module."""

    te_hidden: Hidden

    @classmethod
    def of(cls, original: nn.Module) -> Any:
        """Return a face that shares every registry of ``original``."""
        face = cls.__new__(cls)
        face.__dict__.update(original.__dict__)
        return face

    def _is_training_in_fp8(self) -> bool:
        region = self.te_hidden.region
        if not region.is_open and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "a Transformer Engine layer was trained outside the forward of the patched model, without te.autocast: "
                "call the model itself, or patch the module that is called. To checkpoint activations, call timm's "
                "functions or torch.utils.checkpoint.checkpoint under that full name, which te.checkpoint replaces; a "
                "function imported by name recomputes on its own"
            )
        return region.is_open

    def _plain(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.te_hidden.original.forward(x))


class TeLinear(Face, nn.Linear):
    """nn.Linear computed by te.Linear or, with its norm, by te.LayerNormLinear."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer; ``[..., in_features]`` to ``[..., out_features]``."""
        return self.te_hidden.run(input, self.out_features) if self._is_training_in_fp8() else self._plain(input)


class TeLayerNorm(Face, nn.LayerNorm):
    """nn.LayerNorm computed by te.LayerNorm."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension."""
        if not self._is_training_in_fp8():
            return self._plain(input)
        return cast(Tensor, self.te_hidden.build()(input))


class FusedAway(Face, nn.LayerNorm):
    """nn.LayerNorm that the next layer's fused kernel computes: it passes its input on in training."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input in training, its normalisation in evaluation."""
        return input if self._is_training_in_fp8() else self._plain(input)


class TeMlp(Face):
    """A timm Mlp computed, with its norm, by te.LayerNormMLP."""

    drop2: nn.Dropout

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """Apply norm, both linear layers and the tanh GELU between them."""
        if not self._is_training_in_fp8():
            return self._plain(x)
        return cast(Tensor, self.drop2(self.te_hidden.run(x, x.shape[-1])))


def _te() -> Any:
    """Return Transformer Engine's PyTorch layer; torch comes first, because its libraries must be loaded before."""
    import transformer_engine.pytorch as te

    return te
