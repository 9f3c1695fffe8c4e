# ruff: noqa: RUF009 - flag() returns a dataclass field, with a factory where the default is mutable
"""Which model, at what size, in what precision, on what device: names, types and defaults are those of timm's train.py.

Refuses nothing by itself; combinations are checked where the groups meet.  Source: timm's training script, 1.0.29 to
1.0.31.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tweo_timm.settings import ABOVE_0, ANY, AT_LEAST_1, FRACTION, Bounds, flag


@dataclass(frozen=True)
class ModelOptions:
    """Model."""

    model: str = flag("resnet50", "Architecture, as timm names it.")
    pretrained: bool = flag(False, "Start from timm's pretrained weights.")
    pretrained_path: str | None = flag(None, "Load this file as if it held the pretrained weights, adapting them.")
    pretrained_cfg_overlay: dict[str, Any] = flag({}, "Entries of the pretrained configuration to replace.")
    initial_checkpoint: str = flag("", "Load this checkpoint into the model, unadapted.", metavar="FILE")
    resume: str = flag(
        "", "Checkpoint to continue from, or 'auto': the experiment's own last one.", metavar="FILE|auto"
    )
    no_resume_opt: bool = flag(False, "Leave the optimizer's state out when resuming.")
    num_classes: int | None = flag(None, "Number of classes; unset: the architecture's.", bounds=AT_LEAST_1)
    gp: str | None = flag(None, "Global pooling: avg, max, avgmax, token, map; unset: the architecture's.")
    img_size: int | None = flag(None, "Image size; unset: the architecture's.", bounds=AT_LEAST_1)
    in_chans: int | None = flag(None, "Number of image channels.", bounds=AT_LEAST_1)
    input_size: list[int] | None = flag(None, "Channels, height and width.", nargs=3, bounds=AT_LEAST_1)
    crop_pct: float | None = flag(
        None, "Center crop of validation, as a fraction of the resized image.", bounds=Bounds(0, 1, open="low")
    )
    mean: list[float] | None = flag(None, "Pixel mean per channel; unset: the architecture's.", bounds=ANY)
    std: list[float] | None = flag(
        None, "Pixel standard deviation per channel; unset: the architecture's.", bounds=ABOVE_0
    )
    interpolation: str = flag("", "Validation resize interpolation; empty: the architecture's.")
    batch_size: int = flag(128, "Batch size per process.", "-b", "--batch-size", bounds=AT_LEAST_1)
    validation_batch_size: int | None = flag(
        None,
        "Validation batch size per process; unset: --batch-size.",
        "-vb",
        "--validation-batch-size",
        bounds=AT_LEAST_1,
    )
    channels_last: bool = flag(False, "Use the channels-last memory layout.")
    fuser: str = flag("", "TorchScript fuser; only empty is accepted, see --torchscript.")
    grad_accum_steps: int = flag(1, "Batches accumulated into one update.", bounds=AT_LEAST_1)
    grad_checkpointing: bool = flag(False, "Recompute activations in the backward pass.")
    fast_norm: bool = flag(False, "Normalize in low precision under autocast.")
    model_kwargs: dict[str, Any] = flag({}, "Further arguments of the architecture.")
    head_init_scale: float | None = flag(None, "Scale of the classifier's initial weights.", bounds=ANY)
    head_init_bias: float | None = flag(None, "Initial bias of the classifier.", bounds=ANY)
    torchcompile_mode: str | None = flag(None, "Mode of torch.compile, e.g. max-autotune.")
    torchscript: bool = flag(False, "Refused: a scripted model runs neither TWEO nor FP8; use --torchcompile.")
    torchcompile: str | None = flag(None, "Compile with this backend (bare: inductor).", nargs="?", const="inductor")


@dataclass(frozen=True)
class DeviceOptions:
    """Device, precision and processes."""

    device: str = flag("cuda", "Device: cuda, cpu, mps, cuda:1.")
    amp: bool = flag(False, "Mixed precision through autocast.")
    amp_dtype: str = flag("float16", "Low precision of --amp; ViTs prefer bfloat16.", choices=("float16", "bfloat16"))
    model_dtype: str | None = flag(
        None, "Dtype of the whole model, without autocast.", choices=("float32", "float16", "bfloat16")
    )
    no_ddp_bb: bool = flag(False, "No broadcast of buffers in DDP.")
    synchronize_step: bool = flag(False, "Synchronize the device after each step.")
    local_rank: int = flag(
        0, "Rank on this machine; torchrun sets it.", "--local_rank", "--local-rank", recorded=False, bounds=Bounds(-1)
    )
    device_modules: list[str] | None = flag(None, "Python modules to import first, e.g. device backends.")
    fsdp: bool = flag(False, "Shard parameters, gradients and optimizer state over the processes (FSDP2).")


@dataclass(frozen=True)
class NormOptions:
    """Batch normalization."""

    bn_momentum: float | None = flag(None, "Momentum of batch normalization.", bounds=FRACTION)
    bn_eps: float | None = flag(None, "Epsilon of batch normalization.", bounds=ABOVE_0)
    sync_bn: bool = flag(False, "Synchronize batch normalization over processes.")
    dist_bn: str = flag(
        "reduce",
        "How statistics are shared after each epoch; empty: not.",
        choices=("reduce", "broadcast", ""),
        metavar="{reduce,broadcast,''}",
    )
    split_bn: bool = flag(False, "Separate batch normalization per augmentation split.")


@dataclass(frozen=True)
class EmaOptions:
    """Moving average of the weights."""

    model_ema: bool = flag(False, "Keep a moving average of the weights, and evaluate it.")
    model_ema_force_cpu: bool = flag(False, "Keep it on the CPU, on the first process only, unevaluated.")
    model_ema_force_fp32: bool = flag(False, "Keep it in float32 for a bfloat16 model; for a float16 one it always is.")
    model_ema_decay: float = flag(0.9998, "Its decay per update.", bounds=FRACTION)
    model_ema_warmup: bool = flag(False, "Ramp the decay up over the first updates.")
