"""Which model, at what size, in what precision, on what device: names, types and defaults are those of timm's train.py.

Refuses nothing by itself; combinations are checked where the groups meet.  Source: timm's training script, 1.0.29 to
1.0.31.
"""

from __future__ import annotations

from dataclasses import dataclass

from tweo_timm.run import options as shared
from tweo_timm.settings import ANY, AT_LEAST_1, FRACTION, Bounds, Decides, flag


@dataclass(frozen=True)
class ModelOptions(shared.ModelOptions, shared.ImageOptions):
    """Model."""

    DECIDES = Decides.TRAINING

    model: str = flag("resnet50", "Architecture, as timm names it.", decides=Decides.MODEL)
    pretrained: bool = flag(False, "Start from timm's pretrained weights.")
    pretrained_path: str | None = flag(None, "Load this file as if it held the pretrained weights, adapting them.")
    initial_checkpoint: str = flag("", "Load this checkpoint into the model, unadapted.", metavar="FILE")
    resume: str = flag(
        "",
        "Checkpoint to continue from, or 'auto': the experiment's own last one.",
        metavar="FILE|auto",
        decides=Decides.PROCESS,
    )
    no_resume_opt: bool = flag(False, "Leave the optimizer's state out when resuming.", decides=Decides.PROCESS)
    batch_size: int = flag(
        128, "Batch size per process.", "-b", "--batch-size", bounds=AT_LEAST_1, decides=Decides.DATA
    )
    validation_batch_size: int | None = flag(
        None,
        "Validation batch size per process; unset: --batch-size.",
        "-vb",
        "--validation-batch-size",
        bounds=AT_LEAST_1,
    )
    grad_accum_steps: int = flag(1, "Batches accumulated into one update.", bounds=AT_LEAST_1, decides=Decides.DATA)
    grad_checkpointing: bool = flag(False, "Recompute activations in the backward pass.")
    head_init_scale: float | None = flag(None, "Scale of the classifier's initial weights.", bounds=ANY)
    head_init_bias: float | None = flag(None, "Initial bias of the classifier.", bounds=ANY)


@dataclass(frozen=True)
class DeviceOptions(shared.PrecisionOptions):
    """Device and precision."""

    DECIDES = Decides.TRAINING

    no_ddp_bb: bool = flag(False, "No broadcast of buffers in DDP.")
    synchronize_step: bool = flag(False, "Synchronize the device after each step.")
    local_rank: int = flag(
        0,
        "Rank on this machine; torchrun sets it.",
        "--local_rank",
        "--local-rank",
        recorded=False,
        bounds=Bounds(-1),
        decides=Decides.PROCESS,
    )
    device_modules: list[str] | None = flag(None, "Python modules to import first, e.g. device backends.")
    fsdp: bool = flag(False, "Shard parameters, gradients and optimizer state over the processes (FSDP2).")


@dataclass(frozen=True)
class NormOptions(shared.NormOptions):
    """Batch normalization."""

    DECIDES = Decides.TRAINING

    bn_momentum: float | None = flag(None, "Momentum of batch normalization.", bounds=FRACTION)
    sync_bn: bool = flag(False, "Synchronize batch normalization over processes.")
    dist_bn: str = flag(
        "reduce",
        "How statistics are shared after each epoch; empty: not.",
        choices=("reduce", "broadcast", ""),
        metavar="{reduce,broadcast,''}",
    )
    split_bn: bool = flag(False, "Separate batch normalization per augmentation split.", decides=Decides.MODEL)


@dataclass(frozen=True)
class EmaOptions:
    """Moving average of the weights."""

    DECIDES = Decides.TRAINING

    model_ema: bool = flag(False, "Keep a moving average of the weights, and evaluate it.")
    model_ema_force_cpu: bool = flag(False, "Keep it on the CPU, on the first process only, unevaluated.")
    model_ema_force_fp32: bool = flag(False, "Keep it in float32 for a bfloat16 model; for a float16 one it always is.")
    model_ema_decay: float = flag(0.9998, "Its decay per update.", bounds=FRACTION)
    model_ema_warmup: bool = flag(False, "Ramp the decay up over the first updates.")
