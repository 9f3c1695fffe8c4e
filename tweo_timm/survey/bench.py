"""What formats and fixes are tried on: images, a judge, and the limit of what may be lost."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tweo_timm.diagnose.float16 import Float16Readings, float16_readings
from tweo_timm.quant.static import quantize_static
from tweo_timm.rewrite.head import add_feature_head
from tweo_timm.rewrite.rotate import rotate
from tweo_timm.survey.decide import Decision, Outcome, decide
from tweo_timm.survey.sensitivity import Sensitivity, sensitivities

__all__ = ["Bench", "Judge", "Outcome", "Variant"]

Judge = Callable[[nn.Module, str], Outcome]
"""Scores a model on the split; the second argument is for a progress line."""


@dataclass(frozen=True)
class Variant:
    """A float model, and how it is to be computed.

    Attributes:
        model: never changed.
        scheme: of `quantize_static`.
        keep: layers and sites that stay in float.
    """

    model: nn.Module
    scheme: str
    keep: tuple[str, ...] = ()

    def but(self, **changes: object) -> Variant:
        """The variant with other fields."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass
class Bench:
    """What a survey measures with.

    Attributes:
        model: the float model as it is.
        judge: scores models on the split.
        calibration: image batches (B, C, H, W) that fix scales.
        samples: image batches that are looked at more closely.
        scored: makes the batches of all images that the judge scores, on which float16 is read; None: the samples.
        others: size -> images of it (pixels, (B, C, H, W)), at which float16 is read too.
        max_drop: points of Top-1 that may be lost.
        blocks: regular expression naming the blocks; None finds them.
        features: the model returns features, not logits.
        seed: of labels and rotations.
        say: gets a line where something takes its time.
    """

    model: nn.Module
    judge: Judge
    calibration: Sequence[Tensor]
    samples: Sequence[Tensor]
    scored: Callable[[], Iterable[Tensor]] | None = None
    others: Sequence[tuple[int, Tensor]] = ()
    max_drop: float = 1.0
    blocks: str | None = None
    features: bool = False
    seed: int = 0
    say: Callable[[str], None] = lambda line: None
    _rotated: dict[str, nn.Module | ValueError] = field(default_factory=dict)

    @functools.cached_property
    def float_outcome(self) -> Outcome:
        """How the float model does."""
        return self.judge(self.model, "float32")

    def build(self, variant: Variant) -> nn.Module:
        """Return the quantized model.

        Raises:
            ValueError, RuntimeError, TypeError: the model does not allow the scheme.
        """
        return quantize_static(variant.model, self.calibration, variant.scheme, self.blocks, keep_float=variant.keep)

    def decide(self, variant: Variant) -> Decision:
        """Score a variant against the float model."""
        with torch.inference_mode(False):
            built = self.build(variant)
        kept = f", {len(variant.keep)} in float" if variant.keep else ""
        return decide(self.float_outcome, self.judge(built, f"{variant.scheme}{kept}"), self.max_drop)

    def readings(self, model: nn.Module) -> Float16Readings:
        """Read what float16 would have to hold, on all images that are scored and at the other sizes.

        Raises:
            ValueError: the model does not take one of the sizes.
        """
        found = float16_readings(model, self.samples if self.scored is None else self.scored())
        for size, images in self.others:
            try:
                found = found.merged(float16_readings(at_size(model, size), [images.to(self.samples[0].dtype)]))
            except (AssertionError, RuntimeError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"float16 cannot be read at {size} pixels, which the model does not take: {error}"
                ) from error
        return found

    def sensitivities(self, variant: Variant) -> list[Sensitivity]:
        """Score the layers and sites of a scheme, the most sensitive first."""
        built = self.build(variant)
        return sensitivities(variant.model, built, self.samples, features=self.features, seed=self.seed)

    def rotated(self, method: str) -> nn.Module:
        """Return the model with its stream rotated; computed once. One without a head gains one that returns features.

        Raises:
            ValueError: it cannot be.
        """
        if method not in self._rotated:
            self.say(f"rotating the stream: {method}")
            turned = copy.deepcopy(self.model)
            try:
                if self.features:
                    with contextlib.suppress(ValueError):  # behind a pool that hides the basis none is needed
                        add_feature_head(turned)
                rotate(turned, method, self.calibration, self.seed)
            except ValueError as error:
                self._rotated[method] = error
            else:
                self._rotated[method] = turned
        found = self._rotated[method]
        if isinstance(found, ValueError):
            raise found
        return found


def at_size(model: nn.Module, size: int) -> nn.Module:
    """Return a copy of a model for images of another size, where the model has one of its own."""
    resized: Any = copy.deepcopy(model)
    if hasattr(resized, "set_input_size"):
        resized.set_input_size(img_size=size)
    return resized  # type: ignore[no-any-return]
