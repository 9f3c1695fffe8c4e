"""Where images come from, and how they are cut and augmented: names, types and defaults are those of timm's train.py.

Refuses nothing by itself; combinations are checked where the groups meet.  Source: timm's training script, 1.0.29 to
1.0.31.
"""

from __future__ import annotations

from dataclasses import dataclass

from tweo_timm.run import options as shared
from tweo_timm.settings import ABOVE_0, AT_LEAST_0, AT_LEAST_1, FRACTION, Bounds, Decides, flag

DROP_PATH_RULES = ("linear", "constant")


@dataclass(frozen=True)
class DatasetOptions(shared.DatasetOptions):
    """Dataset."""

    DECIDES = Decides.DATA

    train_split: str = flag("train", "Training split.")
    val_split: str = flag("validation", "Validation split; empty: none, and the training loss decides.")
    train_num_samples: int | None = flag(
        None, "Number of training samples, for iterable datasets that do not know.", bounds=AT_LEAST_1
    )
    val_num_samples: int | None = flag(
        None, "Number of validation samples, for iterable datasets that do not know.", bounds=AT_LEAST_1
    )


@dataclass(frozen=True)
class AugmentOptions:
    """Augmentation and regularization."""

    DECIDES = Decides.TRAINING

    no_aug: bool = flag(False, "Resized and centred crops alone: no flips, colours, erasing. Mixup and CutMix stay.")
    train_crop_mode: str | None = flag(None, "Training crop: rrc (random resized crop), rkrc or rkrr.")
    scale: list[float] = flag([0.08, 1.0], "Area range of the random resized crop, as fractions.", bounds=AT_LEAST_0)
    ratio: list[float] = flag([3.0 / 4.0, 4.0 / 3.0], "Aspect ratio range of the random resized crop.", bounds=ABOVE_0)
    hflip: float = flag(0.5, "Probability of a horizontal flip.", bounds=FRACTION)
    vflip: float = flag(0.0, "Probability of a vertical flip.", bounds=FRACTION)
    color_jitter: float | None = flag(
        0.4, "Color jitter factor; without effect under --aa other than 3a.", bounds=AT_LEAST_0
    )
    color_jitter_prob: float | None = flag(None, "Probability of the color jitter; unset: always.", bounds=FRACTION)
    grayscale_prob: float | None = flag(None, "Probability of conversion to gray.", bounds=FRACTION)
    gaussian_blur_prob: float | None = flag(None, "Probability of a Gaussian blur.", bounds=FRACTION)
    aa: str | None = flag(None, "AutoAugment policy, e.g. rand-m9-mstd0.5-inc1, original, v0, 3a, augmix-m5-w4-d2.")
    aug_repeats: float = flag(
        0.0, "Copies of each image in an epoch's sampling (distributed training only).", bounds=AT_LEAST_0
    )
    aug_splits: int = flag(0, "AugMix splits of a batch: 0, or at least 2.", bounds=AT_LEAST_0)
    reprob: float = flag(0.0, "Probability of random erasing.", bounds=FRACTION)
    remode: str = flag("pixel", "What erased areas are filled with.", choices=("pixel", "rand", "const"))
    recount: int = flag(1, "Number of erased areas.", bounds=AT_LEAST_1)
    resplit: bool = flag(False, "Leave the first augmentation split without random erasing.")
    mixup: float = flag(0.0, "Mixup alpha; on if above 0.", bounds=AT_LEAST_0)
    cutmix: float = flag(0.0, "CutMix alpha; on if above 0.", bounds=AT_LEAST_0)
    cutmix_minmax: list[float] | None = flag(
        None, "CutMix min and max ratio; on if set, and overrides its alpha.", bounds=FRACTION
    )
    mixup_prob: float = flag(1.0, "Probability of mixup or CutMix where either is on.", bounds=FRACTION)
    mixup_switch_prob: float = flag(0.5, "Probability of CutMix rather than mixup where both are on.", bounds=FRACTION)
    mixup_mode: str = flag("batch", "What shares mixing parameters.", choices=("batch", "pair", "elem", "half"))
    mixup_off_epoch: int = flag(0, "Epoch from which mixup and CutMix are off; 0: never.", bounds=AT_LEAST_0)
    smoothing: float = flag(
        0.1, "Label smoothing; 0 unless given for --task multilabel.", bounds=Bounds(0, 1, open="high")
    )
    train_interpolation: str = flag("random", "Training resize interpolation: random, bilinear or bicubic.")
    drop: float = flag(0.0, "Dropout rate of the classifier.", bounds=FRACTION)
    drop_connect: float | None = flag(
        None, "Old name of --drop-path; refused, because timm no longer reads it.", bounds=FRACTION
    )
    drop_path: float | None = flag(
        None, "Stochastic depth rate; unset: the architecture's default (Swin 0.1, ViT 0).", bounds=FRACTION
    )
    drop_path_rule: str = flag(
        "linear", "Rate of stochastic depth: from 0 with the depth (timm), or the same in all.", choices=DROP_PATH_RULES
    )
    drop_block: float | None = flag(None, "DropBlock rate, for convolutional models that have it.", bounds=FRACTION)


@dataclass(frozen=True)
class ImageSizeOptions:
    """Scheduled training resolution."""

    DECIDES = Decides.DATA

    train_img_sizes: list[int] | None = flag(
        None, "Image sizes, one of which each batch is made at.", bounds=AT_LEAST_1
    )
    train_batch_sizes: list[int] | None = flag(None, "Batch size for each of --train-img-sizes.", bounds=AT_LEAST_1)
    train_size_probs: list[float] | None = flag(
        None, "Sampling weight of each of --train-img-sizes.", bounds=AT_LEAST_0
    )
    train_size_schedule: str = flag(
        "constant", "Whether the preferred size moves from first to last.", choices=("constant", "progressive")
    )
    train_size_schedule_spread: float = flag(
        0.65, "Spread of the progressive schedule, in size indices.", bounds=ABOVE_0
    )
    train_size_random_mix: float = flag(
        0.1, "Fraction of uniformly drawn sizes under the progressive schedule.", bounds=FRACTION
    )
    train_batches_per_epoch: int | None = flag(
        None,
        "Batches (before accumulation) in an epoch; unset: what the data gives.",
        "--train-batches-per-epoch",
        "--train-steps-per-epoch",
        bounds=AT_LEAST_1,
    )
    variable_batch_loss_scale: str = flag(
        "none", "Gradient scale by batch size relative to the average one.", choices=("none", "sqrt", "linear")
    )


@dataclass(frozen=True)
class NaflexOptions:
    """Native-resolution models (NaFlex)."""

    DECIDES = Decides.DATA

    naflex_loader: bool = flag(False, "Load batches of variable sequence length; needs a NaFlex model.")
    naflex_train_seq_lens: list[int] = flag(
        [128, 256, 576, 784, 1024], "Sequence lengths to train at.", bounds=AT_LEAST_1
    )
    naflex_max_seq_len: int = flag(576, "Sequence length of validation.", bounds=AT_LEAST_1)
    naflex_patch_sizes: list[int] | None = flag(None, "Patch sizes to train at, e.g. 8 16 32.", bounds=AT_LEAST_1)
    naflex_patch_size_probs: list[float] | None = flag(
        None, "Probability of each patch size, summing to 1.", bounds=FRACTION
    )
    naflex_loss_scale: str = flag("linear", "Loss scale by batch size.", choices=("none", "sqrt", "linear"))
    naflex_patchify_channels_first: bool = flag(False, "Lay patches out channels first.")
