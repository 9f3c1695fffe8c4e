"""Images to learn from and to compare on, preprocessed as for validation; labels are not looked at."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from tweo_timm.repair.options import RepairOptions
from tweo_timm.repair.source import Source, image_settings
from tweo_timm.run.dataset import open_dataset, preprocessing


def read_images(options: RepairOptions, source: Source) -> list[Tensor] | None:
    """Read a fixed random sample of the split as batches (B, C, H, W), float32; None without data.

    Raises:
        ValueError: if the split cannot be found.
    """
    if not (options.data_dir or options.dataset):
        return None
    data_config = preprocessing(argparse.Namespace(**image_settings(source, options)), source.model)
    where = argparse.Namespace(
        data=None,
        data_dir=options.data_dir,
        dataset=options.dataset,
        class_map="",
        dataset_download=False,
        dataset_trust_remote_code=False,
        input_img_mode=None,
        input_key=None,
        target_key=None,
    )
    dataset: Any = open_dataset(where, options.split, data_config)
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    dataset.transform = create_transform(**{key: data_config[key] for key in keys})
    if isinstance(dataset, IterableDataset):
        images = [image for (image, _), _ in zip(dataset, range(options.images), strict=False)]
        return list(torch.split(torch.stack(images), options.batch_size))
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(options.seed))[: options.images]
    loader: DataLoader[Any] = DataLoader(Subset(dataset, chosen.tolist()), batch_size=options.batch_size)
    return [images for images, _ in loader]
