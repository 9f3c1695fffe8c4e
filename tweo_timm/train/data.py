"""Loaders of a training run, all of them timm's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import AugMixDataset, FastCollateMixup, Mixup, create_loader
from timm.data.auto_augment import NAME_TO_OP, posterize
from timm.data.loader import PrefetchLoader

from tweo_timm.run.classes import check_num_classes, check_same_classes, class_names
from tweo_timm.run.dataset import RESAMPLINGS, image_dtype, open_dataset, require_known, target_details
from tweo_timm.run.folders import split_folder
from tweo_timm.run.pictures import Alterations
from tweo_timm.run.readers import reads_folders
from tweo_timm.run.samples import fixed_sample
from tweo_timm.run.world import World
from tweo_timm.train.options import TrainOptions
from tweo_timm.train.replay import ReplayLoader
from tweo_timm.train.signals import PatientWorker


@dataclass
class Data:
    """What a run reads.

    Attributes:
        train: yields (images float (B, C, H, W), targets) on the device, augmented.
        replay: the loader inside `train` that knows where it is.
        val: yields (images, targets) on the device; None with an empty --val-split.
        mixup: mixes a batch on the device; None where the loader's workers do it, or nobody.
        soft_targets: whether targets are dense distributions, because of Mixup or CutMix.
        class_names: name -> index where the dataset has names, else None.
        batch_size: of training batches, on average where --train-batch-sizes gives several.
        alterations: counts what of the training images is not read as it is seen.
        loss_scale: what the loss of a batch of so many images is multiplied by, for --variable-batch-loss-scale.
    """

    train: Any
    replay: ReplayLoader
    val: Any
    mixup: Mixup | None
    soft_targets: bool
    class_names: dict[str, int] | None
    batch_size: float
    alterations: Alterations
    loss_scale: Callable[[int], float]

    def start_epoch(self, epoch: int, mixup_off_epoch: int) -> None:
        """Tell the samplers which epoch begins, and switch Mixup off where the options say so."""
        parts: list[Any] = [getattr(self.train, name, None) for name in ("sampler", "batch_sampler", "dataset")]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        reader: Any = getattr(self.replay.loader.dataset, "reader", None)
        if self.replay.loader.num_workers == 0 and getattr(reader, "ds", None) is not None:
            # Without workers timm's WebDataset pipeline, and its shuffling generator with it, would outlive the epoch.
            reader.ds = None
        if mixup_off_epoch and epoch >= mixup_off_epoch:
            self.train.mixup_enabled = False
            if self.mixup is not None:
                self.mixup.mixup_enabled = False

    def batches(self) -> Iterator[tuple[Any, torch.Tensor]]:
        """Yield the training batches of one epoch, mixed."""
        for images, targets in self.train:
            yield self.mixup(images, targets) if self.mixup is not None else (images, targets)
        self.alterations.report()


def open_data(
    options: TrainOptions,
    data_config: dict[str, Any],
    num_classes: int,
    world: World,
    features_of: Callable[[Any, Any], tuple[Any, Any]] | None = None,
) -> Data:
    """Build both loaders of a training run.

    Args:
        options: the run's options.
        data_config: timm's resolved input size, mean, std, interpolation and crop.
        num_classes: of the model.
        world: device and rank.
        features_of: makes of the two splits what is read in place of images; None for images.

    Raises:
        ValueError: if data is missing, or its classes do not fit the model.
    """
    require_known("--worker-seeding", options.worker_seeding, ("all", "part"))
    require_known("--train-crop-mode", options.train_crop_mode or "rrc", ("rrc", "rkrc", "rkrr"))
    require_known("--train-interpolation", options.train_interpolation or "random", (*RESAMPLINGS, "random"))
    train_set, val_set = _datasets(options, data_config, num_classes)
    _check_shards(options, train_set, world)
    if features_of is not None:
        train_set, val_set = features_of(train_set, val_set)
        options = replace(options, no_prefetcher=True)  # timm's prefetcher would normalize what is no image
    mixup_kwargs = _mixup_kwargs(options, num_classes)
    collate = FastCollateMixup(**mixup_kwargs) if mixup_kwargs and not options.no_prefetcher else None
    try:
        with _posterizing_to_black():
            train = _train_loader(options, data_config, train_set, collate, world)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"the training loader cannot be made: {error}") from error
    lookahead = isinstance(train, PrefetchLoader)
    replay = ReplayLoader(train.loader if lookahead else train, lookahead)
    batch_size = getattr(replay.loader.batch_sampler, "average_batch_size", float(options.batch_size))
    val = _val_loader(options, data_config, val_set, world) if val_set is not None else None
    for loader in (replay.loader, *([getattr(val, "loader", val)] if val is not None else [])):
        loader.worker_init_fn = PatientWorker(loader.worker_init_fn)
    if lookahead:
        train.loader = replay
    return Data(
        train=train if lookahead else replay,
        replay=replay,
        val=val,
        mixup=Mixup(**mixup_kwargs) if mixup_kwargs and options.no_prefetcher else None,
        soft_targets=bool(mixup_kwargs),
        class_names=class_names(getattr(train_set, "dataset", train_set)),
        batch_size=batch_size,
        alterations=getattr(train_set, "dataset", train_set).alterations,  # AugMixDataset holds one inside
        loss_scale=_loss_scale(options, batch_size),
    )


def calibration_images(
    options: TrainOptions, data_config: dict[str, Any], num_classes: int, count: int, batch_size: int
) -> list[torch.Tensor]:
    """Read a fixed random sample of the training split, preprocessed as for validation, as validate.py reads it.

    Returns:
        Batches (B, C, H, W), float32, on the CPU.

    Raises:
        ValueError: if the split cannot be found.
    """
    details = {"num_samples": options.train_num_samples, **target_details(options, num_classes)}
    dataset = open_dataset(options, options.train_split, data_config, exif=options.exif, **details)
    set_transform(options, data_config, dataset, training=False)
    return fixed_sample(dataset, count, batch_size, options.seed, options.workers)


def set_transform(options: TrainOptions, data_config: dict[str, Any], dataset: Any, training: bool) -> None:
    """Let a data set return images as the model takes them, normalized: timm's loaders say how when they are made."""
    plain = replace(options, workers=0, no_prefetcher=True, aug_splits=0, mixup=0.0, cutmix=0.0, cutmix_minmax=None)
    here = World(torch.device("cpu"))
    with _posterizing_to_black():
        if training:
            _train_loader(plain, data_config, dataset, None, here)
        else:
            _val_loader(plain, data_config, dataset, here)


def _datasets(options: TrainOptions, data_config: dict[str, Any], num_classes: int) -> tuple[Any, Any]:
    details = {"seed": options.seed, "batch_size": options.batch_size, **target_details(options, num_classes)}
    details |= {"num_classes": None if options.task == "multilabel" else num_classes, "exif": options.exif}
    _check_splits(options)
    train_set = open_dataset(
        options,
        options.train_split,
        data_config,
        is_training=True,
        repeats=options.epoch_repeats,
        num_samples=options.train_num_samples,
        **details,
    )
    val_set = None
    if options.val_split:
        val_set = open_dataset(
            options, options.val_split, data_config, is_training=False, num_samples=options.val_num_samples, **details
        )
    check_same_classes({options.train_split: train_set, options.val_split: val_set})
    check_num_classes(train_set, num_classes, bool(options.class_map))
    if options.aug_splits:
        train_set = AugMixDataset(train_set, num_splits=options.aug_splits)
    return train_set, val_set


def _check_splits(options: TrainOptions) -> None:
    """Refuse two names that mean the same images: the validation would be on what was trained on."""
    root = Path(str(options.data or options.data_dir))
    splits = (options.train_split, options.val_split)
    if not options.val_split or not reads_folders(options.dataset) or not root.exists():
        return
    folders = [split_folder(root, split) for split in splits]
    if root.is_file():
        raise ValueError(
            f"--data-dir {root} is one archive, all of which would be used for both splits: pass the folder that holds "
            "it, with --train-split train.tar and --val-split val.tar, say, or --val-split ''"
        )
    if not any(folders):
        raise ValueError(
            f"--data-dir {root} holds neither split ({', '.join(splits)}), and all of it would be used for both: pass "
            "the folder that holds train/ and val/"
        )
    if folders[0] == folders[1] and splits[0] != splits[1]:
        raise ValueError(
            f"--train-split {splits[0]} and --val-split {splits[1]} are both {folders[0]}: give two folders"
        )


def _check_shards(options: TrainOptions, train_set: Any, world: World) -> None:
    """Refuse fewer WebDataset shards than readers in several processes: some would end early, and the others wait."""
    shards = getattr(getattr(getattr(train_set, "reader", None), "split_info", None), "filenames", None)
    workers = max(options.workers, 1)
    if world.distributed and shards and len(shards) < world.size * workers:
        most = len(shards) // world.size
        remedy = f"pass --workers {most} at most" if most else "use fewer processes or more shards"
        raise ValueError(
            f"the training split has {len(shards)} shards, which {world.size} processes x {workers} workers cannot "
            f"share: {remedy}"
        )


def _loss_scale(options: TrainOptions, batch_size: float) -> Callable[[int], float]:
    power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[options.variable_batch_loss_scale]
    if power == 0.0 or not options.train_img_sizes:
        return lambda samples: 1.0
    return lambda samples: float((samples / batch_size) ** power)


def _mixup_kwargs(options: TrainOptions, num_classes: int) -> dict[str, Any]:
    """Timm's Mixup arguments; empty without Mixup and CutMix."""
    if not (options.mixup > 0 or options.cutmix > 0 or options.cutmix_minmax is not None):
        return {}
    return {
        "mixup_alpha": options.mixup,
        "cutmix_alpha": options.cutmix,
        "cutmix_minmax": options.cutmix_minmax,
        "prob": options.mixup_prob,
        "switch_prob": options.mixup_switch_prob,
        "mode": options.mixup_mode,
        "label_smoothing": options.smoothing,
        "num_classes": num_classes,
        "multi_label": options.task == "multilabel",
    }


def _train_loader(
    options: TrainOptions, data_config: dict[str, Any], dataset: Any, collate: FastCollateMixup | None, world: World
) -> Any:
    interpolation = options.train_interpolation
    if options.no_aug or not interpolation:
        interpolation = data_config["interpolation"]
    return create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=options.batch_size,
        is_training=True,
        no_aug=options.no_aug,
        re_prob=options.reprob,
        re_mode=options.remode,
        re_count=options.recount,
        re_split=options.resplit,
        train_crop_mode=options.train_crop_mode,
        scale=options.scale,
        ratio=options.ratio,
        hflip=options.hflip,
        vflip=options.vflip,
        color_jitter=options.color_jitter,
        color_jitter_prob=options.color_jitter_prob,
        grayscale_prob=options.grayscale_prob,
        gaussian_blur_prob=options.gaussian_blur_prob,
        auto_augment=options.aa,
        num_aug_repeats=options.aug_repeats,
        num_aug_splits=options.aug_splits,
        interpolation=interpolation,
        mean=data_config["mean"],
        std=data_config["std"],
        num_workers=options.workers,
        distributed=world.distributed,
        collate_fn=collate,
        pin_memory=options.pin_mem,
        device=world.device,
        use_prefetcher=not options.no_prefetcher,
        use_multi_epochs_loader=options.use_multi_epochs_loader,
        img_dtype=image_dtype(options),
        persistent_workers=False,  # workers that outlive an epoch carry random state that no checkpoint can hold
        worker_seeding=options.worker_seeding,
        **_size_schedule(options),
    )


@contextlib.contextmanager
def _posterizing_to_black() -> Iterator[None]:
    """Let the augmentations that are made meanwhile keep 0 bits of an image, as Pillow did before version 13.

    timm's policies ask for that at their strongest: rand-m9-mstd0.5-inc1 for one image in 500, and Pillow now refuses.
    """
    before = {name: op for name, op in NAME_TO_OP.items() if op is posterize}
    NAME_TO_OP.update(dict.fromkeys(before, posterize_to_bits))
    try:
        yield
    finally:
        NAME_TO_OP.update(before)


def posterize_to_bits(image: Image.Image, bits: int, **settings: Any) -> Image.Image:
    """Keep the highest `bits` bits of each channel; 0 bits leave a black image."""
    posterized: Image.Image = posterize(image, bits, **settings) if bits > 0 else Image.new(image.mode, image.size)
    return posterized


def _size_schedule(options: TrainOptions) -> dict[str, Any]:
    """Arguments of timm's create_loader for --train-img-sizes; empty without."""
    if not options.train_img_sizes:
        return {}
    return {
        "input_size_choices": options.train_img_sizes,
        "batch_size_choices": options.train_batch_sizes,
        "batch_choice_weights": options.train_size_probs,
        "batch_choice_seed": options.seed,
        "batch_choice_schedule": options.train_size_schedule,
        "batch_schedule_epochs": options.epochs,
        "batch_schedule_spread": options.train_size_schedule_spread,
        "batch_schedule_random_mix": options.train_size_random_mix,
        "num_batches": options.train_batches_per_epoch,
    }


def _val_loader(options: TrainOptions, data_config: dict[str, Any], dataset: Any, world: World) -> Any:
    streamed = any(kind in options.dataset for kind in ("tfds", "wds"))
    return create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=options.validation_batch_size or options.batch_size,
        is_training=False,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        # Streams are cut by processes and workers: the fewer, the less padding.
        num_workers=min(2, options.workers) if streamed and world.distributed else options.workers,
        distributed=world.distributed,
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        img_dtype=image_dtype(options),
        pin_memory=options.pin_mem,
        device=world.device,
        use_prefetcher=not options.no_prefetcher,
        persistent_workers=False,
    )
