"""What a run writes, watches and logs: names, types and defaults of timm's train.py, and this package's own.

Refuses nothing by itself; combinations are checked where the groups meet.  Source: timm's training script, 1.0.29 to
1.0.31, for what is timm's.
"""

from __future__ import annotations

from dataclasses import dataclass

from tweo_timm.settings import AT_LEAST_0, AT_LEAST_1, Bounds, Decides, flag


@dataclass(frozen=True)
class RunOptions:
    """Run, logging and checkpoints."""

    DECIDES = Decides.RECORDS

    list_recipes: bool = flag(
        False, "List the recipes that --config finds by name, and exit.", recorded=False, decides=Decides.PROCESS
    )
    seed: int = flag(
        42, "Random seed; each process adds its rank.", bounds=Bounds(0, 2**32 - 1), decides=Decides.TRAINING
    )
    worker_seeding: str = flag(
        "all", "Which generators a loader's workers seed: all, or all but NumPy's (part).", decides=Decides.TRAINING
    )
    log_interval: int = flag(50, "Updates between log lines.", bounds=AT_LEAST_1)
    val_interval: int = flag(1, "Epochs between validations.", bounds=AT_LEAST_1, decides=Decides.TRAINING)
    recovery_interval: int = flag(0, "Updates between recovery checkpoints; 0: none.", bounds=AT_LEAST_0)
    checkpoint_hist: int = flag(10, "Best checkpoints to keep.", bounds=AT_LEAST_1)
    save_epochs: list[int] | None = flag(None, "Epochs after which a checkpoint is kept for good.", bounds=AT_LEAST_1)
    workers: int = flag(
        4, "Loader processes per process.", "-j", "--workers", bounds=Bounds(0, 1024), decides=Decides.DATA
    )
    persistent_workers: bool = flag(
        False, "Refused: loader processes start anew every epoch, for exact continuation.", decides=Decides.DATA
    )
    save_images: bool = flag(False, "Save input batches at each log line.")
    output: str = flag("", "Folder of the runs; empty: ./output/train.", metavar="DIR")
    experiment: str = flag("", "Name of the run's folder; empty: date, model and size.")
    eval_metric: str = flag(
        "top1", "What decides the best checkpoint; for multi-label unless given: map.", decides=Decides.TRAINING
    )
    tta: int = flag(
        0, "Refused above 1: timm's loaders make no copies to average.", bounds=AT_LEAST_0, decides=Decides.DATA
    )
    use_multi_epochs_loader: bool = flag(False, "Keep loader processes across epochs.", decides=Decides.DATA)
    log_wandb: bool = flag(False, "Log to Weights & Biases.")
    wandb_project: str | None = flag(None, "Its project.")
    wandb_tags: list[str] = flag([], "Its tags.")
    wandb_resume_id: str = flag("", "Its run to continue.", decides=Decides.PROCESS)
    tensorboard: bool = flag(False, "Write TensorBoard events.")
    sweep_locks: list[str] = flag(
        [],
        "Given by timm's sweep.py: lock files to hold while training.",
        metavar="FILE",
        recorded=False,
        decides=Decides.PROCESS,
    )
    sweep_attempt: list[str] | None = flag(
        None,
        "Given by timm's sweep.py: file that names the live attempt, and this one.",
        nargs=2,
        metavar="WORD",
        recorded=False,
        decides=Decides.PROCESS,
    )
