"""Zeroing the largest elements of block outputs: exactly those, in the passes inside the context only."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import BUILDERS
from tweo_timm.diagnose.zeroing import without, zeroed


def make(name):
    return BUILDERS[name](num_classes=4).eval()


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(0, 99), st.one_of(st.integers(0, 30).map(float), st.sampled_from([0.001, 0.1, 0.5, 0.999])))
def test_what_is_left_is_what_sorting_leaves(seed, k):
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(seed))
    got = without(x, 3, k).numpy().reshape(3, -1)
    count = min(int(k) if k >= 1 or k == 0 else int(np.ceil(k * 24)), 24)
    for row, image in zip(got, x.numpy().reshape(3, -1), strict=True):
        order = np.argsort(-np.abs(image))
        expected = image.copy()
        expected[order[:count]] = 0
        np.testing.assert_array_equal(row, expected)
    other = without(x, 3, k, torch.Generator().manual_seed(seed))
    assert (other.reshape(3, -1) == 0).sum(1).tolist() == [count] * 3


@torch.no_grad()
def test_the_model_computes_what_its_blocks_give_one_after_the_other():
    model, images = make("vit"), torch.randn(3, 3, 32, 32)
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    for block in model.blocks:
        x = without(block(x), 3, 5)
    expected = model.forward_head(model.norm(x))
    with zeroed(model, 5):
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize("name", ["vit", "swin"])
@torch.no_grad()
def test_nothing_is_left_of_it_afterwards_and_zero_elements_change_nothing(name):
    model, images = make(name), torch.randn(2, 3, 32, 32)
    whole = model(images)
    with zeroed(model, 0):
        assert torch.equal(model(images), whole)
    with zeroed(model, 0.2):
        assert not torch.allclose(model(images), whole)
    with zeroed(model, 0.2, at_random=True, seed=1):
        first = model(images)
    with zeroed(model, 0.2, at_random=True, seed=1):
        assert torch.equal(model(images), first)
    assert torch.equal(model(images), whole)


def test_a_negative_number_of_elements_is_refused():
    with pytest.raises(ValueError, match="K is -1"), zeroed(make("vit"), -1):
        pass
