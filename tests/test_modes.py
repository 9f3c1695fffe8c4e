"""Whoever looks at a model leaves every module in the mode that it had, one that is half frozen too."""

import contextlib
import dataclasses

import pytest
import torch

from tests.quant.families import make_images, make_model
from tests.survey import planted
from tweo_timm import colinearity, quantize_static, record_outliers, rotate, stethoscope
from tweo_timm.diagnose.float16 import float16_readings
from tweo_timm.diagnose.readiness import fp8_readiness
from tweo_timm.diagnose.sites import record_sites
from tweo_timm.diagnose.zeroing import zeroed
from tweo_timm.modes import evaluating
from tweo_timm.quant.export import export_onnx
from tweo_timm.quant.fidelity import fidelity
from tweo_timm.rewrite.center import center
from tweo_timm.rewrite.fold import fold_affine
from tweo_timm.rewrite.shift import shift_norms
from tweo_timm.rewrite.values import rotate_values
from tweo_timm.run.model import check_image_size
from tweo_timm.survey.sensitivity import sensitivities
from tweo_timm.survey.survey import survey

IMAGES = make_images("vit", 4)


def recorded(recorder):
    def look(model, folder):
        with recorder(model) as record, torch.no_grad():
            model(IMAGES)
        record.summary()

    return look


def without_its_largest(model, folder):
    with zeroed(model, 3), torch.no_grad():
        model(IMAGES)


def surveyed(model, folder):
    bench = planted.bench(planted.sound, "vit", max_drop=0.0)
    survey(dataclasses.replace(bench, model=model, samples=[IMAGES], calibration=[IMAGES]), ["fp16", "w8a8-tt+res"])


LOOKS = {
    "stethoscope": lambda model, folder: stethoscope(model, IMAGES),
    "colinearity": lambda model, folder: colinearity(model, IMAGES),
    "fp8_readiness": lambda model, folder: fp8_readiness(model, [IMAGES]),
    "float16_readings": lambda model, folder: float16_readings(model, [IMAGES]),
    "record_outliers": recorded(record_outliers),
    "record_sites": recorded(record_sites),
    "zeroed": without_its_largest,
    "sensitivities": lambda model, folder: sensitivities(model, quantize_static(model, [IMAGES], "w8a8-tt"), [IMAGES]),
    "survey": surveyed,
    "fidelity": lambda model, folder: fidelity(model, quantize_static(model, [IMAGES], "w8a8-tt"), IMAGES),
    "quantize_static": lambda model, folder: quantize_static(model, [IMAGES], "w8a8-tt+res+smooth+qwt"),
    "rotate": lambda model, folder: rotate(model),
    "rotate, learned": lambda model, folder: rotate(model, "learned", [IMAGES]),
    "fold_affine": lambda model, folder: fold_affine(model),
    "center": lambda model, folder: center(model),
    "shift_norms": lambda model, folder: shift_norms(model, [IMAGES]),
    "rotate_values": lambda model, folder: rotate_values(model),
    "check_image_size": lambda model, folder: check_image_size("a ViT", model, (3, 32, 32)),
    "export_onnx": lambda model, folder: export_onnx(model, folder / "a.onnx", IMAGES),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "export_onnx")) for n in LOOKS])
def test_a_model_half_of_which_is_frozen_stays_so(name, tmp_path):
    model = make_model("vit").train()
    model.blocks[0].eval()
    model.blocks[1].attn.eval()
    model.blocks[1].requires_grad_(False)
    before = {module: part.training for module, part in model.named_modules()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    LOOKS[name](model, tmp_path)
    assert {module: part.training for module, part in model.named_modules()} == before
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_come_back_after_an_error_too():
    model = make_model("vit").train()
    model.blocks[0].eval()
    with contextlib.suppress(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert model.training
    assert not model.blocks[0].training
