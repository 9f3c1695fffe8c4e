"""The learning rate of a run, and whether its batch is the one that its settings were written for.

A recipe is a rate for a number of images per update. On another number of processes timm's rule moves one of the two or
none, and least and warm-up rates never: `global_batch` of a recipe says what it is for, and another number is said.
Imports neither torch nor timm, because --print-config tells the rate.
"""

from __future__ import annotations

import os

from tweo_timm.train.options import TrainOptions


def resolved_lr(options: TrainOptions, global_batch: float) -> float:
    """The learning rate of a run, by timm's rule.

    Args:
        options: ``lr`` wins; else ``lr_base`` grows with ``global_batch / lr_base_size``, linearly or by its square
            root. Unless ``lr_base_scale`` says which, the root holds for optimizers with 'ada' or 'lamb' in their
            name, which includes AdamW.
        global_batch: Samples per update: batch size x processes x accumulation steps.

    Raises:
        ValueError: ``global_batch`` is not positive.
    """
    if global_batch < 1:
        raise ValueError(f"global_batch is {global_batch}; it counts the samples of one update, at least 1")
    if options.lr is not None:
        return options.lr
    adaptive = any(word in options.opt.lower() for word in ("ada", "lamb"))
    scale = options.lr_base_scale or ("sqrt" if adaptive else "linear")
    ratio = global_batch / options.lr_base_size
    return options.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def describe_rate(options: TrainOptions) -> str:
    """The rate and its batch in this many processes, as lines of YAML comments; the rate of the recipe's batch too."""
    if options.train_img_sizes:
        return "# learning rate: known with the data, since batches are of --train-img-sizes\n"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch = options.batch_size * processes * options.grad_accum_steps
    shape = f"{options.batch_size} a process x {processes} x {options.grad_accum_steps} accumulated"
    lines = [f"learning rate: {resolved_lr(options, batch):g} for {batch} images per update ({shape})"]
    if options.global_batch not in (None, batch):
        written = options.global_batch
        lines.append(f"written for {written} images per update: {resolved_lr(options, written):g} (global_batch)")
    return "".join(f"# {line}\n" for line in lines)


def batch_remark(options: TrainOptions, global_batch: float) -> str:
    """What to know of a batch that the settings were not written for; empty if they were, or do not say.

    Args:
        options: the settings; ``global_batch`` is the batch they are for.
        global_batch: samples per update of this run.
    """
    written = options.global_batch
    if written is None or written == global_batch:
        return ""
    lr = resolved_lr(options, global_batch)
    if options.lr is not None:
        rate = f"--lr {lr:g} stays as it is, and is for that batch"
    else:
        rate = f"--lr-base makes the rate {lr:g} instead of {resolved_lr(options, written):g}"
    fixed = f"--warmup-lr {options.warmup_lr:g} and --min-lr {options.min_lr:g} stay"
    steps = written * options.grad_accum_steps / global_batch
    remedy = f"--grad-accum-steps {steps:g} restores it" if steps >= 1 and steps == int(steps) else "set them by hand"
    return (
        f"an update is of {global_batch:g} images (batch x processes x accumulation), and the settings are written for "
        f"{written}: {rate}; {fixed}; {remedy}"
    )
