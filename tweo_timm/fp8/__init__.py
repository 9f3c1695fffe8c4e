"""FP8 training: one recipe, three backends, the same per-tensor scaling."""

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

__all__ = [
    "Fp8HealthMonitor",
    "Fp8Recipe",
    "Fp8Report",
    "check_fp8_ran",
    "fp8_state",
    "load_fp8_state",
    "patch_fp8",
    "unpatch_fp8",
    "warm_up_fp8",
]
