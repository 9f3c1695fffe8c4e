"""On what the numbers were made: card, driver, versions, and the revision of the code."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import torch

from benchmarks.gpu.plan import Plan
from tweo_timm import machine
from tweo_timm.evaluate.report import versions

_PACKAGES = ("torchvision", "triton", "numpy", "transformer_engine")


def describe(plan: Plan) -> dict[str, Any]:
    """Return names and versions; None of what is not there. `revision` is that of this source tree."""
    ours = versions()
    about = machine.describe()
    return {
        "tiny": plan.tiny,
        "device": plan.device,
        **_card(plan.device),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": ours["torch"],
        "timm": ours["timm"],
        **{package: _version(package) for package in _PACKAGES},
        "processor": about["processor"],
        "cores": about["cores"],
        "tweo_timm": ours["tweo_timm"],
        "revision": ours.get("git", "unknown"),
    }


def _card(device: str) -> dict[str, Any]:
    if device != "cuda":
        return {"card": None, "memory_gib": None, "driver": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": f"{properties.name}, compute capability {properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _driver(),
    }


def _driver() -> str | None:
    """Return the version of the driver, which torch does not know."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = answer.stdout.strip().splitlines()
    return lines[0] if answer.returncode == 0 and lines else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
