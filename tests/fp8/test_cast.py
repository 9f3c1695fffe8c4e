import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tweo_timm.fp8.cast import E4M3, E5M2, absolute_maximum, round_to_fp8

FORMATS = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)


def float8_round_trip(x, scale, fmt):
    return (x.float() * scale).clamp(-fmt.max, fmt.max).to(fmt.dtype).to(torch.bfloat16)


def assert_same_bits(actual, expected):
    """Equal in every bit, signed zeros included; a NaN equals a NaN of any payload."""
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual[~nan].view(torch.int16), expected[~nan].view(torch.int16))


@FORMATS
@pytest.mark.parametrize("scale", [1.0, 0.37, 1234.5, 2.0**-20, 3.4e38])
def test_every_bfloat16_pattern_rounds_as_the_float8_cast_does(fmt, scale):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    scale = torch.tensor(scale)
    assert_same_bits(round_to_fp8(every, scale, fmt), float8_round_trip(every, scale, fmt))


@FORMATS
def test_ten_million_random_floats_round_as_the_float8_cast_does(fmt):
    """Half of them uniform over bit patterns, half concentrated where the format has its grid."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        patterns = torch.randint(-(2**31), 2**31, (1_000_000,), generator=generator).to(torch.int32).view(torch.float32)
        magnitudes = torch.randint(-20, 18, (1_000_000,), generator=generator).float().exp2()
        near_grid = torch.randn(1_000_000, generator=generator) * magnitudes
        for values, scale in ((patterns, torch.tensor(1.0)), (near_grid, torch.rand((), generator=generator) * 4)):
            assert_same_bits(round_to_fp8(values, scale, fmt), float8_round_trip(values, scale, fmt))


@FORMATS
def test_without_signed_zeros_nothing_but_the_sign_of_zero_differs(fmt):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    scale = torch.tensor(0.37)
    plain, signed = (round_to_fp8(every, scale, fmt, signed_zeros=signed) for signed in (False, True))
    torch.testing.assert_close(plain, signed, rtol=0, atol=0, equal_nan=True)
    assert not torch.signbit(plain[plain == 0]).any()
    assert torch.signbit(signed[signed == 0]).any()


@FORMATS
def test_ties_between_neighbours_round_to_even(fmt):
    """Checked against exact integer arithmetic, not against another cast."""
    step = 2.0**-fmt.mantissa_bits
    for mantissa in range(2**fmt.mantissa_bits):
        lower = 1 + mantissa * step
        even = lower if mantissa % 2 == 0 else lower + step
        tie = torch.tensor([lower + step / 2])
        assert round_to_fp8(tie, torch.tensor(1.0), fmt).item() == even


@FORMATS
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7), (2, 3, 4)])
def test_shape_is_kept_and_the_source_is_not_written(fmt, shape):
    x = torch.randn(shape) * 100
    before = x.clone()
    out = round_to_fp8(x, torch.ones(1), fmt)
    assert out.shape == x.shape
    assert out.dtype == torch.bfloat16
    assert torch.equal(x, before)


def test_strided_and_half_precision_sources_round_like_contiguous_float32():
    x = torch.randn(64, 48).half()
    scale = torch.tensor(3.3)
    assert_same_bits(round_to_fp8(x.t(), scale, E4M3), round_to_fp8(x.float().t().contiguous(), scale, E4M3))


def test_tensor_larger_than_a_chunk_rounds_as_its_parts(monkeypatch):
    x = torch.randn(1000)
    whole = round_to_fp8(x, torch.tensor(2.0), E4M3)
    monkeypatch.setattr("tweo_timm.fp8.cast.CHUNK_PER_THREAD", 17)
    assert_same_bits(round_to_fp8(x, torch.tensor(2.0), E4M3), whole)


floats = st.floats(width=32, allow_nan=False)
property_settings = settings(derandomize=True, deadline=None, max_examples=150)


def rounded(values, fmt):
    return round_to_fp8(torch.tensor(values, dtype=torch.float32), torch.tensor(1.0), fmt).double().numpy()


@FORMATS
@property_settings
@given(values=st.lists(floats, min_size=2, max_size=30))
def test_rounding_is_monotone_odd_idempotent_and_saturating(fmt, values):
    values = sorted(values)
    out = rounded(values, fmt)
    assert (np.diff(out) >= 0).all()
    assert np.array_equal(rounded([-v for v in values], fmt), -out)
    assert np.array_equal(rounded(out.tolist(), fmt), out)
    assert (np.abs(out) <= fmt.max).all()
    assert all(abs(o) == fmt.max for v, o in zip(values, out, strict=True) if abs(v) >= fmt.max)


@FORMATS
@property_settings
@given(value=floats)
def test_rounding_error_is_at_most_half_the_local_spacing(fmt, value):
    clipped = min(max(value, -fmt.max), fmt.max)
    spacing = 2.0**-fmt.mantissa_bits * max(
        2.0 ** math.floor(math.log2(abs(clipped))) if clipped else 0.0, fmt.min_normal
    )
    assert abs(rounded([value], fmt)[0] - clipped) <= spacing / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_absolute_maximum_ignores_nan_and_keeps_infinity(dtype):
    nan, inf = math.nan, math.inf
    for values, peak in (
        ([1, -3, 2], 3),
        ([nan, -2, 1], 2),
        ([nan, -inf, 1], inf),
        ([nan, nan], 0),
        ([], 0),
        ([0.0, -0.0], 0),
    ):
        assert absolute_maximum(torch.tensor(values, dtype=dtype)).item() == peak
    assert absolute_maximum(torch.ones(2, dtype=dtype)).dtype == torch.float32
