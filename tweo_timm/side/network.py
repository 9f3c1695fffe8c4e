"""SideNetwork: a frozen backbone, and beside it a small network that reads its streams; what LAST and MIET share.

The backbone is frozen in place, stays in eval mode when train() is called, and runs under no_grad. Its weights are in
no state_dict of the network: a task is its side network and head, and the backbone is named by its fingerprint. Outputs
of the backbone that do not change from epoch to epoch can be kept: `features` computes what is kept, `logits` goes on
from there, and with `from_cache` set the network's input are features.

Refused: backbones without transformer blocks or with streams of several shapes; see reading.py.
"""

from __future__ import annotations

import abc
from typing import Any

from timm.models import get_model_input_config
from torch import Tensor, nn

from tweo_timm.side.attention import LowRankAttention
from tweo_timm.side.basis import OwnBasis
from tweo_timm.side.config import SideConfig
from tweo_timm.side.head import Head
from tweo_timm.side.reading import Reading


class SideNetwork(nn.Module, abc.ABC):
    """What LAST and MIET share: reading the frozen backbone, and the head.

    Args:
        backbone: any model whose transformer blocks return streams of one shape. It is frozen in place.
        num_classes: classes.
        config: settings of the side network.
        blocks: regular expression naming the backbone's blocks by hand; None finds them by structure.
        summed: whether the streams are only read as their sum.
        basis: that which a rotated backbone had before; None for one that is as it was made.

    Attributes:
        backbone: the frozen model; no state_dict of the network holds it.
        head: the trained `Head`.
        config: the settings.
        reading: what is read of the backbone.
        summed: whether the features are the sum of the streams alone.
        from_cache: whether the input of the network are features in place of images.
        num_classes: classes.
        in_chans: channels of images.
        backbone_record: what names the backbone, as `tweo_timm.side.backbone.prepare` returns it.
        pretrained_cfg: timm's, for images as the backbone takes them.

    Raises:
        ValueError: the backbone has no such blocks, or the settings do not fit it.
    """

    name: str
    head: Head

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        config: SideConfig,
        blocks: str | None,
        summed: bool,
        basis: OwnBasis | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; a side network classifies into 1 or more: --num-classes N")
        backbone.requires_grad_(False).eval()
        self.backbone = backbone
        self.config = config
        self.reading = Reading(backbone, config.gap, blocks, basis)
        self.num_classes = num_classes
        self.from_cache = False
        self.summed = summed
        self.backbone_record: dict[str, Any] = {}
        image = get_model_input_config(backbone)
        self.in_chans = image["input_size"][0]
        fixed = {"input_size": image["input_size"], "fixed_input_size": image["fixed_input_size"]}
        self.pretrained_cfg = {**_as_dict(getattr(backbone, "pretrained_cfg", {})), **fixed}
        self.register_state_dict_post_hook(_without_backbone)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_backbone_may_be_missing)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> SideNetwork:
        """Set the mode of the side network and the head; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """Run the frozen backbone.

        Args:
            images: (B, channels, H, W).

        Returns:
            What the side network reads, without a graph: (B, K, N, C), in the dtype of the side network.
        """
        found: Tensor = self.reading.streams(self.backbone, images, self.head.fc.weight.dtype, self.summed)
        return found

    @abc.abstractmethod
    def tokens(self, features: Tensor) -> Tensor:
        """Run the side network: the head's tokens (B, N, C) from features (B, K, N, C)."""

    def logits(self, features: Tensor) -> Tensor:
        """Run side network and head: (B, num_classes) from features (B, K, N, C)."""
        logits: Tensor = self.head(self.tokens(features))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, channels, H, W), or of features where `from_cache` is set."""
        return self.logits(x if self.from_cache else self.features(x))

    def get_classifier(self) -> nn.Linear:
        """Return the linear layer of the head, as timm's models do."""
        return self.head.fc

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """Shape (K, N, C) of the features of one image of the backbone's own size."""
        return (1 if self.summed else self.reading.count, self.reading.tokens, self.reading.dim)

    def describe(self) -> dict[str, Any]:
        """Return what weights of the network belong to: its name, settings and blocks, and the backbone's record."""
        return {
            "side": self.name,
            "settings": self.config.of_weights(),
            "num_classes": self.num_classes,
            "reads": [self.reading.first, *self.reading.names],
            "features": list(self.feature_shape),
            "backbone": self.backbone_record,
        }

    def _modules_of(self, count: int) -> list[LowRankAttention]:
        config = self.config
        return [
            LowRankAttention(self.reading.dim, config.rank, config.num_heads, config.drop_path) for _ in range(count)
        ]


def _without_backbone(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}backbone.")]:
        del state[name]


def _backbone_may_be_missing(module: nn.Module, keys: Any) -> None:
    assert isinstance(module, SideNetwork)
    names = tuple(f"backbone.{name}" for name in module.backbone.state_dict())
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.endswith(names)]


def _as_dict(config: Any) -> dict[str, Any]:
    return dict(config.to_dict()) if hasattr(config, "to_dict") else dict(config)
