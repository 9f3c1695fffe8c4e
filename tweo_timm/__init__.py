"""TWEO for timm: transformers without extreme outliers, FP8 training and INT8 deployment."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tweo_timm.version import __version__

if TYPE_CHECKING:
    # ruff: noqa: F401 - what type checkers read; the names are looked up when used
    from tweo_timm.blocks import find_blocks
    from tweo_timm.config import TweoConfig
    from tweo_timm.diagnose.colinearity import colinearity
    from tweo_timm.diagnose.stethoscope import stethoscope
    from tweo_timm.families import describe_stream
    from tweo_timm.fp8.health import Fp8HealthMonitor
    from tweo_timm.fp8.patch import (
        Fp8Report,
        check_fp8_ran,
        fp8_state,
        load_fp8_state,
        patch_fp8,
        unpatch_fp8,
        warm_up_fp8,
    )
    from tweo_timm.fp8.recipe import Fp8Recipe
    from tweo_timm.loss import tweo_loss
    from tweo_timm.outliers import record_outliers
    from tweo_timm.penalty import Tweo
    from tweo_timm.quant.deploy import export_record
    from tweo_timm.quant.export import export_onnx
    from tweo_timm.quant.sidecar import write_scales
    from tweo_timm.quant.static import quantize_static
    from tweo_timm.quant.tensorrt_rules import check_tensorrt_rules
    from tweo_timm.rewrite.fold import fold_affine
    from tweo_timm.rewrite.rotate import rotate
    from tweo_timm.task import attach_tweo

# Where each public name lives. They are imported when first used, so that `train.py -h` does not wait for torch.
_HOMES = {
    "find_blocks": "blocks",
    "colinearity": "diagnose.colinearity",
    "stethoscope": "diagnose.stethoscope",
    "describe_stream": "families",
    "check_fp8_ran": "fp8.patch",
    "fp8_state": "fp8.patch",
    "load_fp8_state": "fp8.patch",
    "patch_fp8": "fp8.patch",
    "unpatch_fp8": "fp8.patch",
    "warm_up_fp8": "fp8.patch",
    "Fp8Report": "fp8.patch",
    "Fp8HealthMonitor": "fp8.health",
    "Fp8Recipe": "fp8.recipe",
    "TweoConfig": "config",
    "tweo_loss": "loss",
    "record_outliers": "outliers",
    "export_record": "quant.deploy",
    "export_onnx": "quant.export",
    "write_scales": "quant.sidecar",
    "check_tensorrt_rules": "quant.tensorrt_rules",
    "quantize_static": "quant.static",
    "fold_affine": "rewrite.fold",
    "rotate": "rewrite.rotate",
    "attach_tweo": "task",
    "Tweo": "penalty",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
