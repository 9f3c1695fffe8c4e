"""One iteration over a validation split, as every measurement needs it."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tweo_timm.run.passes import batches
from tweo_timm.run.pictures import Alterations, UnreadableImage


def test_padding_is_taken_off_and_every_process_goes_to_the_end():
    dataset = TensorDataset(torch.arange(9.0), torch.arange(9))
    dataset.alterations = Alterations()
    loader = DataLoader(dataset, batch_size=3)
    loader.sampler.num_valid_samples = 5  # as timm's sampler says in several processes
    seen = [(images.tolist(), targets.tolist(), real) for images, targets, real in batches(loader, lambda x: x + 1)]
    assert seen == [([1, 2, 3], [0, 1, 2], 3), ([4, 5], [3, 4], 2), ([7], [6], 0)]


class Stream(IterableDataset):
    def __init__(self, holds, announced):
        self.holds, self.reader, self.alterations = holds, SimpleNamespace(num_samples=announced), Alterations()

    def __iter__(self):
        return ((torch.zeros(1), 0) for _ in range(self.holds))


@pytest.mark.parametrize("announced", [3, 5])
def test_a_stream_of_another_length_than_announced_is_an_error_at_its_end(announced):
    with pytest.raises(UnreadableImage, match=f"holds 4 images and {announced} were announced"):
        list(batches(DataLoader(Stream(4, announced)), lambda x: x))


@pytest.mark.parametrize("announced", [4, 0, None])
def test_a_stream_as_long_as_announced_or_that_announces_nothing_is_none(announced):
    assert len(list(batches(DataLoader(Stream(4, announced)), lambda x: x))) == 4
