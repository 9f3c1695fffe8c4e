"""Everything a training run consists of, put together in the one order that works.

model -> gradient checkpointing -> device -> FP8 -> task -> EMA -> (sharding) -> TWEO -> optimizer -> recorders ->
(resume) -> compile -> DDP. Layers replaced after the optimizer exists would not be trained; an EMA is a deep copy,
which sharded weights do not allow; hooks that come after the first compiled call are ignored.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask
from timm.utils import NativeScaler, random_seed, unwrap_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tweo_timm.blocks import find_blocks
from tweo_timm.config import AUTO
from tweo_timm.fp8.patch import held_fp8, patch_fp8
from tweo_timm.needs import require
from tweo_timm.outliers import OutlierRecorder
from tweo_timm.run.class_names import names_by_index
from tweo_timm.run.dataset import image_dtype, place, preprocessing
from tweo_timm.run.model import check_compiler
from tweo_timm.run.world import World
from tweo_timm.suggestion import suggest
from tweo_timm.task import TweoHandle, attach_tweo
from tweo_timm.train.data import Data, open_data
from tweo_timm.train.model import build_model, check_image_sizes
from tweo_timm.train.objective import build_task
from tweo_timm.train.options import TrainOptions, as_namespace
from tweo_timm.train.param_groups import scale_rates
from tweo_timm.train.pretrained import settle_head
from tweo_timm.train.rate import batch_remark, resolved_lr
from tweo_timm.train.shard import check_sharding, shard
from tweo_timm.train.side import build_side, share_backbone
from tweo_timm.train.side_data import cached_datasets

_logger = logging.getLogger(__name__)


@dataclass
class Session:
    """The parts of a run.

    Attributes:
        options: the resolved options.
        world: device and rank.
        data: loaders.
        data_config: timm's resolved preprocessing.
        model: the model itself, unwrapped.
        task: timm's training task around it.
        tweo: the attached penalty; None for a model without transformer blocks.
        train_recorder: statistics of the model's blocks in training; None with --outlier-interval 0 or without blocks.
        recorder: the same in validation; None without blocks.
        ema_recorder: the same for the EMA model; None without an EMA that is validated.
        optimizer: timm's.
        scheduler: timm's; None with --sched none.
        scaler: timm's NativeScaler for float16 on CUDA, else None.
        autocast: makes the context of every forward pass.
        fp8: the report of the FP8 conversion; None in full precision.
        gradients_apart: whether the gradients of task and penalty can be found each for itself.
        num_epochs: epochs to train, cooldown and warm-up prefix included.
        updates_per_epoch: optimizer updates in an epoch.
    """

    options: TrainOptions
    world: World
    data: Data
    data_config: dict[str, Any]
    model: nn.Module
    task: TrainingTask
    tweo: TweoHandle | None
    train_recorder: OutlierRecorder | None
    recorder: OutlierRecorder | None
    ema_recorder: OutlierRecorder | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: Any
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    fp8: Any
    gradients_apart: bool
    num_epochs: int
    updates_per_epoch: int

    @property
    def block_names(self) -> list[str]:
        """Names of the transformer blocks; empty for a model without."""
        return list(self.recorder.stats) if self.recorder is not None else []

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that Lookahead wraps; without Lookahead the optimizer itself."""
        inner: torch.optim.Optimizer = getattr(self.optimizer, "_base_optimizer", self.optimizer)
        return inner

    @property
    def second_order(self) -> bool:
        """Whether the optimizer differentiates the gradients once more."""
        return bool(getattr(self.inner_optimizer, "is_second_order", False))

    def place(self, images: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Bring a batch of images to where and to how the model, or its EMA of another dtype, takes them."""
        return place(images, self.options, self.world.device, dtype)

    @property
    def falling_metric(self) -> bool:
        """Whether what ranks checkpoints is a loss: as --eval-metric says, and without a validation split."""
        return _falling_metric(self.options, self.data)

    @property
    def ema_dtype(self) -> torch.dtype:
        """The dtype of the EMA's weights."""
        return _ema_dtype(self.options) or image_dtype(self.options)

    def wrap(self) -> None:
        """Compile and distribute the task; the last step, after weights have been resumed."""
        options, world = self.options, self.world
        if options.torchcompile:
            self.task.compile(backend=options.torchcompile, mode=options.torchcompile_mode)
            self.task.compile_ema(backend=options.torchcompile, mode=options.torchcompile_mode)
        if world.distributed and not options.fsdp:
            device_ids = [world.device] if world.device.type == "cuda" else None
            self.task.prepare_distributed(device_ids=device_ids, **_buffer_settings(options))


def build_session(options: TrainOptions, world: World) -> Session:
    """Build all parts of a run, up to but not including compilation and DDP. Writes nothing.

    Args:
        options: the resolved options.
        world: device and rank.

    Raises:
        ValueError: if an option cannot be honoured, data or model are missing, or they do not fit each other.
    """
    _refuse_here(options, world)
    check_compiler(options.torchcompile)
    _set_backends(world)
    random_seed(options.seed, world.rank)
    model = build_model(options, world) if options.side == "off" else build_side(options, world)
    namespace = as_namespace(options)
    data_config = preprocessing(namespace, model, verbose=world.primary)
    check_image_sizes(options, model, data_config["input_size"])
    num_classes = int(options.num_classes or model.num_classes)  # type: ignore[arg-type]
    fp8 = _patch_fp8(options, model)
    data = _data(options, model, data_config, num_classes, world)
    updates_per_epoch = _updates_per_epoch(options, data)
    blocks = _blocks(options, model)
    if options.fsdp:
        check_sharding(options, world, fp8)
        require("sharding")
    task = build_task(options, model, data_config, data.soft_targets, world)
    if data.val is not None:
        _check_eval_metric(options, task)
    ema_model = _set_up_ema(options, task)
    validated_ema = None if options.model_ema_force_cpu else ema_model
    if options.fsdp:
        for unit in [model] if ema_model is None else [model, ema_model]:
            shard(unit, [unit.get_submodule(name) for name in blocks], world)
    recorder = functools.partial(OutlierRecorder, blocks=options.tweo_blocks)
    tweo = _attach(options, task) if blocks else None
    if tweo is not None and fp8 is not None:
        tweo.apart = functools.partial(held_fp8, model)
    namespace.lr = _learning_rate(options, data.batch_size * world.size * options.grad_accum_steps, world)
    optimizer = build_optimizer(options, namespace, task.get_trainable_module())
    scheduler, num_epochs = _schedule(options, namespace, optimizer, _falling_metric(options, data), updates_per_epoch)
    session = Session(
        options=options,
        world=world,
        data=data,
        data_config=data_config,
        model=model,
        task=task,
        tweo=tweo,
        train_recorder=recorder(model) if blocks and options.outlier_interval else None,
        recorder=recorder(model) if blocks else None,
        ema_recorder=recorder(validated_ema) if blocks and validated_ema is not None else None,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=_scaler(options, world),
        autocast=_autocast(options, world),
        fp8=fp8,
        gradients_apart=_gradients_apart(options, world, fp8),
        num_epochs=num_epochs,
        updates_per_epoch=updates_per_epoch,
    )
    if session.second_order:
        _check_differentiable_twice(session)
    return session


def _data(options: TrainOptions, model: nn.Module, data_config: dict[str, Any], num_classes: int, world: World) -> Data:
    """Images, or features of a frozen backbone; a head that knows the very classes of the data is kept."""
    features_of = cached_datasets(options, model, data_config, world) if options.side_cache else None
    data = open_data(options, data_config, num_classes, world, features_of)
    if options.side == "off":  # the head beside a frozen backbone is always new
        settle_head(options, model, names_by_index(data.class_names))
    return data


def _schedule(
    options: TrainOptions, namespace: argparse.Namespace, optimizer: torch.optim.Optimizer, falling: bool, updates: int
) -> tuple[Any, int]:
    """The learning rate's schedule, None if it is constant, and the number of epochs after which it ends.

    Raises:
        ValueError: if --start-epoch or --stop-epoch lies outside of it.
    """
    scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(namespace, decreasing_metric=falling), updates_per_epoch=updates
    )
    if scheduler is None:
        scale_rates(optimizer)
    if options.start_epoch is not None and options.start_epoch >= num_epochs:
        raise ValueError(
            f"--start-epoch {options.start_epoch} leaves nothing to train of {num_epochs} epochs, which count from 0; "
            "give a smaller one, or more --epochs"
        )
    if options.stop_epoch is not None and options.stop_epoch > num_epochs:
        raise ValueError(f"--stop-epoch {options.stop_epoch} is after the last of {num_epochs} epochs: leave it out")
    _say_endless_warmup(options, options.stop_epoch or num_epochs)
    return scheduler, num_epochs


def _say_endless_warmup(options: TrainOptions, epochs: int) -> None:
    """Say that the rate only rises; timm's default warm-up of 5 epochs is longer than many a trial run."""
    if options.sched != "none" and 0 < epochs <= options.warmup_epochs:
        _logger.warning(
            "--warmup-epochs %d: the %d epochs of this run never leave the warm-up, so the learning rate rises "
            "throughout and is not reached; give fewer, 0 say, or more --epochs",
            *(options.warmup_epochs, epochs),
        )


def _updates_per_epoch(options: TrainOptions, data: Data) -> int:
    updates = -(-len(data.train) // options.grad_accum_steps)
    if updates == 0:
        raise ValueError(
            f"the training split holds less than one batch of {options.batch_size}: use a smaller --batch-size"
        )
    return updates


def _attach(options: TrainOptions, task: TrainingTask) -> TweoHandle | None:
    """Attach TWEO, or what watches alone; None if nothing is to be watched."""
    if not (options.tweo_acts or options.outlier_interval > 0):
        return None
    try:
        return attach_tweo(task, options.tweo_config(), options.tweo_blocks)
    except RuntimeError as error:
        raise ValueError(f"{error} (or watch nothing: --tweo-weight 0 --outlier-interval 0)") from error


def _gradients_apart(options: TrainOptions, world: World, fp8: Any) -> bool:
    """Whether a step's graph allows more than one backward pass; where not, that is said, or refused."""
    reasons = {
        "--torchcompile frees what a second backward pass needs": bool(options.torchcompile),
        "--fsdp shards weights again in the backward pass": options.fsdp,
        "Transformer Engine has not been tried with two backward passes": getattr(fp8, "backend", "") == "te",
        "the loss scaler of float16 keeps its scale for itself": _scaler(options, world) is not None,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), "")
    if reason and options.tweo_weight == AUTO:
        raise ValueError(f"--tweo-weight auto finds the gradients of task and penalty, and {reason}; give a number")
    if reason and options.tweo_acts:
        _logger.info("The gradients of task and penalty are not compared: %s", reason)
    return not reason


def _check_differentiable_twice(session: Session) -> None:
    twice = f"--opt {session.options.opt} differentiates twice, which"
    if session.fp8 is not None:
        raise ValueError(f"{twice} FP8 layers do not allow: leave out --fp8")
    if session.world.distributed:
        raise ValueError(f"{twice} torch's distributed wrappers do not allow: use one process")
    if any(getattr(module, "fused_attn", False) for module in session.model.modules()):
        raise ValueError(f"{twice} fused attention does not allow: set TIMM_FUSED_ATTN=0")


def _refuse_here(options: TrainOptions, world: World) -> None:
    """Refuse what needs processes or packages that are not there; checks.py refuses settings alone."""
    if options.aug_repeats and not world.distributed:
        raise ValueError(
            f"--aug-repeats {options.aug_repeats:g} shares the copies of an image among processes: start with "
            "torchrun, or give --aug-repeats 0"
        )
    if options.log_wandb and world.primary and importlib.util.find_spec("wandb") is None:
        raise ValueError("--log-wandb needs the package wandb: pip install wandb, or use --tensorboard")
    if options.use_multi_epochs_loader:
        _logger.warning(
            "--use-multi-epochs-loader keeps random states in loader processes, where no checkpoint reaches them: a "
            "resumed run draws other augmentations and another order than one that was not interrupted"
        )


def _learning_rate(options: TrainOptions, global_batch: float, world: World) -> float:
    remark = batch_remark(options, global_batch)
    if remark and world.primary:
        _logger.warning("%s", remark)
    return resolved_lr(options, global_batch)


def build_optimizer(options: TrainOptions, namespace: argparse.Namespace, module: nn.Module) -> torch.optim.Optimizer:
    """Create the optimizer of a module's parameters.

    Args:
        options: the run's options.
        namespace: the same under timm's names, `lr` being the resolved rate.
        module: what is trained.

    Raises:
        ValueError: if timm does not know the optimizer, or it does not accept the options.
    """
    try:
        optimizer = create_optimizer_v2(module, **optimizer_kwargs(cfg=namespace), **options.opt_kwargs)
    except (ValueError, TypeError, RuntimeError, AssertionError, IndexError) as error:
        near = suggest(options.opt, list_optimizers()) if "not found in registry" in str(error) else ""
        raise ValueError(f"--opt {options.opt}: {error}{near}") from error
    info = get_optimizer_info(options.opt.lower().split("_")[-1])
    known = {"--opt-eps": (options.opt_eps, info.has_eps), "--opt-betas": (options.opt_betas, info.has_betas)}
    unused = [flag for flag, (value, takes) in known.items() if value is not None and not takes]
    if unused:  # no error: files of timm's first years hold an epsilon for every optimizer
        _logger.warning("--opt %s takes no %s: without effect", options.opt, ", ".join(unused))
    return optimizer  # type: ignore[no-any-return]


def _set_up_ema(options: TrainOptions, task: TrainingTask) -> nn.Module | None:
    """Give the task an EMA and return its model, if there is to be one."""
    if not options.model_ema:
        return None
    device = torch.device("cpu") if options.model_ema_force_cpu else None
    decay, warmup = options.model_ema_decay, options.model_ema_warmup
    # With --fsdp one by one: torch's operators on lists do not take sharded weights together with whole buffers.
    task.setup_ema(
        decay=decay,
        use_warmup=warmup,
        device=device,
        foreach=not options.fsdp,
        dtype=_ema_dtype(options),
        stochastic_rounding_seed=options.seed,
    )
    ema_model: nn.Module = unwrap_model(task.get_eval_model(ema=True))
    if not options.model_ema_force_cpu:
        share_backbone(ema_model, task)
    return ema_model


def _falling_metric(options: TrainOptions, data: Data) -> bool:
    return data.val is None or "loss" in options.eval_metric


def _ema_dtype(options: TrainOptions) -> torch.dtype | None:
    """float32 where the model's own dtype could not hold an EMA's small steps, or need not; None is the model's."""
    whole = options.model_dtype == "float16" or (options.model_dtype == "bfloat16" and options.model_ema_force_fp32)
    return torch.float32 if whole else None


def _buffer_settings(options: TrainOptions) -> dict[str, bool]:
    """DDP's argument for --no-ddp-bb; newer versions of torch have renamed it."""
    if not options.no_ddp_bb:
        return {}
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


def _check_eval_metric(options: TrainOptions, task: TrainingTask) -> None:
    names = task.create_evaluator().metric_names
    if options.eval_metric not in names:
        raise ValueError(f"--eval-metric {options.eval_metric} is not measured by this task: use {', '.join(names)}")


def _set_backends(world: World) -> None:
    if world.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def _patch_fp8(options: TrainOptions, model: nn.Module) -> Any:
    if options.fp8 == "off":
        return None
    try:
        report = patch_fp8(model, options.fp8_recipe())
    except RuntimeError as error:  # what was asked for by name and cannot run
        raise ValueError(f"--fp8 {options.fp8}: {error}") from error
    if options.torchcompile and report.backend != "te":  # whose layers are not ours
        require("compiled fp8")
    return report


def _blocks(options: TrainOptions, model: nn.Module) -> dict[str, nn.Module]:
    """The transformer blocks; none is an error only for those who asked for something that acts on them."""
    if options.side != "off":
        _logger.info("No outlier statistics: what a frozen backbone computes does not change")
        return {}
    try:
        return find_blocks(model, options.tweo_blocks)
    except ValueError as error:
        if options.tweo_acts or options.tweo_blocks or options.fsdp:
            raise
        _logger.info("No outlier statistics: %s", str(error).split(":")[0])
        return {}


def _autocast(options: TrainOptions, world: World) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    if not options.amp:
        return contextlib.nullcontext
    dtype = torch.bfloat16 if options.amp_dtype in ("bfloat16", "bf16") else torch.float16
    return lambda: torch.autocast(device_type=world.device.type, dtype=dtype)


def _scaler(options: TrainOptions, world: World) -> Any:
    half = options.amp and options.amp_dtype in ("float16", "half")
    return NativeScaler(device=world.device.type) if half and world.device.type == "cuda" else None
