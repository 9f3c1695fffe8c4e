"""The penalty against its definition in float64 NumPy, its gradients, its memory and its schedule."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from tweo_timm import TweoConfig, tweo_loss
from tweo_timm.loss import mean_power

PAPER = TweoConfig()
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def reference(outputs, config=PAPER):
    """The paper's definition, in NumPy's extended precision, on the values as the tensors hold them."""
    arrays = [np.abs(output.detach().double().numpy().astype(np.longdouble)) for output in outputs]
    powers = [(array / (config.tau + config.eps)) ** config.power for array in arrays]
    if config.reduction == "element":
        return float(sum(p.sum() for p in powers) / sum(p.size for p in powers))
    return float(np.mean([p.mean() for p in powers]))


def reference_gradient(x, config, num_blocks=1):
    array = x.detach().double().numpy()
    scale = config.tau + config.eps
    slope = np.sign(array) * (np.abs(array) / scale) ** (config.power - 1)
    return config.power / scale * slope / array.size / num_blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [2, 3, 4, 6, 2.5])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_loss_equals_the_definition(dtype, power, size):
    generator = torch.Generator().manual_seed(0)
    outputs = [(torch.randn(4, 17, 24, generator=generator) * size).to(dtype) for _ in range(3)]
    config = TweoConfig(power=power)
    loss = tweo_loss(outputs, config)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(loss) == pytest.approx(reference(outputs, config), rel=1e-6)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 6e4), (torch.bfloat16, 1e10)])
@pytest.mark.parametrize("fill", ["one", "all"])
def test_huge_activations_give_finite_right_values(dtype, size, fill):
    x = torch.randn(8, 197, 384, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = (
        x.new_full(x.shape, size)
        if fill == "all"
        else x.index_put((torch.tensor(3), torch.tensor(5)), x.new_tensor(size))
    )
    assert float(tweo_loss([x], TweoConfig())) == pytest.approx(reference([x]), rel=1e-6)


def test_one_peak_near_the_largest_float_does_not_overflow_the_mean():
    x = torch.zeros(1000)
    x[3] = 1.4e10  # (x / 3)^4 is beyond float32, its thousandth is not
    assert float(tweo_loss([x], TweoConfig())) == pytest.approx(reference([x]), rel=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-40])
def test_tiny_activations_cost_what_they_should(size):
    x = torch.full((7, 3), size)
    assert float(tweo_loss([x], TweoConfig())) == pytest.approx(reference([x]), abs=1e-45)


@pytest.mark.parametrize("power", [2, 4, 6, 2.5])
@pytest.mark.parametrize("reduction", ["block", "element"])
def test_gradients_of_first_and_second_order_are_right(power, reduction):
    torch.manual_seed(0)
    xs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5, 3), (4, 3))]
    config = TweoConfig(power=power, reduction=reduction, tau=1.5)
    assert gradcheck(lambda *a: tweo_loss(a, config), xs)
    assert gradgradcheck(lambda *a: tweo_loss(a, config), xs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [2, 4, 2.5])
def test_gradient_equals_the_definition_and_keeps_the_dtype(dtype, power):
    x = (10 * torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    config = TweoConfig(power=power)
    tweo_loss([x, torch.ones(2, 2)], config).backward()
    assert x.grad.dtype == dtype
    expected = reference_gradient(x, config, num_blocks=2)
    own_rounding = torch.finfo(dtype).eps
    np.testing.assert_allclose(x.grad.double().numpy(), expected, rtol=max(own_rounding, 2e-6), atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_a_huge_activation_is_finite_and_right(dtype):
    x = torch.ones(8, 17, 64, dtype=dtype)
    x[3, 5, 7] = 5e12
    x.requires_grad_()
    tweo_loss([x], PAPER).backward()
    assert float(x.grad[3, 5, 7]) == pytest.approx(
        reference_gradient(x, PAPER)[3, 5, 7], rel=torch.finfo(dtype).eps * 4
    )


def test_element_reduction_weighs_every_activation_alike():
    outputs = [torch.full((10,), 3.0), torch.full((1000,), 6.0)]
    config = TweoConfig(reduction="element", eps=0.0)
    assert float(tweo_loss(outputs, config)) == pytest.approx((10 * 1 + 1000 * 16) / 1010, rel=1e-6)
    assert float(tweo_loss(outputs, TweoConfig(eps=0.0))) == pytest.approx((1 + 16) / 2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_one_reference_to_the_output_and_nothing_else(dtype):
    x = torch.randn(4, 50, 64, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mean_power(x, TweoConfig())
    large = [t for t in kept if t.numel() > 1]
    assert len(large) == 1
    assert large[0].data_ptr() == x.data_ptr()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20), st.sampled_from([2, 3, 4, 6]))
def test_loss_is_nonnegative_even_and_grows_with_magnitude(values, power):
    x, config = torch.tensor(values), TweoConfig(power=power)
    loss = float(tweo_loss([x], config))
    assert loss >= 0
    assert float(tweo_loss([-x], config)) == loss
    assert float(tweo_loss([2 * x], config)) >= loss


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.permutations(range(4)))
def test_loss_does_not_depend_on_the_order_of_blocks(order):
    outputs = [torch.full((3, 2), float(i + 1)) for i in range(4)]
    assert float(tweo_loss([outputs[i] for i in order], TweoConfig())) == pytest.approx(
        float(tweo_loss(outputs, TweoConfig())), rel=1e-6
    )


def test_nan_and_infinity_propagate():
    assert math.isnan(tweo_loss([torch.tensor([1.0, math.nan])], TweoConfig()))
    assert float(tweo_loss([torch.tensor([1.0, -math.inf])], TweoConfig())) == math.inf


def test_bad_outputs_are_refused_with_a_reason():
    with pytest.raises(ValueError, match="got none"):
        tweo_loss([], TweoConfig())
    with pytest.raises(TypeError, match=r"torch\.int64"):
        tweo_loss([torch.arange(3)], TweoConfig())
    with pytest.raises(TypeError, match="list"):
        tweo_loss([[1.0]], TweoConfig())
    with pytest.raises(ValueError, match=r"empty .*\(0, 4\)"):
        tweo_loss([torch.empty(0, 4)], TweoConfig())


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"weight": -1}, ValueError, "weight is -1"),
        ({"weight": math.nan}, ValueError, "finite"),
        ({"tau": 0}, ValueError, "tau is 0"),
        ({"tau": "3"}, TypeError, "number"),
        ({"power": 1}, ValueError, "above 1"),
        ({"power": True}, TypeError, "number"),
        ({"schedule": "cosin"}, ValueError, "did you mean 'cosine'"),
        ({"reduction": "mean"}, ValueError, "'block', 'element'"),
        ({"schedule": "linear", "start": 0.5, "end": 0.5}, ValueError, "start is 0.5; it must be below"),
        ({"end_weight": 0.1}, ValueError, "end_weight is 0.1.*constant schedule"),
    ],
)
def test_wrong_settings_name_the_field_and_what_is_accepted(wrong, error, message):
    with pytest.raises(error, match=message):
        TweoConfig(**wrong)


def test_schedules_move_the_weight_inside_their_window_only():
    cosine = TweoConfig(weight=1.0, schedule="cosine", end_weight=0.2, start=0.25, end=0.75)
    assert [cosine.weight_at(p) for p in (0, 0.25, 0.75, 1)] == pytest.approx([1.0, 1.0, 0.2, 0.2])
    assert cosine.weight_at(0.5) == pytest.approx(0.6)
    assert cosine.weight_at(0.375) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    ramp = TweoConfig(weight=0.0, schedule="linear", end_weight=0.1)
    assert [ramp.weight_at(p) for p in (0, 0.5, 1)] == pytest.approx([0, 0.05, 0.1])
    assert TweoConfig().weight_at(0.3) == 0.01


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_progress_outside_the_training_is_refused(progress):
    with pytest.raises(ValueError, match="fraction of the training"):
        TweoConfig().weight_at(progress)
