"""OwnBasis: the basis that a backbone's stream had before it was rotated, in which a side network reads it.

A rotated backbone computes the same as before, but its stream is z Q in place of z, and its last norm has lost gains
and shift. A side network that read z Q would begin as another function: its head's norm would begin without those
gains, which stand in the old basis. So each stream is taken back by Q' where it is read, and the head begins with the
norm of before: beside a rotated backbone a network begins, and is trained, as beside the one that was rotated.

Source: ours; rotations are those of `tweo_timm.rewrite`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tweo_timm.rewrite.features import RotatedFeatures
from tweo_timm.rewrite.rotate import rotate


@dataclass(frozen=True)
class OwnBasis:
    """What a backbone without a head was before a rotation.

    Attributes:
        features: takes its streams back.
        norm: its last norm, as it was; None if it has none by that name.
    """

    features: RotatedFeatures
    norm: nn.Module | None

    @classmethod
    def rotating(cls, backbone: nn.Module, method: str, batches: Sequence[Tensor]) -> OwnBasis:
        """Rotate a backbone in place, and return the basis that it had.

        Args:
            backbone: a timm model without a head.
            method: as `rotate` calls it.
            batches: preprocessed images (B, C, H, W), by which a rotation is learned and checked.

        Raises:
            ValueError: whatever `rotate` refuses; the backbone stays as it was.
        """
        norm = copy.deepcopy(getattr(backbone, "norm", None))
        report = rotate(backbone, method, batches, allow_rotated_features=True)
        return cls(RotatedFeatures(report.rotations, report.norms), norm)

    def back(self, streams: Tensor, block: str) -> Tensor:
        """Return streams (..., C) in the basis of before.

        Args:
            streams: before or after a block.
            block: its name.
        """
        stages = [stage for stage in self.features.rotations if block.startswith(f"{stage}.")]
        return self.features.unrotate(streams, stages[0], normed=False) if stages else streams
