"""Validation by timm's own parts, with no knowledge of this package but the statistics of outliers."""

import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import accuracy

from tests.models import tiny_vit
from tweo_timm import record_outliers


def timm_batch(model, photos, size):
    """The whole validation split as timm's own loader prepares it for a model."""
    config = resolve_data_config({"input_size": (3, size, size), "crop_pct": 1.0}, model=model)
    dataset = create_dataset("", root=str(photos), split="validation")
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    loader = create_loader(
        dataset, batch_size=21, num_workers=0, device=torch.device("cpu"), **{key: config[key] for key in keys}
    )
    return next(iter(loader))


def timm_top1(path, photos, size=32):
    """Top-1 as timm's own parts compute it, with no knowledge of this package."""
    model = tiny_vit(num_classes=3, checkpoint_path=str(path)).eval()
    model.set_input_size(img_size=(size, size))
    images, targets = timm_batch(model, photos, size)
    with torch.no_grad(), record_outliers(model) as record:
        output = model(images)
    return float(accuracy(output, targets)[0]), record.summary()
