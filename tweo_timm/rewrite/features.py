"""RotatedFeatures: what takes features of a rotated model back into the basis of the model that it was made from.

A model without a head hands its stream out. After a rotation that is x Q in place of x, and its last norm has lost
gains and shift, which stood in the old basis. forward_intermediates and features_only hand the stream out of any model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tweo_timm.outputs import Outputs
from tweo_timm.wide import wide

_NORM = ("weight", "bias", "constant")


class RotatedFeatures:
    """Takes features back: `unrotate(model.forward_features(images))` is what the original model returned.

    Args:
        rotations: stage -> Q, as `RotationReport.rotations`.
        norms: stage -> the lost affine of the last norm (weight, bias, constant), as `RotationReport.norms`.
    """

    def __init__(self, rotations: Mapping[str, Tensor], norms: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.rotations, self.norms = dict(rotations), {name: dict(norm) for name, norm in norms.items()}

    def unrotate(self, features: Tensor, stage: str = "", *, normed: bool = True, channel_axis: int = -1) -> Tensor:
        """Return features in the original basis.

        Args:
            features: any shape with the stage's width on `channel_axis`.
            stage: such as "blocks" or "layers.2"; "" is the last. Stages that were not rotated need no unrotating.
            normed: whether the features come out of the model's last norm, rather than from the stream before it.
            channel_axis: -1 for tokens, 1 for the (B, C, H, W) of forward_intermediates.

        Raises:
            ValueError: for another stage, or another width.
        """
        stage = stage or list(self.rotations)[-1]
        if stage not in self.rotations:
            raise ValueError(f"stage {stage!r} was not rotated; rotated are {', '.join(self.rotations)}")
        last = wide(features.movedim(channel_axis, -1))
        rotation = self.rotations[stage].to(last.device, torch.float64)
        if last.shape[-1] != len(rotation):
            raise ValueError(f"features have {last.shape[-1]} channels on axis {channel_axis}, {stage} {len(rotation)}")
        back = last @ rotation.T
        if normed and stage in self.norms:
            weight, bias, constant = (self.norms[stage][name].to(back.device) for name in _NORM)
            back = back / constant * weight + bias
        return back.to(features.dtype).to(features.device).movedim(-1, channel_axis)

    def save(self, path: Path) -> None:
        """Write matrices and norms as safetensors, in float64, in one step."""
        from safetensors.torch import save

        tensors = {f"rotation.{stage}": matrix.contiguous() for stage, matrix in self.rotations.items()}
        for stage, norm in self.norms.items():
            tensors |= {f"{name}.{stage}": value.contiguous() for name, value in norm.items()}
        Outputs(path.parent).write(path.name, save(tensors))

    @classmethod
    def load(cls, path: Path) -> RotatedFeatures:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        tensors = {tuple(name.split(".", 1)): value for name, value in load_file(path).items()}
        rotations = {stage: value for (kind, stage), value in tensors.items() if kind == "rotation"}
        norms = {
            stage: {name: tensors[name, stage] for name in _NORM} for stage in rotations if ("weight", stage) in tensors
        }
        return cls(rotations, norms)
