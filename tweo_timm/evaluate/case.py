"""What is measured about one checkpoint is measured on this: its model, its options, and images."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from tweo_timm.evaluate.images import Images, sample_images
from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.evaluate.subject import Subject
from tweo_timm.run.world import World

DIAGNOSIS_IMAGES = 64
"""Images of the validation split that the diagnoses and fidelity look at."""


class Samples:
    """Fixed images of one subject, on its device, read when first needed and once for all schemes and diagnoses."""

    def __init__(self, subject: Subject, world: World) -> None:
        self._subject, self._world = subject, world

    @functools.cached_property
    def calibration(self) -> list[Tensor]:
        """Batches that fix the scales of static quantization."""
        options = self._subject.options
        return self._read(options.calibration_split, options.calibration_images, min(options.batch_size, 64))

    @functools.cached_property
    def diagnosis(self) -> Tensor:
        """Images of the validated split that fidelity and the diagnoses look at, (B, C, H, W)."""
        return torch.cat(self._read(self._subject.options.split, DIAGNOSIS_IMAGES, DIAGNOSIS_IMAGES))

    def _read(self, split: str, count: int, batch_size: int) -> list[Tensor]:
        subject = self._subject
        batches = sample_images(subject.options, subject.data_config, num_classes_of(subject), split, count, batch_size)
        dtype = next(subject.model.parameters()).dtype
        return [batch.to(self._world.device, dtype) for batch in batches]


@dataclass(frozen=True)
class Case:
    """One checkpoint and what it is measured on.

    Attributes:
        subject: the model and its options.
        images: the split that is scored.
        samples: a few images for what looks closer.
        world: device and rank.
        class_names: by index; None if nobody knows.
    """

    subject: Subject
    images: Images
    samples: Samples
    world: World
    class_names: list[str | None] | None = None

    @property
    def options(self) -> ValidateOptions:
        """The subject's options."""
        return self.subject.options


def num_classes_of(subject: Subject) -> int:
    """Return how many classes the data of a subject must have."""
    return int(subject.options.num_classes or subject.model.num_classes)  # type: ignore[arg-type]
