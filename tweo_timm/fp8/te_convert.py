"""The backend of Transformer Engine: which module is replaced by which face, and which parameters they share.

Fuses only what `fusion` says may be fused and whose dimensions the matrix unit takes as they are. Converts every norm
that Transformer Engine can compute, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from tweo_timm.fp8.backend import Replaced, hardware_obstacle
from tweo_timm.fp8.fusion import is_plain_norm, mlp_names, norm_linear_pairs
from tweo_timm.fp8.recipe import Fp8Recipe
from tweo_timm.fp8.te import (
    ALIGNMENT,
    FusedAway,
    Hidden,
    TeLayerNorm,
    TeLinear,
    TeMlp,
    TeRegion,
    obstacle,
)


class TransformerEngine:
    """FP8 by NVIDIA's modules."""

    unshardable = "Transformer Engine's own sharding support has not been tried; use --fp8 native"

    def obstacle(self, recipe: Fp8Recipe, device: torch.device) -> str | None:
        """Return why Transformer Engine cannot run ``recipe`` on ``device``, or None."""
        return hardware_obstacle(device) or obstacle(recipe)

    def convert(self, model: nn.Module, layers: tuple[str, ...], recipe: Fp8Recipe) -> tuple[TeRegion, list[Replaced]]:
        """Replace the named layers by faces, fused where they may be, and the norms."""
        converter = Converter(model, recipe)
        converter.convert(layers)
        return converter.region, converter.replaced


class Converter:
    """Replaces modules of one model by faces; what it replaced is in `replaced`."""

    _NORM: ClassVar = {"layer_norm_weight": "weight", "layer_norm_bias": "bias"}

    def __init__(self, model: nn.Module, recipe: Fp8Recipe):
        self.model = model
        self.region = TeRegion(recipe)
        self.replaced: list[Replaced] = []
        self._faces: dict[nn.Module, nn.Module] = {}

    def convert(self, linears: tuple[str, ...]) -> None:
        """Convert the named linear layers, and every norm that Transformer Engine can compute."""
        remaining = dict.fromkeys(linears)
        for norm, mlp in mlp_names(self.model):
            layers = [f"{mlp}.fc1", f"{mlp}.fc2"]
            if all(layer in remaining and self._is_aligned(layer) for layer in layers):
                self._convert_mlp(norm, mlp)
                for layer in layers:
                    del remaining[layer]
        for norm, linear in norm_linear_pairs(self.model):
            if linear in remaining and self._is_aligned(linear):
                self._convert_linear(linear, norm)
                del remaining[linear]
        for linear in remaining:
            self._convert_linear(linear, None)
        for name, module in list(self.model.named_modules()):
            if is_plain_norm(module):
                self._convert_norm(name, module)

    def _is_aligned(self, name: str) -> bool:
        linear: Any = self.model.get_submodule(name)
        return all(size % ALIGNMENT == 0 for size in linear.weight.shape)

    def _convert_linear(self, name: str, norm_name: str | None) -> None:
        linear: Any = self.model.get_submodule(name)
        arguments = {
            "in_features": linear.in_features + -linear.in_features % ALIGNMENT,
            "out_features": linear.out_features + -linear.out_features % ALIGNMENT,
            "bias": linear.bias is not None,
            "params_dtype": linear.weight.dtype,
        }
        face = self._replace(linear, TeLinear)
        parameters = {"weight": (face, "weight"), "bias": (face, "bias")}
        kind = "Linear"
        if norm_name is not None:
            norm: Any = self._fuse_away(norm_name)
            kind, arguments["eps"] = "LayerNormLinear", norm.eps
            parameters |= {theirs: (norm, ours) for theirs, ours in self._NORM.items()}
        self._hide(name, face, linear, kind, arguments, parameters, gemms=("",))

    def _convert_mlp(self, norm_name: str, name: str) -> None:
        mlp: Any = self.model.get_submodule(name)
        arguments = {
            "hidden_size": mlp.fc1.in_features,
            "ffn_hidden_size": mlp.fc1.out_features,
            "bias": mlp.fc1.bias is not None,
            "activation": "gelu",
            "params_dtype": mlp.fc1.weight.dtype,
        }
        face = self._replace(mlp, TeMlp)
        norm: Any = self._fuse_away(norm_name)
        arguments["eps"] = norm.eps
        parameters = {theirs: (norm, ours) for theirs, ours in self._NORM.items()}
        parameters |= {
            f"{fc}_{kind}": (getattr(face, fc), kind) for fc in ("fc1", "fc2") for kind in ("weight", "bias")
        }
        self._hide(name, face, mlp, "LayerNormMLP", arguments, parameters, gemms=(".fc1", ".fc2"))

    def _convert_norm(self, name: str, norm: Any) -> None:
        arguments = {"normalized_shape": norm.normalized_shape[0], "eps": norm.eps, "dtype": norm.weight.dtype}
        face = self._replace(norm, TeLayerNorm)
        parameters = {"weight": (face, "weight"), "bias": (face, "bias")}
        self._hide(name, face, norm, "LayerNorm", arguments, parameters, gemms=())

    def _fuse_away(self, name: str) -> Any:
        norm = self.model.get_submodule(name)
        face = self._replace(norm, FusedAway)
        face.te_hidden = Hidden(self.region, norm, "", {}, {}, ())
        return face

    def _hide(
        self,
        name: str,
        face: Any,
        original: nn.Module,
        kind: str,
        arguments: dict[str, Any],
        parameters: dict[str, tuple[nn.Module, str]],
        gemms: tuple[str, ...],
    ) -> None:
        face.te_hidden = self.region.hidden[name] = Hidden(self.region, original, kind, arguments, parameters, gemms)

    def _replace(self, original: nn.Module, kind: Callable[..., Any]) -> Any:
        face = kind.of(original)  # type: ignore[attr-defined]
        for parent in list(self.model.modules()):
            for attribute, child in list(parent._modules.items()):
                if child is original:
                    self.replaced.append(Replaced(parent, attribute, original, face))
                    parent._modules[attribute] = face
        return face
