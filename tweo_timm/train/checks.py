"""What a training run's settings must satisfy together, said before anything is built.

Each rule ends in one sentence that names the flag, the value and the remedy. A flag that timm accepts and then ignores,
or that cannot work here, is refused. Facts about what timm does with a flag: its training script, 1.0.29 to 1.0.31.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tweo_timm.run.readers import dataset_rules, repetition_rules
from tweo_timm.run.rules import (
    image_mode,
    image_shape,
    option_name,
    out_of_bounds,
    pooling,
    regular_expressions,
    scripting,
    target_format,
)
from tweo_timm.train.groups import TrainSettings
from tweo_timm.train.groups.optimizer import SELF
from tweo_timm.train.side_rules import side_rules


def check_train_options(options: TrainSettings) -> None:
    """Refuse settings that are out of range, contradict each other or cannot be honoured.

    Raises:
        ValueError: the first such setting, with the reason and the remedy.
    """
    for rule in (_out_of_range, _not_honoured, _incomplete, _contradictory, _tweo_and_fp8, side_rules):
        for complaint in rule(options):
            raise ValueError(complaint)


def _out_of_range(options: TrainSettings) -> Iterator[str]:
    yield from out_of_bounds(options)
    for dest in ("scale", "ratio", "cutmix_minmax"):
        pair = getattr(options, dest)
        if pair is not None and (len(pair) != 2 or pair[0] > pair[1]):
            yield f"{option_name(dest)} is {pair}; it takes two numbers, the smaller first"
    if options.cutmix_minmax is not None and options.cutmix_minmax[0] == options.cutmix_minmax[1]:
        yield f"--cutmix-minmax is {options.cutmix_minmax}; timm draws from between the two, which must differ"
    if sorted(options.decay_milestones) != options.decay_milestones:
        yield f"--decay-milestones is {options.decay_milestones}; the epochs must be increasing"


def _not_honoured(options: TrainSettings) -> Iterator[str]:
    yield from scripting(options)
    if options.persistent_workers:
        yield (
            "--persistent-workers cannot be honoured: loader processes that outlive an epoch hold random state that no "
            "checkpoint can; leave it out"
        )
    if "tweo_timm.upstream" in (options.device_modules or ()):
        yield (
            "--device-modules tweo_timm.upstream is for timm's own train.py; here --tweo-weight and its fellows do the "
            "same (from a file: --device-modules with nothing after it)"
        )
    if options.tta > 1:
        yield (
            f"--tta {options.tta} cannot be honoured: timm averages groups of {options.tta} outputs, but no loader of "
            "timm makes the copies, so unrelated images would be averaged; use --tta 0"
        )
    if options.drop_connect is not None:
        yield (
            f"--drop-connect {options.drop_connect} cannot be honoured: timm no longer reads it; "
            f"use --drop-path {options.drop_connect}"
        )
    if options.naflex_loader:
        yield (
            "--naflex-loader cannot be honoured: its batches of varying length hold padding tokens, which statistics "
            "of outliers and the mean of the penalty would count; train NaFlexViT at a fixed --img-size, or with "
            "timm's train.py"
        )
    if options.kd_model_name is not None and options.kd_distill_type == "feature" and options.fp8 != "off":
        yield (
            f"--kd-distill-type feature cannot be honoured with --fp8 {options.fp8}: it calls parts of the model, and "
            "FP8 layers would not know that a step begins; use --kd-distill-type logit or token, or leave out --fp8"
        )


def _incomplete(options: TrainSettings) -> Iterator[str]:
    if options.kd_model_name == SELF and options.fp8 != "off":
        yield f"--kd-model-name self copies the model, which FP8 layers do not allow; leave out --fp8 {options.fp8}"
    yield from pooling(options)
    if bool(options.sweep_locks) != bool(options.sweep_attempt):
        yield "--sweep-locks and --sweep-attempt belong together, as timm's sweep.py gives them; give both or neither"
    if options.num_classes == 0:
        yield "--num-classes 0 leaves nothing to learn; give the number of classes of the data"
    if options.pretrained_path and not options.pretrained:
        yield "--pretrained-path does nothing without --pretrained; give both, or --initial-checkpoint FILE"
    if options.drop_path_rule == "constant" and not options.drop_path:
        yield f"--drop-path-rule constant needs a --drop-path above 0, which is {options.drop_path}; give it, or linear"
    yield from dataset_rules(options, ("train_split", "val_split"), ("train_num_samples", "val_num_samples"))
    yield from repetition_rules(options)
    stats = ("neg_pos", "inv_freq", "effective_num")
    if options.class_stats is None and (
        options.loss == "db" or {*stats} & {options.loss_pos_weight, options.loss_class_weight}
    ):
        yield "--loss db, neg_pos, inv_freq and effective_num count labels; give --class-stats FILE"
    if options.aug_splits == 1:
        yield "--aug-splits is 1; it must be 0 (off) or at least 2"
    if options.aug_splits and options.no_prefetcher:
        yield (
            f"--aug-splits {options.aug_splits} needs timm's prefetcher, which puts the splits together; leave out "
            "--no-prefetcher"
        )
    if options.fp8_health_interval and options.fp8 == "off":
        yield (
            f"--fp8-health-interval {options.fp8_health_interval} reports on FP8 layers; give --fp8 auto too, or leave "
            "it out"
        )
    if options.jsd_loss and options.aug_splits < 2:
        yield f"--jsd-loss needs --aug-splits 2 or more, which is {options.aug_splits}"
    if options.split_bn and options.aug_splits < 2 and not options.resplit:
        yield f"--split-bn needs --resplit, or --aug-splits 2 or more, which is {options.aug_splits}"
    if options.loss == "jsd" and options.aug_splits < 2:
        yield f"--loss jsd needs --aug-splits 2 or more, which is {options.aug_splits}"
    if ".." in Path(options.experiment).parts or (options.experiment and not Path(options.experiment).name):
        yield f"--experiment {options.experiment} names no folder in --output; give a name, deit_small_tweo say"
    sizes = options.train_img_sizes
    for dest in ("train_batch_sizes", "train_size_probs"):
        values = getattr(options, dest)
        if values is not None and len(values) != len(sizes or ()):
            yield f"{option_name(dest)} has {len(values)} values; it needs one for each of --train-img-sizes ({sizes})"
    alone = [
        option_name(dest)
        for dest, still in (
            ("train_batches_per_epoch", None),
            ("train_size_schedule", "constant"),
            ("variable_batch_loss_scale", "none"),
        )
        if getattr(options, dest) != still and not sizes
    ]
    if alone:
        yield f"{', '.join(alone)} does nothing without --train-img-sizes; give both or neither"
    probs = options.naflex_patch_size_probs
    if probs is not None and len(probs) != len(options.naflex_patch_sizes or ()):
        yield f"--naflex-patch-size-probs has {len(probs)} values; it needs one for each of --naflex-patch-sizes"


def _contradictory(options: TrainSettings) -> Iterator[str]:
    yield from image_shape(options)
    yield from image_mode(options)
    yield from _augmented_modes(options)
    for dest, loss in (("jsd_loss", "jsd"), ("bce_loss", "bce")):
        if getattr(options, dest) and options.loss not in (None, loss):
            yield f"{option_name(dest)} contradicts --loss {options.loss}; give --no-{loss}-loss or --loss {loss}"
    # timm writes both into its args.yaml when the old one is given.
    if options.bce_pos_weight is not None and options.loss_pos_weight not in (None, str(options.bce_pos_weight)):
        yield "--bce-pos-weight is the old form of --loss-pos-weight; give one of them"
    if options.jsd_loss and options.bce_loss:
        yield "--jsd-loss contradicts --bce-loss; give --no-jsd-loss or --no-bce-loss"
    if options.sched == "plateau" and options.sched_on_updates:
        yield "--sched plateau looks at every epoch's metric; leave out --sched-on-updates (from a file: --no-...)"
    yield from target_format(options)
    if options.model_ema_force_fp32 and not options.model_ema:
        yield "--model-ema-force-fp32 does nothing without --model-ema; give both or neither"
    mixes = options.mixup > 0 or options.cutmix > 0 or options.cutmix_minmax is not None
    odd = [size for size in options.train_batch_sizes or [options.batch_size] if size % 2]
    if mixes and odd:
        yield f"--mixup and --cutmix pair the images of a batch; give an even --batch-size, not {odd[0]}"
    if mixes and options.mixup_mode == "half" and options.no_prefetcher:
        yield "--mixup-mode half is what timm's prefetcher does; leave out --no-prefetcher, or give batch, pair or elem"
    if options.aug_splits and mixes:
        yield "--aug-splits cannot be mixed: leave out --mixup and --cutmix, or --aug-splits"
    if options.mixup_off_epoch and options.use_multi_epochs_loader and options.workers and not options.no_prefetcher:
        yield "--mixup-off-epoch does not reach loader processes that --use-multi-epochs-loader keeps; leave out one"
    if options.amp and options.model_dtype not in (None, "float32"):
        yield f"--amp needs a float32 model, not --model-dtype {options.model_dtype}; give --no-amp or leave it out"
    if options.task == "multilabel" and options.loss in ("ce", "jsd"):
        yield f"--loss {options.loss} is for one label an image; with --task multilabel use bce, asl, poly, zlpr or db"
    if options.task == "classification" and options.loss in ("twoway", "zlpr", "db"):
        yield f"--loss {options.loss} is for several labels an image; give --task multilabel, or --loss ce or bce"


def _augmented_modes(options: TrainSettings) -> Iterator[str]:
    """A complaint for each flag that would end a run at the first image of this mode that it is drawn for."""
    mode = options.input_img_mode
    remedy = "leave it out, or use --input-img-mode RGB or L"
    if options.aa and not options.no_aug and mode not in (None, "RGB", "L"):
        yield f"--aa {options.aa} does not work on images of --input-img-mode {mode}; {remedy}"
    if mode not in ("LA", "RGBA", "CMYK"):
        return
    if options.grayscale_prob and not options.no_aug:
        yield f"--grayscale-prob {options.grayscale_prob:g} does not work on --input-img-mode {mode}; {remedy}"
    if options.save_images:
        yield f"--save-images writes JPEG files, which hold no --input-img-mode {mode}; {remedy}"


def _tweo_and_fp8(options: TrainSettings) -> Iterator[str]:
    options.tweo_config()
    options.fp8_recipe()
    if options.stop_on_peak is not None and options.outlier_interval == 0 and options.tweo_weight == 0:
        yield "--stop-on-peak needs statistics: give --outlier-interval 1 or more"
    yield from regular_expressions("tweo_blocks", options.tweo_blocks)
