"""Streaming statistics against a plain float64 computation on the activations that were stored."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tweo_timm.stats import ActivationStats


def activations(images=12, tokens=10, channels=16, mean=0.0, seed=0):
    x = torch.randn(images, tokens, channels, generator=torch.Generator().manual_seed(seed)) + mean
    x[3, 7, 5] = -321.5
    return x


def reference(x):
    array = x.double().numpy().ravel()
    centred = array - array.mean()
    magnitude = np.abs(array)
    return {
        "peak_abs": magnitude.max(),
        "mean_abs": magnitude.mean(),
        "kurtosis": (centred**4).mean() / (centred**2).mean() ** 2,
        "count": array.size,
    }


@pytest.mark.parametrize("mean", [0.0, 3.0, 1000.0])
@pytest.mark.parametrize("batch", [1, 5, 12])
def test_statistics_equal_a_float64_computation_for_any_batch_size(mean, batch):
    x = activations(mean=mean)
    stats = ActivationStats()
    for part in x.split(batch):
        stats.update(part)
    summary = stats.summary()
    for name, value in reference(x).items():
        assert summary[name] == pytest.approx(value, rel=1e-6), name
    assert summary["peak_abs"] == float(x.abs().max())


def test_peak_is_located_by_token_and_channel():
    stats = ActivationStats()
    for part in activations().split(2):
        stats.update(part)
    assert (stats.summary()["peak_token"], stats.summary()["peak_channel"]) == (7, 5)


def test_channels_first_activations_are_located_likewise():
    x_BCHW = torch.zeros(2, 6, 4, 5)
    x_BCHW[1, 2, 3, 1] = 9.0
    stats = ActivationStats(channel_axis=1)
    stats.update(x_BCHW)
    assert (stats.summary()["peak_token"], stats.summary()["peak_channel"]) == (3 * 5 + 1, 2)


def test_quantiles_are_within_a_bin_of_the_sorted_values():
    x = torch.randn(50, 40, 32, generator=torch.Generator().manual_seed(3))
    stats = ActivationStats()
    stats.update(x)
    magnitude = x.abs().double().numpy().ravel()
    summary = stats.summary()
    for name, share in (("median_abs", 0.5), ("p999_abs", 0.999), ("p9999_abs", 0.9999)):
        assert summary[name] == pytest.approx(np.quantile(magnitude, share), rel=1 / 128), name
    assert summary["max_to_median"] == pytest.approx(magnitude.max() / np.median(magnitude), rel=1 / 64)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(1, 11), st.booleans(), st.floats(-50, 50))
def test_merging_ranks_equals_seeing_everything_at_once(cut, swap, mean):
    x = activations(mean=mean, seed=cut)
    parts = [ActivationStats(), ActivationStats()]
    for part, data in zip(parts, (x[:cut], x[cut:]), strict=True):
        part.update(data)
    if swap:
        parts.reverse()
    total = ActivationStats.from_state(parts[0].state())
    total.merge(parts[1])
    whole = ActivationStats()
    whole.update(x)
    for name, value in whole.summary().items():
        assert total.summary()[name] == pytest.approx(value, rel=1e-6), name


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.sets(st.integers(0, 5)))
def test_looking_between_batches_changes_no_bit(sizes, looked):
    batches = [activations(seed=index, mean=index)[:size] for index, size in enumerate(sizes)]
    quiet, watched = ActivationStats(), ActivationStats()
    for index, batch in enumerate(batches):
        quiet.update(batch)
        watched.update(batch)
        if index in looked:
            watched.summary()
            watched = ActivationStats.from_state(watched.state())
    assert watched.summary() == quiet.summary()
    assert watched.histogram() == quiet.histogram()


@pytest.mark.parametrize("mean", [1e4, 1e5])
def test_a_mean_that_float32_rounds_costs_the_kurtosis_nothing(mean):
    x = torch.randn(64, 197, 48, generator=torch.Generator().manual_seed(5)) + mean
    x[3, 7, 5] = mean + 50
    stats = ActivationStats()
    stats.update(x)
    assert stats.summary()["kurtosis"] == pytest.approx(reference(x)["kurtosis"], rel=1e-6)


def test_counting_a_batch_does_not_wait_for_the_device():
    stats = ActivationStats()
    for _ in range(2):
        stats.update(torch.empty(2, 3, 4, device="meta"))  # there is no number to wait for: reading one raises
    with pytest.raises(NotImplementedError):
        stats.summary()


def test_a_long_stream_counts_every_batch():
    x, stats = torch.cat([activations(seed=seed) for seed in range(50)]), ActivationStats()
    for image in x.split(1):
        stats.update(image)
    assert stats.summary()["count"] == x.numel()
    assert stats.summary()["kurtosis"] == pytest.approx(reference(x)["kurtosis"], rel=1e-6)


def test_a_peak_beyond_the_integers_of_float32_is_located():
    x = torch.zeros(1, 1 << 12, 1 << 12, dtype=torch.int8)
    x = torch.cat([x, x[:, :1]], 1)
    x[0, -1, 1] = 3  # element 2^24 + 1 of its image
    stats = ActivationStats()
    stats.update(x.float())
    assert (stats.summary()["peak_token"], stats.summary()["peak_channel"]) == (1 << 12, 1)


def test_images_above_the_largest_e4m3_value_are_counted():
    x = torch.ones(4, 3, 2)
    x[1, 0, 0], x[2, 1, 1] = 448.5, 448.0
    stats = ActivationStats()
    stats.update(x)
    assert stats.summary()["share_of_images_above_448"] == 0.25
    assert stats.summary()["mean_image_peak"] == pytest.approx((1 + 448.5 + 448 + 1) / 4)


def test_a_nan_is_seen_and_not_lost():
    stats = ActivationStats()
    stats.update(torch.tensor([[[1.0, float("nan")]]]))
    stats.update(torch.ones(1, 1, 2))
    assert np.isnan(stats.summary()["peak_abs"])


def test_constant_activations_have_no_kurtosis():
    stats = ActivationStats()
    stats.update(torch.zeros(2, 3, 4))
    summary = stats.summary()
    assert np.isnan(summary["kurtosis"])
    assert summary["max_to_median"] == float("inf")


def test_histogram_counts_every_element_once():
    x = activations()
    stats = ActivationStats()
    stats.update(x)
    edges, counts = stats.histogram()
    assert sum(counts) == x.numel()
    assert edges == sorted(edges)
    assert ActivationStats().histogram() == ([], [])


def test_nothing_seen_and_wrong_shapes_are_errors():
    with pytest.raises(ValueError, match="run the model"):
        ActivationStats().summary()
    with pytest.raises(ValueError, match=r"\(5,\)"):
        ActivationStats().update(torch.ones(5))
