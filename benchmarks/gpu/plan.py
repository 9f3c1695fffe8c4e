"""What is measured, and how large: one plan for a GPU, one that a CPU goes through in two minutes.

Sizes were chosen for 80 GB; batches are multiples of 16, so that no product needs padding but the head's. The tiny plan
is there to run every line of the report's own code: its numbers say nothing of a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Workload:
    """A model and the batch it is measured and trained with.

    Attributes:
        arch: timm's name.
        batch_size: images per step.
        img_size: their height and width.
        kwargs: further arguments of the architecture.
    """

    arch: str
    batch_size: int
    img_size: int = 224
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """All that decides what the parts do.

    Attributes:
        output: the report's folder.
        data_dir: photograph crops made elsewhere; None makes them.
        device: 'cuda' or 'cpu'.
        tiny: whether models are tiny.
        train_s: seconds that each training should take.
        workloads: of the speed table, the important ones first.
        more_workloads: of the speed table, if time is left.
        trained: how many of the workloads are trained too.
        fp8: backend of the FP8 trainings.
        compiler: backend of torch.compile.
        warm_up: steps before those that are timed.
        steps: timed steps.
        crops: training and validation crops per photograph.
        workers: loader processes.
        limits_s: by part, the seconds after which it begins nothing new.
    """

    output: Path
    data_dir: Path | None
    device: str
    tiny: bool
    train_s: float
    workloads: tuple[Workload, ...]
    more_workloads: tuple[Workload, ...]
    trained: int
    fp8: str
    compiler: str
    warm_up: int
    steps: int
    crops: tuple[int, int]
    workers: int
    limits_s: Mapping[str, float]


def gpu_plan(output: Path, data_dir: Path | None, train_s: float) -> Plan:
    """Return the plan for a GPU with 80 GB: 15 minutes in all, if a training takes 20 seconds."""
    return Plan(
        output=output,
        data_dir=data_dir,
        device="cuda",
        tiny=False,
        train_s=train_s,
        workloads=(
            Workload("vit_small_patch16_224", 256),
            Workload("swin_tiny_patch4_window7_224", 128),
            Workload("vit_base_patch16_224", 128),
        ),
        more_workloads=(Workload("vit_large_patch16_224", 64), Workload("swin_base_patch4_window7_224", 64)),
        trained=2,
        fp8="native",
        compiler="inductor",
        warm_up=5,
        steps=20,
        crops=(512, 50),
        workers=max(1, min(12, (os.cpu_count() or 1) - 2)),
        # Eight trainings, each with some 15 s for starting, validation and the checkpoint.
        limits_s={"a": 90, "b": 300, "c": 30 + 8 * (train_s + 15), "d": 100},
    )


def tiny_plan(output: Path, data_dir: Path | None, device: str) -> Plan:
    """Return the plan that tests the report itself."""
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    swin = {"img_size": 32, "embed_dim": 32, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}
    return Plan(
        output=output,
        data_dir=data_dir,
        device=device,
        tiny=True,
        train_s=0.5,
        workloads=(
            Workload("vit_tiny_patch16_224", 16, 32, vit),
            Workload("swin_tiny_patch4_window7_224", 16, 32, swin),
        ),
        more_workloads=(),
        trained=1,
        fp8="native" if device == "cuda" else "emulated",
        compiler="aot_eager",
        warm_up=1,
        steps=3,
        crops=(8, 4),
        workers=0,
        limits_s=dict.fromkeys("abcd", 600),
    )
