"""Flags that several commands have: declared here once, and inherited by the options of each command.

Source: timm's training and validation scripts, 1.0.29 to 1.0.31, for what is timm's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tweo_timm.settings import ABOVE_0, ANY, AT_LEAST_0, AT_LEAST_1, Bounds, Decides, flag


@dataclass(frozen=True)
class ConfigOptions:
    """Configuration."""

    DECIDES = Decides.PROCESS

    config: str = flag(
        "",
        "YAML recipe, the name of a shipped one, or any args.yaml that timm wrote; flags override it.",
        "-c",
        "--config",
        metavar="FILE|NAME",
        recorded=False,
    )
    config_unknown: str = flag(
        "error", "What an unknown key of --config is.", choices=("error", "warn"), recorded=False
    )
    print_config: bool = flag(False, "Print the resolved run as YAML and exit.", recorded=False)


@dataclass(frozen=True)
class FileOptions(ConfigOptions):
    """Configuration."""

    config: str = flag(
        "", "YAML file of these settings; flags override it.", "-c", "--config", metavar="FILE", recorded=False
    )


@dataclass(frozen=True)
class DatasetOptions:
    """Dataset."""

    DECIDES = Decides.DATA

    data: str | None = flag(
        None, "Dataset folder; the old positional form of --data-dir.", "data", nargs="?", metavar="DIR"
    )
    data_dir: str | None = flag(None, "Dataset root folder.", metavar="DIR")
    dataset: str = flag(
        "", "Dataset as TYPE/NAME, e.g. wds/imagenet, hfds/NAME, torch/NAME; empty: image folder or tar."
    )
    dataset_download: bool = flag(False, "Let torch/ and tfds/ datasets download themselves.")
    class_map: str = flag("", "Text file that maps class names to indices.", metavar="FILE", decides=Decides.LABELS)
    input_key: str | None = flag(None, "Dataset field that holds the image.", decides=Decides.INPUT)
    input_img_mode: str | None = flag(
        None, "PIL mode that images are converted to, e.g. RGB or L.", decides=Decides.INPUT
    )
    exif: bool = flag(
        False, "Turn images upright as their EXIF orientation says; timm passes over it.", decides=Decides.INPUT
    )
    target_key: str | None = flag(
        None, "Dataset field that holds the label; for multi-label also a,b,c or a/b.", decides=Decides.LABELS
    )
    target_format: str | None = flag(
        None,
        "How a multi-label target is stored: class indices or a 0/1 vector.",
        choices=("indices", "multihot"),
        decides=Decides.LABELS,
    )
    dataset_trust_remote_code: bool = flag(False, "Let a Hugging Face dataset run code of its own repository.")


@dataclass(frozen=True)
class TargetOptions:
    """Task."""

    DECIDES = Decides.LABELS

    task: str = flag("classification", "What the labels are.", choices=("classification", "multilabel"))
    multilabel_threshold: float = flag(
        0.5, "Probability above which a label counts as predicted (F1).", bounds=Bounds(0, 1, open="both")
    )


@dataclass(frozen=True)
class ModelOptions:
    """Model."""

    DECIDES = Decides.MODEL

    num_classes: int | None = flag(
        None, "Number of classes; unset: the architecture's; 0: no head, for validation.", bounds=AT_LEAST_0
    )
    gp: str | None = flag(None, "Global pooling: avg, max, avgmax, token, map; unset: the architecture's.")
    in_chans: int | None = flag(None, "Number of image channels.", bounds=AT_LEAST_1)
    model_kwargs: dict[str, Any] = flag({}, "Further arguments of the architecture.")
    pretrained_cfg_overlay: dict[str, Any] = flag({}, "Entries of the pretrained configuration to replace.")
    clipped_softmax: float = flag(
        0.0,
        "Attention below about this share of 1/N becomes 0, for ViT and Swin (alpha of clipped softmax); 0: off.",
        metavar="ALPHA",
        bounds=AT_LEAST_0,
    )


@dataclass(frozen=True)
class NormOptions:
    """Batch normalization."""

    DECIDES = Decides.MODEL

    bn_eps: float | None = flag(None, "Epsilon of batch normalization.", bounds=ABOVE_0)


@dataclass(frozen=True)
class ImageOptions:
    """Images."""

    DECIDES = Decides.INPUT

    img_size: int | None = flag(None, "Image size; unset: the architecture's.", bounds=AT_LEAST_1)
    input_size: list[int] | None = flag(None, "Channels, height and width.", nargs=3, bounds=AT_LEAST_1)
    crop_pct: float | None = flag(
        None, "Center crop, as a fraction of the resized image.", bounds=Bounds(0, 1, open="low")
    )
    mean: list[float] | None = flag(None, "Pixel mean per channel; unset: the architecture's.", bounds=ANY)
    std: list[float] | None = flag(
        None, "Pixel standard deviation per channel; unset: the architecture's.", bounds=ABOVE_0
    )
    interpolation: str = flag("", "Resize interpolation; empty: the architecture's.")


@dataclass(frozen=True)
class PrecisionOptions:
    """Device and precision."""

    DECIDES = Decides.TRAINING

    device: str = flag("cuda", "Device: cuda, cpu, mps, cuda:1.")
    amp: bool = flag(False, "Mixed precision through autocast.")
    amp_dtype: str = flag(
        "float16",
        "Low precision of --amp; ViTs prefer bfloat16. auto: bfloat16 where it is fast, no autocast elsewhere.",
        choices=("float16", "bfloat16", "auto"),
    )
    model_dtype: str | None = flag(
        None, "Dtype of the whole model, without autocast.", choices=("float32", "float16", "bfloat16")
    )
    channels_last: bool = flag(False, "Use the channels-last memory layout.")
    fast_norm: bool = flag(False, "Normalize in low precision under autocast.")
    torchcompile: str | None = flag(None, "Compile with this backend (bare: inductor).", nargs="?", const="inductor")
    torchcompile_mode: str | None = flag(None, "Mode of torch.compile, e.g. max-autotune.")
    torchscript: bool = flag(False, "Refused: a scripted model runs neither hooks nor FP8; use --torchcompile.")
    fuser: str = flag("", "TorchScript fuser; only empty is accepted, see --torchscript.")
    pin_mem: bool = flag(False, "Pin the loader's memory.")
    no_prefetcher: bool = flag(False, "No prefetching to the device.")
