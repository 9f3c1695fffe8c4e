"""What a side network costs: its trained parameters, and the time and memory of the pass over the split."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from typing import Any

import torch

from tweo_timm.evaluate.case import Case
from tweo_timm.evaluate.markdown import fields_table
from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.side.network import SideNetwork


class SideCost:
    """What does a side network cost?"""

    _seconds: float

    def wanted(self, options: ValidateOptions) -> bool:
        """With --side-backbone."""
        return bool(options.side_backbone)

    @contextlib.contextmanager
    def watching(self, case: Case) -> Any:
        """Take the time of the pass over the split."""
        if case.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(case.world.device)
        start = time.perf_counter()
        yield
        self._seconds = time.perf_counter() - start

    def measure(self, case: Case) -> dict[str, Any]:
        """Count parameters, and report the time and the memory of the pass."""
        net = case.subject.model
        if not isinstance(net, SideNetwork):
            raise ValueError(f"{case.subject.name} is no side network: leave out --side-backbone for it")
        backbone = {id(parameter) for parameter in net.backbone.parameters()}
        description = net.describe()
        return {
            "side": description["side"],
            **description["settings"],
            "backbone": description["backbone"],
            "trained_parameters": sum(p.numel() for p in net.parameters() if id(p) not in backbone),
            "backbone_values": sum(value.numel() for value in net.backbone.state_dict().values()),
            "seconds": self._seconds,
            "peak_memory_mib": _peak_memory_mib(case.world.device),
        }

    def describe(self, found: dict[str, Any]) -> list[str]:
        """One row."""
        backbone = found["backbone"]
        row = {**found, "precision": backbone["precision"], "fingerprint": backbone["fingerprint"]}
        keys = ("side", "rank", "gap", "trained_parameters", "precision", "fingerprint", "seconds", "peak_memory_mib")
        return [
            "### Side network",
            fields_table([row], keys),
            "Seconds are those of the pass over the split, data included; memory is the largest of the process (of the "
            "GPU, where there is one).",
        ]


def _peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
