"""What a side network costs: its trained parameters, and the time and memory of the pass over the split."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from typing import Any, ClassVar

import torch

from tweo_timm.evaluate.answers import SideAnswer
from tweo_timm.evaluate.case import Case
from tweo_timm.evaluate.markdown import markdown_table, number
from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.side.miet import MESSAGE_BITS, message_bytes
from tweo_timm.side.network import SideNetwork


class SideCost:
    """What does a side network cost?"""

    ANSWER: ClassVar = SideAnswer

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
        _, tokens, dim = net.feature_shape
        return {
            "side": description["side"],
            "settings": description["settings"],
            "backbone": description["backbone"],
            "trained_parameters": sum(p.numel() for p in net.parameters() if id(p) not in backbone),
            "backbone_values": sum(value.numel() for value in net.backbone.state_dict().values()),
            "seconds": self._seconds,
            "peak_memory_mib": _peak_memory_mib(case.world.device),
            "message_bytes": {f"{bits} bits": message_bytes(tokens, dim, bits) for bits in MESSAGE_BITS if net.summed},
        }

    def describe(self, found: SideAnswer) -> list[str]:
        """One row."""
        backbone = found.backbone
        row = {
            "side": found.side,
            **{name: number(value) for name, value in found.settings.items()},
            "trained parameters": number(found.trained_parameters),
            "backbone in": number(backbone.get("precision")),
            "fingerprint": number(backbone.get("fingerprint")),
            "seconds": number(found.seconds),
            "peak memory, MiB": number(found.peak_memory_mib),
            **{f"bytes to the edge, {bits}": number(size) for bits, size in found.message_bytes.items()},
        }
        return [
            "### Side network",
            markdown_table([row]),
            "Seconds are those of the pass over the split, data included; memory is the largest of the process (of the "
            "GPU, where there is one).",
        ]


def _peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
