"""The settings of a side network, and its flags.

The papers give no hyperparameters (arXiv:2402.04009, arXiv:2406.17559): every default here is ours. Imports no torch,
so that a command can read its settings before it waits for it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tweo_timm.settings import AT_LEAST_0, AT_LEAST_1, Bounds, Decides, SettingError, check_settings, flag, setting
from tweo_timm.tables import Entry, Names

SIDES = {"last": Entry("tweo_timm.side.last:Last"), "miet": Entry("tweo_timm.side.miet:Miet")}
"""The side networks by name."""
PRECISIONS = ("float32", "bfloat16")
"""What a frozen backbone computes in, beside the schemes of `quantize_static`."""


@dataclass(frozen=True)
class SideConfig:
    """Size and regularization of a side network. All defaults are ours.

    Attributes:
        rank: r, of queries, keys and values, far below the backbone's width.
        gap: g, blocks of the backbone in a group; it divides their number.
        modules_per_block: T, low-rank attention modules in a side block (LAST), or in all (MIET).
        num_heads: attention heads; they share the rank.
        drop: dropout before the classifier.
        drop_path: probability with which an image passes an attention module by, in training.

    Raises:
        ValueError: for a value out of range; the message names it and what is accepted.
        TypeError: for a value of the wrong type.
    """

    rank: int = setting(16, Bounds(1, 1 << 16))
    gap: int = setting(3, Bounds(1, 1 << 16))
    modules_per_block: int = setting(2, Bounds(1, 1 << 10))
    num_heads: int = setting(1, Bounds(1, 1 << 16))
    drop: float = setting(0.0, Bounds(0, 1, open="high"))
    drop_path: float = setting(0.0, Bounds(0, 1, open="high"))

    def __post_init__(self) -> None:
        check_settings(self)
        if self.rank % self.num_heads:
            raise SettingError("SideConfig", "num_heads", self.num_heads, f"a divisor of the rank, {self.rank}")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a dictionary of numbers."""
        return dataclasses.asdict(self)

    def of_weights(self) -> dict[str, int]:
        """Return those without which weights mean nothing: all but the regularization."""
        return {name: value for name, value in self.to_json().items() if not name.startswith("drop")}


@dataclass(frozen=True)
class SideOptions:
    """Side network on a frozen backbone."""

    DECIDES = Decides.MODEL

    side: str = flag("off", "Freeze the model, and train a small network beside it.", choices=Names(SIDES, "off"))
    side_rank: int = flag(SideConfig.rank, "Rank of its attention.")
    side_gap: int = flag(SideConfig.gap, "Blocks of the backbone in a group, after each of which it reads.")
    side_modules: int = flag(SideConfig.modules_per_block, "Attention modules in a side block (last), or in all.")
    side_heads: int = flag(SideConfig.num_heads, "Heads of its attention, which share the rank.")
    side_precision: str = flag(
        "float32",
        "What the backbone computes in: float32, bfloat16, or a scheme such as w8a8-tt+res+rot.",
        metavar="float32|bfloat16|SCHEME",
    )
    side_calibration_images: int = flag(
        512, "Training images that fix the scales of a quantized backbone.", bounds=AT_LEAST_1
    )

    side_cache: str = flag(
        "", "Folder for the backbone's features, computed once.", metavar="DIR", decides=Decides.RECORDS
    )
    side_augmentations: int = flag(
        0,
        "Fixed augmentations of each training image in --side-cache or --side-grid; 0: none, with --no-aug.",
        bounds=AT_LEAST_0,
        decides=Decides.DATA,
    )

    side_grid: list[str] = flag(
        [],
        "Train all combinations of these settings on one frozen forward pass, e.g. lr=1e-3,3e-3 rank=8,16.",
        metavar="NAME=VALUES",
        decides=Decides.RECORDS,
    )

    def side_config(self, drop: float, drop_path: float) -> SideConfig:
        """The settings of the network.

        Args:
            drop: dropout before the classifier.
            drop_path: stochastic depth.

        Raises:
            ValueError: for a value that is not accepted; the message names the flag.
        """
        try:
            return SideConfig(
                self.side_rank, self.side_gap, self.side_modules, self.side_heads, float(drop), float(drop_path)
            )
        except SettingError as error:
            names = {"modules_per_block": "--side-modules", "num_heads": "--side-heads", "drop": "--drop"}
            names["drop_path"] = "--drop-path"
            raise ValueError(error.spelled(names.get(error.name, f"--side-{error.name}"))) from error
