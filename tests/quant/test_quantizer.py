from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d, StdConv2dSame
from torch import nn

from tweo_timm.quant.quantizer import QuantizedLayer, Quantizer, is_quantizable


def numpy_integers(x, amax, bits):
    """The definition, apart from the code under test: float32 NumPy, ties to even."""
    limit = 2 ** (bits - 1) - 1
    step = np.float32((np.float32(amax) + np.float32(1e-8)) / np.float32(limit))
    return np.clip(np.rint(x.astype(np.float32) / step), -limit, limit).astype(np.int32), step


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    bits=st.sampled_from((8, 7, 6, 4)),
    per_channel=st.booleans(),
    per_token=st.booleans(),
    bias=st.booleans(),
    scale=st.sampled_from((1e-4, 1.0, 3e3)),
    seed=st.integers(0, 999),
)
def test_a_quantized_linear_equals_int32_numpy_exactly(bits, per_channel, per_token, bias, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(24, 7, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(7, 24, generator=generator))
    x = torch.randn(2, 5, 24, generator=generator) * scale
    amax = 0.8 * x.abs().max()  # so that some elements saturate
    layer = QuantizedLayer(linear, Quantizer(bits, None if per_token else amax), bits, per_channel=per_channel).eval()

    x_np, w_np = x.numpy(), linear.weight.detach().numpy()
    x_int, x_step = numpy_integers(x_np, np.abs(x_np).max(-1, keepdims=True) if per_token else amax.numpy(), bits)
    w_int, w_step = numpy_integers(
        w_np, np.abs(w_np).max(1, keepdims=True) if per_channel else np.abs(w_np).max(), bits
    )
    sums = x_int @ w_int.T
    assert np.array_equal(layer.weight_int.numpy(), w_int)
    assert np.array_equal(layer.input_quantizer.integers(x)[0].numpy(), x_int)
    assert np.array_equal(layer.accumulate(torch.from_numpy(x_int).float()).numpy(), sums)
    expected = sums * (x_step.astype(np.float64) * w_step.reshape(-1))
    expected = expected + (linear.bias.detach().numpy() if bias else 0)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=2e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        Conv2dSame(4, 6, 3, stride=2),
        StdConv2d(4, 6, 3, stride=2, padding=1),
        StdConv2dSame(4, 6, 3, stride=2),
        ScaledStdConv2d(4, 6, 3),
        nn.Conv1d(4, 6, 3),
        nn.Conv3d(4, 6, 2),
    ],
    ids=lambda conv: f"{type(conv).__name__}-{conv.groups}",
)
@pytest.mark.parametrize("per_token", [False, True])
def test_a_quantized_convolution_equals_the_float_one_on_dequantized_values(conv, per_token):
    size = {3: (9,), 4: (9, 9), 5: (4, 4, 4)}[conv.weight.ndim]
    x = torch.randn(2, 4, *size)
    quantizer = Quantizer(8, None if per_token else x.abs().max(), tuple(range(1, x.ndim)))
    layer = QuantizedLayer(copy.deepcopy(conv), quantizer, 8, per_channel=True).eval()
    with torch.no_grad():
        close = conv(x)
        if type(conv) in (StdConv2d, StdConv2dSame, ScaledStdConv2d):  # their weights are standardized once more
            assert relative_error(layer(x), close) < 0.02
            return
        conv.weight.copy_(layer.weight)
        expected = conv(quantizer(x))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert (layer.in_features, layer.out_features) == (conv.in_channels, conv.out_channels)


def relative_error(a, b):
    return float((a - b).norm() / b.norm())


def test_integer_sums_beyond_float32_stay_exact():
    linear = nn.Linear(2048, 1, bias=False)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        linear.weight[0, 1::2] = 125 / 127
    layer = QuantizedLayer(linear, Quantizer(8, torch.tensor(1.0)), 8, per_channel=False)
    integers = torch.full((1, 2048), 127.0)
    integers[0, 0] = 126.0
    exact = int(integers.long().numpy()[0] @ layer.weight_int.long().numpy()[0])
    assert exact > 2**24
    assert exact % 2 == 1  # odd: no float32 holds it
    assert layer.accumulate(integers).item() == exact


def test_the_weight_is_what_its_integers_stand_for():
    linear = nn.Linear(16, 8)
    for per_channel in (False, True):
        layer = QuantizedLayer(linear, Quantizer(8), 8, per_channel=per_channel)
        step = layer.weight_scale.reshape(-1, 1) if per_channel else layer.weight_scale
        assert torch.equal((layer.weight / step).round().to(torch.int8), layer.weight_int)
        assert (layer.weight - linear.weight).abs().max() <= step.max() / 2 * 1.001


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30), st.sampled_from((8, 6, 4)))
def test_rounding_is_odd_idempotent_and_off_by_half_a_step_at_most(values, bits):
    x = torch.tensor(values)
    quantizer = Quantizer(bits, x.abs().max())
    y = quantizer(x)
    assert torch.equal(quantizer(-x), -y)
    assert torch.equal(quantizer(y), y)
    assert ((x - y).abs() <= quantizer.scale / 2 * (1 + 1e-4)).all()


def test_half_precision_comes_back_as_half_precision():
    quantizer = Quantizer(8, torch.tensor(2.0))
    assert quantizer(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer = QuantizedLayer(nn.Linear(3, 2), quantizer, 8, per_channel=True).eval()
    assert layer(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_does_not_touch_integer_arithmetic():
    layer = QuantizedLayer(nn.Linear(64, 8), Quantizer(8, torch.tensor(3.0)), 8, per_channel=False).eval()
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(x)
    assert torch.equal(inside, layer(x))


def test_an_all_zero_tensor_becomes_zeros():
    quantizer = Quantizer(8, torch.tensor(0.0))
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))


def test_non_finite_scales_and_weights_are_refused():
    with pytest.raises(ValueError, match="inf"):
        Quantizer(8, torch.tensor(float("inf")))
    linear = nn.Linear(2, 2)
    linear.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="non-finite"):
        QuantizedLayer(linear, Quantizer(8), 8, per_channel=False)


def test_training_mode_is_refused():
    layer = QuantizedLayer(nn.Linear(2, 2), Quantizer(8), 8, per_channel=False).train()
    with pytest.raises(RuntimeError, match="evaluation only"):
        layer(torch.ones(1, 2))


class Masked(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight.tril(), self.bias)


def test_convolutions_that_compute_their_own_weight_are_refused():
    assert is_quantizable(Masked(3, 4, 3))
    with pytest.raises(TypeError, match="Masked computes its weight"):
        QuantizedLayer(Masked(3, 4, 3), Quantizer(8), 8, per_channel=False)


def test_a_quantized_convolution_answers_for_the_one_it_replaces():
    layer = QuantizedLayer(nn.Conv2d(3, 4, 3, stride=2), Quantizer(8), 8, per_channel=False)
    assert layer.kernel_size == (3, 3)
    assert layer.stride == (2, 2)
    with pytest.raises(AttributeError):
        _ = layer.no_such_thing
    with pytest.raises(AttributeError):
        _ = QuantizedLayer(nn.Linear(3, 4), Quantizer(8), 8, per_channel=False).kernel_size


def test_the_printed_layer_tells_bits_and_granularity():
    text = repr(QuantizedLayer(nn.Linear(4, 2), Quantizer(6, torch.tensor(1.0)), 4, per_channel=True))
    assert "4 bits, per channel" in text
    assert "6 bits, tensor, step=" in text
    assert "dynamic" in repr(Quantizer(8))
