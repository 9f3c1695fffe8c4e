"""What a run minimises: timm's training task and its criterion, from the run's options."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.loss import load_class_stats, resolve_class_weights
from timm.task import (
    ClassificationTask,
    DistillationTeacher,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import Tensor, nn

from tweo_timm.run.model import check_image_size, suggest_model
from tweo_timm.run.world import World
from tweo_timm.suggestion import suggest_path
from tweo_timm.train.groups.optimizer import SELF
from tweo_timm.train.options import TrainOptions

_logger = logging.getLogger(__name__)


def build_task(
    options: TrainOptions, model: nn.Module, data_config: Mapping[str, Any], soft_targets: bool, world: World
) -> TrainingTask:
    """Build timm's training task.

    Args:
        options: the run's options: task, loss and distillation.
        model: the model that is trained.
        data_config: timm's resolved preprocessing of its images.
        soft_targets: whether Mixup or CutMix makes the targets dense distributions.
        world: its device.

    Raises:
        ValueError: if the loss does not go with the targets, or the teacher cannot be had or does not fit.
    """
    shared: dict[str, Any] = {
        "criterion_kwargs": criterion_kwargs(options, soft_targets),
        "device": world.device,
        "dtype": getattr(torch, options.model_dtype) if options.model_dtype else None,
        "verbose": world.primary,
    }
    _check_lengths(options, shared["criterion_kwargs"], int(model.num_classes))  # type: ignore[arg-type]
    if options.kd_model_name is None:
        if options.task == "multilabel":
            return MultiLabelClassificationTask(model, threshold=options.multilabel_threshold, **shared)
        return ClassificationTask(model, **shared)
    if options.task == "multilabel":
        raise ValueError("--kd-model-name distils single-label classifiers only: leave out --task multilabel")
    if options.kd_model_name == SELF and not (options.initial_checkpoint or options.pretrained):
        raise ValueError(
            "--kd-model-name self would teach by random weights; give --initial-checkpoint FILE or --pretrained"
        )
    try:
        return _distillation(options, model, data_config, shared)
    except (RuntimeError, ValueError, TypeError, AssertionError, OSError) as error:
        teacher = options.kd_model_name
        near = suggest_model(teacher, error)
        raise ValueError(f"--kd-model-name {teacher} cannot teach {options.model}: {error}{near}") from error


def _distillation(
    options: TrainOptions, model: nn.Module, data_config: Mapping[str, Any], shared: dict[str, Any]
) -> TrainingTask:
    place: dict[str, Any] = {"device": shared["device"], "dtype": shared["dtype"]}
    shared |= {"distill_loss_weight": options.distill_loss_weight, "task_loss_weight": options.task_loss_weight}
    if options.kd_model_name == SELF:
        teacher = _own_teacher(model, data_config, place)
    else:
        teacher = DistillationTeacher(str(options.kd_model_name), model.num_classes, model.in_chans, **place)
        _check_teacher(options, teacher.model, model, data_config["input_size"])
    task: TrainingTask
    if options.kd_distill_type == "logit":
        task = LogitDistillationTask(
            model, teacher, loss_type=options.kd_loss_type, temperature=options.kd_temperature, **shared
        )
    elif options.kd_distill_type == "feature":
        task = FeatureDistillationTask(
            model,
            teacher,
            student_feature_dim=options.kd_student_feature_dim,
            teacher_feature_dim=options.kd_teacher_feature_dim,
            **shared,
        )
    else:
        task = TokenDistillationTask(
            model, teacher, distill_type=options.kd_token_distill_type, temperature=options.kd_temperature, **shared
        )
    for name in ("mean", "std"):  # timm's are those of the student's architecture, whatever the loader does
        used = torch.tensor(data_config[name], **place).view(1, -1, 1, 1)
        task.register_buffer(f"student_{name}", used, persistent=False)
    return task


def _own_teacher(model: nn.Module, data_config: Mapping[str, Any], place: Mapping[str, Any]) -> DistillationTeacher:
    """The model with the weights that the run starts from, which a resumed run loads again; it sees the same images."""
    teacher = DistillationTeacher(copy.deepcopy(model).requires_grad_(False), **place)
    for name in ("mean", "std"):
        used = torch.tensor(data_config[name], **place).view(1, -1, 1, 1)
        teacher.register_buffer(f"{name}_kd", used, persistent=False)
    return teacher


def _check_teacher(options: TrainOptions, teacher: nn.Module, student: nn.Module, input_size: Sequence[int]) -> None:
    """Refuse a teacher that would see other images than it was trained on, or guess by weights drawn at random."""
    trained: dict[str, Any] = teacher.pretrained_cfg  # type: ignore[assignment]
    classes, channels = trained.get("num_classes"), trained.get("input_size", (3,))[0]
    if options.kd_distill_type != "feature" and classes != student.num_classes:
        raise ValueError(
            f"its weights tell {classes} classes apart and the student {student.num_classes}, so that timm would give "
            "it a new head of random weights; choose a teacher of the same classes, or --kd-distill-type feature"
        )
    if channels != input_size[0]:
        raise ValueError(f"it takes images of {channels} channels and the student {input_size[0]}; choose another")
    for size in {tuple(input_size[1:]), *((side, side) for side in options.train_img_sizes or ())}:
        check_image_size("the teacher", teacher, (channels, *size))


def criterion_kwargs(options: TrainOptions, soft_targets: bool) -> dict[str, Any]:
    """Return the arguments of timm's create_classification_loss.

    Args:
        options: the run's options.
        soft_targets: whether targets are dense distributions, which hold the label smoothing already.
    """
    loss = options.loss or ("jsd" if options.jsd_loss else "bce" if options.bce_loss else None)
    with _naming("--class-stats", options.class_stats):
        stats = load_class_stats(options.class_stats)
    weights: dict[str, Any] = {
        "power": options.loss_weight_power,
        "beta": options.loss_weight_beta,
        "max_weight": options.loss_weight_max,
        "class_stats": stats,
    }
    with _naming("--loss-class-weight", options.loss_class_weight):
        class_weight = resolve_class_weights(options.loss_class_weight, "class_weight", **weights)
    flag = "--bce-pos-weight" if options.loss_pos_weight is None else "--loss-pos-weight"
    positive = options.bce_pos_weight if options.loss_pos_weight is None else options.loss_pos_weight
    with _naming(flag, positive):
        pos_weight = resolve_class_weights(positive, "pos_weight", **weights)
    return {
        "loss_type": loss,
        "smoothing": options.smoothing,
        "soft_targets": soft_targets,
        "class_weight": class_weight,
        "pos_weight": pos_weight,
        "bce_target_thresh": options.bce_target_thresh,
        "bce_sum": options.bce_sum,
        "asl_gamma_pos": options.asl_gamma_pos,
        "asl_gamma_neg": options.asl_gamma_neg,
        "asl_clip": options.asl_clip,
        "asl_reduction": options.asl_reduction,
        "poly_epsilon": options.poly_epsilon,
        "poly_gamma": options.poly_gamma,
        "poly_alpha": options.poly_alpha,
        "jsd_splits": options.aug_splits,
        "twoway_tp": options.twoway_tp,
        "twoway_tn": options.twoway_tn,
        "class_counts": stats[0] if stats and loss == "db" else None,
        "num_samples": stats[1] if stats and loss == "db" else None,
        "db_neg_scale": options.db_neg_scale,
        "db_init_bias": options.db_init_bias,
        "db_focal_gamma": options.db_focal_gamma,
    }


def _check_lengths(options: TrainOptions, arguments: dict[str, Any], num_classes: int) -> None:
    """Refuse weights of another number of classes than the model's."""
    positive = "bce_pos_weight" if options.loss_pos_weight is None else "loss_pos_weight"
    counted = (("class_weight", "loss_class_weight"), ("pos_weight", positive), ("class_counts", "class_stats"))
    for name, dest in counted:
        weights = arguments[name]
        if isinstance(weights, Tensor) and weights.ndim and len(weights) not in (1, num_classes):
            raise ValueError(
                f"--{dest.replace('_', '-')} {getattr(options, dest)} has {len(weights)} values; it needs one for each "
                f"of {num_classes} classes"
            )


@contextlib.contextmanager
def _naming(flag: str, value: Any) -> Iterator[None]:
    """Say in every error that comes from the value of a flag which flag it was."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError) as error:
        if "could not convert" in str(error):
            raise ValueError(f"{flag} {value} is neither numbers nor a file{suggest_path(value)}") from error
        raise ValueError(f"{flag} {value}: {error}") from error
