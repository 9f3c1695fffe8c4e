# ruff: noqa: RUF009 - flag() returns a dataclass field, with a factory where the default is mutable
"""What a run writes, watches and logs: names, types and defaults of timm's train.py, and this package's own.

Refuses nothing by itself; combinations are checked where the groups meet.  Source: timm's training script, 1.0.29 to
1.0.31, for what is timm's.
"""

from __future__ import annotations

from dataclasses import dataclass

from tweo_timm.run.flags import flag


@dataclass(frozen=True)
class RunOptions:
    """Run, logging and checkpoints."""

    seed: int = flag(42, "Random seed; each process adds its rank.")
    worker_seeding: str = flag("all", "Which generators a loader's workers seed: all, or all but NumPy's (part).")
    log_interval: int = flag(50, "Updates between log lines.")
    val_interval: int = flag(1, "Epochs between validations.")
    recovery_interval: int = flag(0, "Updates between recovery checkpoints; 0: none.")
    checkpoint_hist: int = flag(10, "Best checkpoints to keep.")
    save_epochs: list[int] | None = flag(None, "Epochs after which a checkpoint is kept for good.")
    workers: int = flag(4, "Loader processes per process.", "-j", "--workers")
    persistent_workers: bool = flag(False, "Refused: loader processes start anew every epoch, for exact continuation.")
    save_images: bool = flag(False, "Save input batches at each log line.")
    pin_mem: bool = flag(False, "Pin the loader's memory.")
    no_prefetcher: bool = flag(False, "No prefetching to the device.")
    output: str = flag("", "Folder of the runs; empty: ./output/train.", metavar="DIR")
    experiment: str = flag("", "Name of the run's folder; empty: date, model and size.")
    eval_metric: str = flag("top1", "What decides the best checkpoint; for multi-label unless given: map.")
    tta: int = flag(0, "Refused above 1: timm's loaders make no copies to average.")
    use_multi_epochs_loader: bool = flag(False, "Keep loader processes across epochs.")
    log_wandb: bool = flag(False, "Log to Weights & Biases.")
    wandb_project: str | None = flag(None, "Its project.")
    wandb_tags: list[str] = flag([], "Its tags.")
    wandb_resume_id: str = flag("", "Its run to continue.")
    tensorboard: bool = flag(False, "Write TensorBoard events.")


@dataclass(frozen=True)
class TweoOptions:
    """TWEO: the penalty on extreme activations."""

    tweo_weight: float = flag(0.0, "Weight of the penalty; 0: off, the paper: 0.01.")
    tweo_tau: float = flag(3.0, "Magnitude above which activations cost.")
    tweo_power: float = flag(4.0, "Power of the cost; above 1.")
    tweo_schedule: str = flag(
        "constant", "Course of the weight over the run.", choices=("constant", "cosine", "linear")
    )
    tweo_end_weight: float = flag(0.0, "Weight at the end of a cosine or linear schedule.")
    tweo_reduction: str = flag(
        "block", "Mean per block, then over blocks (the paper), or over all elements.", choices=("block", "element")
    )
    tweo_start: float = flag(0.0, "Fraction of the run at which the schedule begins.")
    tweo_end: float = flag(1.0, "Fraction of the run at which the schedule ends.")
    tweo_blocks: str | None = flag(None, "Names the transformer blocks where they are not found.", metavar="REGEX")
    outlier_interval: int = flag(50, "Batches between outlier statistics in training; 0: none.")
    stop_on_peak: float | None = flag(None, "Stop the run when an activation exceeds this magnitude.")


@dataclass(frozen=True)
class Fp8Options:
    """FP8 training."""

    fp8: str = flag(
        "off",
        "What computes in FP8; auto: te, else native, else emulated, and it says which.",
        choices=("off", "auto", "te", "native", "emulated"),
    )
    fp8_format: str = flag("hybrid", "E4M3 with E5M2 gradients, or E4M3 throughout.", choices=("hybrid", "e4m3"))
    fp8_amax_history: int = flag(16, "Steps that delayed scaling looks back.")
    fp8_scaling: str = flag("delayed", "Where scales come from.", choices=("delayed", "current", "unit"))
    fp8_exclude: list[str] = flag([], "Layers left out, as patterns of their names.", metavar="REGEX")
    fp8_health_interval: int = flag(0, "Updates between reports on saturation and underflow; 0: none.")
