"""The layer against float64 products of its rounded operands, and against the layer it replaces."""

import math

import pytest
import torch
from torch import nn

from tweo_timm import Fp8Recipe, fp8_state, patch_fp8
from tweo_timm.fp8.arithmetic import EmulatedArithmetic, NativeArithmetic
from tweo_timm.fp8.cast import E4M3, E5M2
from tweo_timm.fp8.region import Fp8Region

SHAPES = [(64, 64, 96), (3, 5, 7), (1, 16, 33), (197, 48, 100), (50, 96, 10)]


def float8(x, scale, fmt):
    return (x.float() * scale).clamp(-fmt.max, fmt.max).to(fmt.dtype).double()


def current(x, fmt):
    return torch.div(torch.tensor(fmt.max), x.float().abs().max())


def sqnr_db(reference, actual):
    reference, actual = reference.detach().double(), actual.detach().double()
    error = actual - reference
    return 10 * math.log10(reference.square().sum() / error.square().sum())


def wrapped_linear(num_in, num_out, recipe, bias=True):
    model = nn.Sequential(nn.Linear(num_in, num_out, bias=bias))
    patch_fp8(model, recipe)
    return model


def one_step(model, x, dy, autocast=False):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.backward(dy.to(y.dtype))
    weight, bias = model[0].weight.grad.clone(), model[0].bias.grad.clone()
    model.zero_grad()
    return y.detach(), x.grad, weight, bias


@pytest.mark.parametrize("fmt", ["hybrid", "e4m3"])
@pytest.mark.parametrize(("tokens", "num_in", "num_out"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2.0**-8)])
def test_products_equal_float64_products_of_the_rounded_operands(tokens, num_in, num_out, dtype, tolerance, fmt):
    """Float32 outputs differ by accumulation order, bfloat16 ones by rounding the result (half a unit is 2**-9)."""
    torch.manual_seed(0)
    model = wrapped_linear(num_in, num_out, Fp8Recipe(scaling="current", format=fmt))
    x, dy = torch.randn(tokens, num_in), torch.randn(tokens, num_out)
    if dtype == torch.bfloat16:
        x, dy = x.bfloat16(), dy.bfloat16()
    y, dx, dw, db = one_step(model, x, dy, autocast=dtype == torch.bfloat16)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, torch.float32)

    w, bias = model[0].weight.detach(), model[0].bias.detach()
    backward = E5M2 if fmt == "hybrid" else E4M3
    s_x, s_w, s_dy = current(x, E4M3), current(w, E4M3), current(dy, backward)
    xq, wq, dyq = float8(x, s_x, E4M3), float8(w, s_w, E4M3), float8(dy, s_dy, backward)
    inverse = [1 / s.double() for s in (s_x, s_w, s_dy)]
    expected = {
        "y": (xq @ wq.t() * inverse[0] * inverse[1] + bias.double(), y),
        "dx": (dyq @ wq * inverse[2] * inverse[1], dx),
        "dw": (dyq.t() @ xq * inverse[2] * inverse[0], dw),
        "db": (dy.double().sum(0), db),
    }
    for name, (reference, actual) in expected.items():
        error = (actual.double() - reference).abs().max() / reference.abs().max()
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_signal_to_noise_against_the_unquantized_layer(scaling, autocast):
    """The gates are the promise; the minima measured over these seeds and shapes are in docs/numerics.md."""
    for seed in range(20):
        for tokens, num_in, num_out in SHAPES:
            torch.manual_seed(seed)
            model = wrapped_linear(num_in, num_out, Fp8Recipe(scaling=scaling))
            reference = nn.Sequential(nn.Linear(num_in, num_out))
            reference.load_state_dict(model.state_dict())
            x, dy = torch.randn(tokens, num_in), torch.randn(tokens, num_out)
            one_step(model, x, dy, autocast)  # delayed scales need one step to arrive
            actual, expected = one_step(model, x, dy, autocast), one_step(reference, x, dy)
            gates = (25, 21, 21) if tokens * num_out > 100 else (22, 18, 18)
            for gate, name, a, e in zip(gates, ("y", "dx", "dw"), actual, expected, strict=False):
                assert sqnr_db(e, a) >= gate, (name, seed, tokens, num_in, num_out)


def test_gradient_is_rounded_once_and_bias_sums_the_unrounded_one():
    model = wrapped_linear(16, 16, Fp8Recipe(scaling="unit"))
    dy = torch.full((4, 16), 1.0625)  # rounds to 1.0 in E5M2
    _, dx, dw, db = one_step(model, torch.ones(4, 16), dy)
    assert torch.equal(db, torch.full((16,), 4.25))
    assert torch.equal(dw, torch.full((16, 16), 4.0))
    assert dx.shape == (4, 16)


def test_unit_scaling_keeps_no_state_and_saturates():
    model = wrapped_linear(16, 16, Fp8Recipe(scaling="unit"))
    model[0].weight.data.fill_(1.0)
    model[0].bias.data.zero_()
    y, *_ = one_step(model, torch.full((2, 16), 1e4), torch.ones(2, 16))
    assert torch.equal(y, torch.full((2, 16), 448.0 * 16))
    assert fp8_state(model) == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_poisons_and_infinity_saturates(bad):
    model = wrapped_linear(16, 8, Fp8Recipe())
    x = torch.randn(3, 16)
    x[1, 2] = bad
    y, *_ = one_step(model, x, torch.randn(3, 8))
    assert y[[0, 2]].isfinite().all()
    assert y[1].isnan().all() if math.isnan(bad) else y[1].isfinite().all()


def test_frozen_operands_get_no_gradient():
    model = wrapped_linear(16, 8, Fp8Recipe())
    model[0].weight.requires_grad_(False)
    y = model(torch.randn(3, 16))
    y.sum().backward()
    assert model[0].weight.grad is None
    assert model[0].bias.grad is not None


def test_double_backward_is_refused_rather_than_wrong():
    model = wrapped_linear(16, 8, Fp8Recipe())
    x = torch.randn(3, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_half_precision_autocast_scales_before_it_can_overflow():
    """The unscaled product of two full-range operands is far above what float16 holds."""
    model = wrapped_linear(64, 16, Fp8Recipe(scaling="current"), bias=False)
    x = torch.ones(4, 64)
    with torch.autocast("cpu", torch.float16):
        y = model(x)
    assert y.dtype == torch.float16
    assert sqnr_db(x @ model[0].weight.t(), y.float()) > 25


def test_repr_says_how_the_layer_computes():
    assert "fp8=e4m3/e5m2 delayed emulated" in repr(wrapped_linear(4, 4, Fp8Recipe(backend="emulated")))


@pytest.mark.parametrize(("tokens", "num_in", "num_out"), SHAPES)
def test_native_arithmetic_equals_the_emulated_one_on_shapes_hardware_refuses(tokens, num_in, num_out):
    """PyTorch's CPU reference stands in for the matrix unit: padding and layouts are ours, and are what is tested."""
    torch.manual_seed(1)
    x, w, dy = torch.randn(tokens, num_in), torch.randn(num_out, num_in), torch.randn(tokens, num_out)
    bias, scale = torch.randn(num_out), [torch.tensor(s) for s in (90.0, 110.0, 7000.0)]
    results = []
    for arithmetic in (EmulatedArithmetic(), NativeArithmetic()):
        xq, wq = arithmetic.quantize(x, scale[0], E4M3), arithmetic.quantize(w, scale[1], E4M3)
        dyq = arithmetic.quantize(dy, scale[2], E5M2)
        results.append(
            (
                arithmetic.product(xq, wq.t(), scale[0], scale[1], bias, torch.float32, fast=False),
                arithmetic.product(dyq, wq, scale[2], scale[1], None, torch.float32, fast=False),
                arithmetic.product(dyq.t(), xq, scale[2], scale[0], None, torch.float32, fast=False),
            )
        )
    for emulated, native in zip(*results, strict=True):
        assert native.shape == emulated.shape
        assert torch.allclose(native, emulated, rtol=1e-5, atol=1e-5 * emulated.abs().max().item())


def test_native_layer_trains_like_the_emulated_one():
    outputs = []
    for kernel in ("emulated", "native"):
        torch.manual_seed(0)
        model = wrapped_linear(24, 20, Fp8Recipe())
        region: Fp8Region = model[0]._fp8_site.region
        region.kernel = region.kernel._replace(arithmetic=kernel)
        for _ in range(3):
            out = one_step(model, torch.randn(5, 24), torch.randn(5, 20))
        outputs.append((*out, fp8_state(model)))
    *tensors, states = zip(*outputs, strict=True)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    for emulated, native in tensors:
        assert torch.allclose(emulated, native, rtol=1e-5, atol=1e-6)


def test_meta_tensors_pass_through_with_the_right_shape_and_dtype():
    with torch.device("meta"):
        model = wrapped_linear(16, 8, Fp8Recipe())
        y = model(torch.empty(2, 3, 16))
    assert y.shape == (2, 3, 8)
    y.sum().backward()
    assert model[0].weight.grad.shape == (8, 16)
