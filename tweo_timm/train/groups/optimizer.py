"""How weights move: optimizer, learning rate schedule, loss: names, types and defaults are those of timm's train.py.

The loss options of timm 1.0.31 are named after the arguments of ``timm.loss.create_classification_loss``.
Refuses nothing by itself; combinations are checked where the groups meet.  Source: timm's training script, 1.0.29 to
1.0.31.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tweo_timm.run import options as shared
from tweo_timm.settings import ABOVE_0, AT_LEAST_0, AT_LEAST_1, FRACTION, Bounds, Decides, flag

RATE = Bounds(0, 1e6)
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "plateau", "wsd", "rsqrt", "constant", "none")
SELF = "self"
LOSSES = ("ce", "bce", "asl", "poly", "jsd", "twoway", "zlpr", "db")


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer."""

    DECIDES = Decides.TRAINING

    opt: str = flag("sgd", "Optimizer, as timm names it.")
    opt_eps: float | None = flag(None, "Epsilon; unset: the optimizer's.", bounds=FRACTION)
    opt_betas: list[float] | None = flag(None, "Betas; unset: the optimizer's.", bounds=Bounds(0, 1, open="high"))
    momentum: float = flag(0.9, "Momentum.", bounds=Bounds(0, 1, open="high"))
    weight_decay: float = flag(2e-5, "Weight decay.", bounds=AT_LEAST_0)
    clip_grad: float | None = flag(
        None, "Bound of the gradient, in the sense of --clip-mode; unset: none.", bounds=ABOVE_0
    )
    clip_mode: str = flag("norm", "How gradients are clipped.", choices=("norm", "value", "agc"))
    layer_decay: float | None = flag(
        None, "Factor of the learning rate from one layer to the one below.", bounds=Bounds(0, 1, open="low")
    )
    layer_decay_min_scale: float = flag(0.0, "Least layer-wise factor.", bounds=FRACTION)
    layer_decay_no_opt_scale: float | None = flag(None, "Factor below which a layer is not trained.", bounds=FRACTION)
    opt_kwargs: dict[str, Any] = flag({}, "Further arguments of the optimizer.")


@dataclass(frozen=True)
class ScheduleOptions:
    """Learning rate and schedule."""

    DECIDES = Decides.TRAINING

    sched: str = flag("cosine", "Schedule of the learning rate.", choices=SCHEDULES)
    sched_on_updates: bool = flag(False, "Step the schedule at each update rather than each epoch.")
    lr: float | None = flag(
        None, "Learning rate; overrides --lr-base.", metavar="LR", bounds=Bounds(0, 1e6, open="low")
    )
    lr_base: float = flag(0.1, "Learning rate at a global batch of --lr-base-size.", metavar="LR", bounds=RATE)
    lr_base_size: int = flag(256, "Global batch that --lr-base is for.", bounds=AT_LEAST_1)
    lr_base_scale: str = flag(
        "",
        "How the rate grows with the batch; empty: sqrt for ada* and lamb optimizers (AdamW too), else linear.",
        choices=("", "linear", "sqrt"),
        metavar="{linear,sqrt}",
    )
    global_batch: int | None = flag(
        None,
        "Images per update that the settings are written for; another number is warned of.",
        bounds=AT_LEAST_1,
        decides=Decides.RECORDS,
    )
    lr_noise: list[float] | None = flag(
        None, "When learning rate noise is on, as fractions of the run.", bounds=FRACTION
    )
    lr_noise_pct: float = flag(0.67, "Largest noise.", bounds=FRACTION)
    lr_noise_std: float = flag(1.0, "Its standard deviation.", bounds=ABOVE_0)
    lr_cycle_mul: float = flag(1.0, "Growth of the cycle length.", bounds=ABOVE_0)
    lr_cycle_decay: float = flag(0.5, "Factor of the learning rate per cycle.", bounds=ABOVE_0)
    lr_cycle_limit: int = flag(1, "Number of cycles.", bounds=AT_LEAST_1)
    lr_k_decay: float = flag(1.0, "k-decay of the cosine and poly schedules.", bounds=ABOVE_0)
    lr_decay_fn: str | None = flag(None, "Shape of the decay phase of wsd and rsqrt: linear, cosine, 1-sqrt, ...")
    lr_stable_timescale: float | None = flag(
        None, "Time scale of rsqrt, in epochs; unset: the warm-up's.", bounds=ABOVE_0
    )
    warmup_lr: float = flag(1e-5, "Learning rate at the start of the warm-up.", metavar="LR", bounds=RATE)
    min_lr: float = flag(0.0, "Lower bound of the learning rate.", metavar="LR", bounds=RATE)
    epochs: int = flag(300, "Number of epochs.", bounds=AT_LEAST_1)
    stop_epoch: int | None = flag(
        None, "Stop after this many epochs, leaving the schedule as it is.", bounds=AT_LEAST_1
    )
    epoch_repeats: float = flag(
        0.0, "Passes over the dataset in an epoch; 0: one.", bounds=AT_LEAST_0, decides=Decides.DATA
    )
    start_epoch: int | None = flag(
        None, "First epoch, overriding the checkpoint's.", bounds=AT_LEAST_0, decides=Decides.PROCESS
    )
    decay_milestones: list[int] = flag([90, 180, 270], "Epochs at which multistep decays.", bounds=AT_LEAST_0)
    decay_epochs: float | None = flag(
        90.0,
        "Interval of step; for wsd and rsqrt the length of the decay, 0.2 of the run unless given.",
        bounds=ABOVE_0,
    )
    warmup_epochs: int = flag(5, "Epochs of warm-up.", bounds=AT_LEAST_0)
    warmup_prefix: bool = flag(False, "Add the warm-up to the epochs rather than taking it from them.")
    cooldown_epochs: int = flag(0, "Epochs at --min-lr after the schedule, added to the epochs.", bounds=AT_LEAST_0)
    patience_epochs: int = flag(10, "Epochs without progress before plateau decays.", bounds=AT_LEAST_0)
    decay_rate: float = flag(0.1, "Factor of each decay.", "--decay-rate", "--dr", bounds=ABOVE_0)


@dataclass(frozen=True)
class LossOptions(shared.TargetOptions):
    """Loss."""

    DECIDES = Decides.TRAINING

    loss: str | None = flag(None, "Loss; unset: bce for --task multilabel, else ce.", choices=LOSSES)
    jsd_loss: bool = flag(False, "Jensen-Shannon loss over --aug-splits; the old form of --loss jsd.")
    bce_loss: bool = flag(False, "Binary cross-entropy; the old form of --loss bce.")
    bce_sum: bool = flag(False, "Sum over classes in the bce loss.")
    bce_target_thresh: float | None = flag(
        None, "Make soft targets 0 or 1 at this value, in the bce loss.", bounds=FRACTION
    )
    bce_pos_weight: float | None = flag(None, "Weight of positives in the bce loss; one number.", bounds=AT_LEAST_0)
    asl_gamma_pos: float = flag(1.0, "Focusing of positives, in the asl loss.", bounds=AT_LEAST_0)
    asl_gamma_neg: float = flag(4.0, "Focusing of negatives, in the asl loss.", bounds=AT_LEAST_0)
    asl_clip: float | None = flag(
        0.05, "Probability margin of negatives, in the multi-label asl loss.", bounds=Bounds(0, 1, open="high")
    )
    asl_reduction: str = flag("batchmean", "Reduction of the asl loss.", choices=("batchmean", "sum", "mean"))
    poly_epsilon: float = flag(2.0, "First coefficient of the poly loss.", bounds=Bounds(-1))
    poly_gamma: float = flag(0.0, "Focusing of the multi-label poly loss.", bounds=AT_LEAST_0)
    poly_alpha: float | None = flag(None, "Balance of positives in the multi-label poly loss.", bounds=FRACTION)
    twoway_tp: float = flag(4.0, "Temperature of positives, in the twoway loss.", bounds=ABOVE_0)
    twoway_tn: float = flag(1.0, "Temperature of negatives, in the twoway loss.", bounds=ABOVE_0)
    db_neg_scale: float = flag(2.0, "Scale of negatives, in the db loss.", bounds=ABOVE_0)
    db_init_bias: float = flag(0.05, "Shift by the class prior, in the db loss.", bounds=AT_LEAST_0)
    db_focal_gamma: float = flag(2.0, "Focusing, in the db loss.", bounds=AT_LEAST_0)
    loss_class_weight: str | None = flag(
        None, "Weight per class in bce and multi-label asl: numbers a,b,c, a file, inv_freq or effective_num."
    )
    loss_pos_weight: str | None = flag(
        None, "Weight of positives per class: a number, numbers a,b,c, a file, or neg_pos."
    )
    class_stats: str | None = flag(
        None, "JSON file with pos_counts and num_samples, for weights and db.", metavar="FILE"
    )
    loss_weight_power: float = flag(1.0, "Exponent of inv_freq and neg_pos.", bounds=AT_LEAST_0)
    loss_weight_beta: float = flag(0.999, "Beta of effective_num.", bounds=Bounds(0, 1, open="high"))
    loss_weight_max: float | None = flag(None, "Cap of the computed weights.", bounds=ABOVE_0)


@dataclass(frozen=True)
class DistillationOptions:
    """Knowledge distillation."""

    DECIDES = Decides.TRAINING

    kd_model_name: str | None = flag(
        None, "Teacher, as timm names it, or self: the weights that the run starts from; unset: no distillation."
    )
    kd_distill_type: str = flag("logit", "What the student imitates.", choices=("logit", "feature", "token"))
    kd_loss_type: str = flag("kl", "Loss of logit distillation.", choices=("kl",))
    distill_loss_weight: float | None = flag(None, "Weight of the distillation loss.", bounds=AT_LEAST_0)
    task_loss_weight: float | None = flag(
        None, "Weight of the task loss; alone, distillation has the rest to 1.", bounds=AT_LEAST_0
    )
    kd_temperature: float = flag(4.0, "Softmax temperature.", bounds=ABOVE_0)
    kd_student_feature_dim: int | None = flag(
        None, "Width of the student's features; unset: detected.", bounds=AT_LEAST_1
    )
    kd_teacher_feature_dim: int | None = flag(
        None, "Width of the teacher's features; unset: detected.", bounds=AT_LEAST_1
    )
    kd_token_distill_type: str = flag("soft", "Loss of token distillation.", choices=("soft", "hard"))
