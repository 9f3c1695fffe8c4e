"""Peaks are exact in both of their forms, and a NaN among them is seen wherever it stands."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tweo_timm.peaks import as_numbers, as_tensor, extremes, largest, peak_magnitudes

REAL = st.floats(width=16, allow_nan=True, allow_infinity=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_peaks_are_exact_and_have_no_gradient(dtype):
    x = torch.randn(5, 7, dtype=dtype, requires_grad=True)
    low, high = extremes(x)
    assert (low, high) == (x.min(), x.max())
    assert not low.requires_grad
    assert not high.requires_grad
    peaks = peak_magnitudes([(low, high), (-high, -low), extremes(x[0])])
    assert peaks == [float(x.detach().abs().max())] * 2 + [float(x[0].detach().abs().max())]
    assert not largest(peaks).requires_grad


@settings(derandomize=True, deadline=None)
@given(st.lists(st.lists(REAL, min_size=1, max_size=4), min_size=1, max_size=4))
def test_numbers_and_tensors_hold_the_same(values):
    found = [extremes(torch.tensor(row)) for row in values]
    numbers = peak_magnitudes(found)
    tensor = torch.stack([torch.tensor(row).abs().amax() for row in values])  # independent of `extremes`
    for peaks in (numbers, tensor):
        torch.testing.assert_close(as_tensor(peaks), tensor, rtol=0, atol=0, equal_nan=True)
        assert str(as_numbers(peaks)) == str(tensor.tolist())
        torch.testing.assert_close(largest(peaks), tensor.amax(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("place", range(3))
def test_a_nan_is_the_largest_peak(place):
    peaks = [1.0, math.inf, 2.0]
    peaks[place] = math.nan
    assert largest(peaks).isnan()
    assert largest(torch.tensor(peaks)).isnan()


def test_a_peak_beyond_float32_is_infinite_in_both_forms():
    peaks = peak_magnitudes([extremes(torch.tensor([-1e300], dtype=torch.float64))])
    assert peaks == [1e300]
    assert (as_tensor(peaks).tolist(), largest(peaks)) == ([math.inf], math.inf)


def test_on_a_device_whose_numbers_cannot_be_read_peaks_are_a_tensor():
    peaks = peak_magnitudes([extremes(torch.ones(2, 3, dtype=torch.bfloat16, device="meta"))] * 4)
    assert (peaks.shape, peaks.dtype, peaks.device.type) == ((4,), torch.float32, "meta")
    assert as_tensor(peaks) is peaks
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        as_numbers(peaks)
