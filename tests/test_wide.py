"""Diagnoses and quantization where the device has no float64: the numbers of the CPU, which has."""

import contextlib
import copy

import pytest
import torch

from tests.narrow_device import NARROW, NarrowDevice
from tests.quant.families import make_images, make_model
from tweo_timm import colinearity, quantize_static, stethoscope, wide
from tweo_timm.diagnose.readiness import fp8_readiness
from tweo_timm.quant.fidelity import fidelity
from tweo_timm.quant.quantizer import QuantizedLayer, Quantizer


def everywhere(model, images):
    """What each of them says of a model."""
    quantized = {scheme: quantize_static(model, [images], scheme) for scheme in ("w8a8-tt+qwt", "w8a8-tt+qwtlinear")}
    return {
        "stethoscope": stethoscope(model, images),
        "colinearity": colinearity(model, images),
        "readiness": fp8_readiness(model, [images[:2], images[2:]]),
        **{scheme: fidelity(model, other, images) for scheme, other in quantized.items()},
    }


def alike(ours, theirs):
    """To 5 %: attention is computed in another order, and a value on the edge of two integers falls either way."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(alike(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(alike, ours, theirs))
    return ours == (pytest.approx(theirs, rel=0.05, abs=1e-4) if isinstance(theirs, float) else theirs)


@pytest.fixture
def narrow(monkeypatch):
    """The device; autocast, which it has not, is off wherever this is used."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **settings: contextlib.nullcontext())
    wide.has_float64.cache_clear()
    with NarrowDevice():
        yield NARROW
    wide.has_float64.cache_clear()


def test_the_cpu_has_float64_and_the_narrow_device_has_none(narrow):
    assert wide.has_float64("cpu")
    assert not wide.has_float64.__wrapped__(narrow.type)
    assert wide.wide(torch.ones(2, device=narrow)).dtype == torch.float64
    with pytest.raises(TypeError, match="float64"):
        torch.ones(2, device=narrow).double()
    with pytest.raises(AssertionError, match="two devices"):
        torch.ones(2, device=narrow) + torch.ones(2)


def test_models_are_measured_and_quantized_as_on_the_cpu(narrow):
    model, images = make_model("vit"), make_images("vit", 8)
    expected = everywhere(copy.deepcopy(model), images)
    found = everywhere(model.to(narrow), images)
    for name in expected:
        assert alike(found[name], expected[name]), name


def test_sums_beyond_float32_are_exact_to_one_rounding(narrow):
    layer = torch.nn.Linear(2048, 8)
    torch.nn.init.ones_(layer.weight)
    x = torch.full((1, 2048), 127.0)
    quantized = QuantizedLayer(layer, Quantizer(8, torch.tensor(127.0)), 8, per_channel=False)
    expected = quantized.accumulate(x)
    assert expected.dtype == torch.float64
    found = quantized.to(narrow).accumulate(x.to(narrow))
    assert found.device == narrow
    torch.testing.assert_close(found.cpu(), expected.float(), rtol=0, atol=0)
