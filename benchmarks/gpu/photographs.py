"""The images of the trainings: crops of photographs, made here or brought along."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.ledger import NotRunError
from benchmarks.gpu.plan import Plan
from tweo_timm.photos import write_photo_crops


def crops(plan: Plan) -> Path:
    """Return a folder with the crops, made first if nobody has brought one.

    Raises:
        NotRunError: the folder that was named holds no crops, or they cannot be made here.
    """
    train, validation = plan.crops
    remedy = (
        f"make them elsewhere by `python -m tweo_timm.photos FOLDER --train {train} --validation {validation}`, "
        "which is small (less than 64 MiB), and give --data-dir FOLDER"
    )
    if plan.data_dir is not None:
        if not all((plan.data_dir / split).is_dir() for split in ("train", "validation")):
            raise NotRunError(f"--data-dir {plan.data_dir}: holds no train and validation crops; {remedy}")
        return plan.data_dir
    try:
        return write_photo_crops(plan.output / "photos", train, validation)
    except ValueError as error:
        raise NotRunError(f"{error}; or {remedy}") from error


def count(folder: Path, split: str) -> int:
    """Return how many images a split holds."""
    return sum(1 for _ in (folder / split).glob("*/*"))
