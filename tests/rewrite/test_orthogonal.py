"""The matrices are orthogonal, fix ones, and spread."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tweo_timm.rewrite.learned import learn_orthogonal
from tweo_timm.rewrite.orthogonal import hadamard_orthogonal, nearest_orthogonal, random_orthogonal, turn


def check(q):
    width = len(q)
    assert q.dtype == torch.float64
    assert torch.allclose(q @ q.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(q.sum(1), torch.ones(width, dtype=torch.float64), atol=1e-12)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(width=st.integers(2, 60), seed=st.integers(0, 9))
def test_every_matrix_is_orthogonal_and_fixes_ones(width, seed):
    for draw in (random_orthogonal, hadamard_orthogonal):
        q = draw(width, torch.Generator().manual_seed(seed))
        check(q)
        check(nearest_orthogonal(q + 1e-4 * torch.randn(width, width, dtype=torch.float64)))


@pytest.mark.parametrize("width", [48, 64, 384])
@pytest.mark.parametrize("draw", [random_orthogonal, hadamard_orthogonal])
def test_a_single_channel_is_spread_over_all(draw, width):
    q = draw(width, torch.Generator().manual_seed(0))
    assert float(q.abs().max()) < 5.5 / width**0.5


def test_layer_norm_commutes_with_them():
    q = random_orthogonal(24, torch.Generator().manual_seed(0))
    x = torch.randn(5, 24, dtype=torch.float64)
    norm = torch.nn.functional.layer_norm
    assert torch.allclose(norm(x @ q, (24,)), norm(x, (24,)) @ q, atol=1e-12)
    four = torch.randn(5, 96, dtype=torch.float64)
    assert torch.allclose(
        norm(turn(four, q, -1, copies=4), (96,)), turn(norm(four, (96,)), q, -1, copies=4), atol=1e-12
    )


def test_learning_finds_the_basis_in_which_a_spike_is_flat():
    """One direction carries all energy: the flattest image of a centred spike has all channels at its rms."""
    spike = torch.zeros(1, 16)
    spike[0, :2] = torch.tensor([1.0, -1.0])
    start = random_orthogonal(16, torch.Generator().manual_seed(0))
    q = learn_orthogonal([spike.repeat(8, 1)], start, steps=300)
    check(q)
    turned = spike.double() @ q
    assert float(turned.abs().max() / turned.square().mean().sqrt()) < 1.1
