"""Self-distillation in the manner of DINO on crops of photographs, with the TWEO penalty: an own loop, whole.

    python examples/dino.py --tweo-weight 0.01 --updates 300

A student learns to say of one view of an image what its teacher says of another; the teacher is the student's moving
average, and no labels are used. Each update takes four forward passes of the student, two of large views and two of
small ones, and two of the teacher. The three lines that concern TWEO are marked. At the end the teacher's features are
judged by their nearest neighbours. After arXiv:2104.14294, much simplified.
"""

import argparse
import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from tweo_timm import Tweo, TweoConfig
from tweo_timm.photos import write_photo_crops

PROTOTYPES, TEMPERATURE, SHARP, MOMENTUM, CENTRE_MOMENTUM = 128, 0.1, 0.04, 0.99, 0.9
TO_TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])


def view(size: int, scale: tuple[float, float]) -> v2.Transform:
    """A random part of an image in random colours."""
    crop = v2.RandomResizedCrop(size, scale)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.ColorJitter(0.3, 0.3, 0.2, 0.1), TO_TENSOR])


def loaded(folder: Path, transform: object, batch: int, shuffle: bool) -> DataLoader:
    """The images of a folder, transformed, with their labels."""
    return DataLoader(ImageFolder(str(folder), transform), batch, shuffle=shuffle, drop_last=shuffle)


def make_student() -> nn.Module:
    """A small ViT that takes images of any size."""
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2, "dynamic_img_size": True}
    return timm.create_model("vit_tiny_patch16_224", num_classes=PROTOTYPES, **sizes).train()


def losses(student: nn.Module, teacher: nn.Module, tweo: Tweo, views: Sequence[Tensor], centre: Tensor) -> list[Tensor]:
    """Return the task's loss, the penalty of the student's passes, and the teacher's mean answer."""
    with torch.no_grad():
        raw = [teacher(large) for large in views[:2]]
    targets = [((answer - centre) / SHARP).softmax(-1) for answer in raw]
    answers = [(student(one) / TEMPERATURE).log_softmax(-1) for one in views]
    pairs = [(t, a) for i, t in enumerate(targets) for j, a in enumerate(answers) if i != j]
    task = torch.stack([-(t * a).sum(-1).mean() for t, a in pairs]).mean()
    return [task, tweo.penalty(), torch.cat(raw).mean(0)]  # TWEO, 2 of 3: of four passes; the teacher's is not counted


@torch.no_grad()
def neighbours(model: nn.Module, folder: Path) -> float:
    """The share of validation crops whose nearest training crop, by the features' angle, shows the same photograph."""
    parts = []
    for split in ("train", "validation"):
        seen = [(model.forward_features(x)[:, 0], y) for x, y in loaded(folder / split, TO_TENSOR, 64, False)]
        parts.append((nn.functional.normalize(torch.cat([x for x, _ in seen])), torch.cat([y for _, y in seen])))
    (known, labels), (asked, truth) = parts
    return float((labels[(asked @ known.T).argmax(1)] == truth).float().mean())


def main(argv: Sequence[str] | None = None) -> Iterator[dict[str, float]]:
    """Train; yield one row of numbers per update, and one at the end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, default in {"--data-dir": Path("photos"), "--tweo-weight": 0.01, "--updates": 300, "--lr": 2e-3}.items():
        parser.add_argument(name, type=type(default), default=default, help=f"({default})")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    views = v2.Lambda(lambda image: [t(image) for t in [view(32, (0.4, 1.0))] * 2 + [view(16, (0.1, 0.4))] * 2])
    loader = loaded(write_photo_crops(options.data_dir, 64, 20) / "train", views, 64, True)
    student = make_student()
    tweo = Tweo(student, TweoConfig(weight=options.tweo_weight))  # TWEO, 1 of 3
    teacher, centre = copy.deepcopy(student).requires_grad_(False), torch.zeros(PROTOTYPES)
    optimizer = torch.optim.AdamW(student.parameters(), options.lr)
    for images, _ in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), options.updates):
        task, penalty, mean = losses(student, teacher, tweo, images, centre)
        optimizer.zero_grad()
        (task + penalty).backward()  # TWEO, 3 of 3
        optimizer.step()
        centre = CENTRE_MOMENTUM * centre + (1 - CENTRE_MOMENTUM) * mean
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.data.lerp_(fast.data, 1 - MOMENTUM)
        yield {"loss": task.item(), "penalty": penalty.item(), "peak": float(tweo.peak_abs)}
    yield {"peak": float(tweo.peak_abs), "nearest_neighbour": neighbours(teacher.eval(), options.data_dir)}


if __name__ == "__main__":
    for step, row in enumerate(main()):
        if step % 20 == 0 or "loss" not in row:
            print(step, {name: round(value, 4) for name, value in row.items()}, flush=True)
