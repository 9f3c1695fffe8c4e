"""Tweo in a plain loop is attach_tweo, and a float64 reading of the definition, whatever else the loop does."""

import copy

import pytest
import torch
from timm.task import ClassificationTask

from tests.models import batch, gradients, penalty, tiny_swin, tiny_vit
from tweo_timm import Tweo, TweoConfig, attach_tweo

CONFIG = TweoConfig(weight=0.05, tau=0.7)


def outputs_of(model, images):
    """The blocks' outputs, in float64, kept by hooks of the test's own."""
    kept = []
    blocks = model.blocks if hasattr(model, "blocks") else [block for stage in model.layers for block in stage.blocks]
    hooks = [block.register_forward_hook(lambda module, args, output: kept.append(output.double())) for block in blocks]
    result = model(images)
    for hook in hooks:
        hook.remove()
    return result, kept


def equal(a, b, tolerance=1e-6):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-4, atol=tolerance) for k in a)


@pytest.mark.parametrize("make", [tiny_vit, tiny_swin])
def test_one_forward_is_attach_tweo_and_the_definition_gradients_too(make):
    model, (images, targets) = make().train(), batch()
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    criterion = torch.nn.CrossEntropyLoss()
    tweo = Tweo(model, CONFIG)
    loss = criterion(model(images), targets) + tweo.penalty()
    loss.backward()
    task = ClassificationTask(twin, criterion)
    attach_tweo(task, CONFIG)
    result = task(images, targets)
    result["loss"].backward()
    logits, kept = outputs_of(third, images)
    reading = criterion(logits, targets) + CONFIG.weight * penalty(kept, CONFIG)
    reading.backward()
    assert loss.item() == pytest.approx(result["loss"].item(), rel=1e-6)
    assert loss.item() == pytest.approx(reading.item(), rel=1e-6)
    assert tweo.peak_abs == result["peak_abs"] == max(x.abs().max() for x in kept)
    assert equal(gradients(model), gradients(twin))
    assert equal(gradients(model), gradients(third))


def test_two_forwards_of_one_step_give_the_mean_of_both():
    model, (images, _), (others, _) = tiny_vit().train(), batch(), batch(seed=1)
    twin, tweo = copy.deepcopy(model), Tweo(model, CONFIG)
    (model(images).sum() + model(others).sum() + tweo.penalty()).backward()
    first, second = outputs_of(twin, images), outputs_of(twin, others)
    mean = (penalty(first[1], CONFIG) + penalty(second[1], CONFIG)) / 2
    (first[0].sum() + second[0].sum() + CONFIG.weight * mean).backward()
    assert equal(gradients(model), gradients(twin), 1e-5)
    assert tweo.peak_abs == max(x.abs().max() for x in (*first[1], *second[1]))


def test_a_pass_that_is_forgotten_counts_neither_in_the_penalty_nor_in_the_peak():
    model = tiny_vit().train()
    tweo = Tweo(model, CONFIG)
    images, _ = batch()
    model(images)
    expected = tweo.penalty()
    peak = tweo.peak_abs
    model(images * torch.nan)
    tweo.forget()
    model(images)
    assert torch.equal(tweo.penalty(), expected)
    assert torch.equal(tweo.peak_abs, peak)


def test_teachers_copies_and_evaluations_do_not_count():
    model, (images, _) = tiny_vit().train(), batch()
    tweo, teacher = Tweo(model, CONFIG), copy.deepcopy(model)
    model(images)
    alone = tweo.penalty()
    model(images)
    teacher(images)
    with torch.no_grad():
        model(images)
    model.eval()(images)
    assert torch.equal(tweo.penalty(), alone)


def test_what_checkpointing_computes_again_does_not_count():
    model, (images, _) = tiny_vit().train(), batch()
    model.set_grad_checkpointing()
    tweo = Tweo(model, CONFIG)
    for _ in range(3):
        (model(images).sum() + tweo.penalty()).backward()
    with pytest.raises(RuntimeError, match="no forward pass has counted"):
        tweo.penalty()


def test_masked_tokens_are_left_out_of_penalty_gradient_and_peak():
    model, (images, _) = tiny_vit().train(), batch()
    twin, tweo = copy.deepcopy(model), Tweo(model, CONFIG)
    _, kept = outputs_of(twin, images)
    tweo.mask = torch.rand(kept[0].shape[:2], generator=torch.Generator().manual_seed(0)) < 0.5
    model(images)
    found = tweo.penalty()
    found.backward()
    reading = CONFIG.weight * penalty([x[tweo.mask] for x in kept], CONFIG)
    reading.backward()
    assert found.item() == pytest.approx(reading.item(), rel=1e-6)
    assert equal(gradients(model), gradients(twin))
    assert tweo.peak_abs == max(x[tweo.mask].abs().max() for x in kept)


@pytest.mark.parametrize("mask", [torch.ones(4, 3, dtype=torch.bool), torch.ones(4, 17)])
def test_a_mask_of_another_shape_or_dtype_is_refused(mask):
    model, (images, _) = tiny_vit().train(), batch()
    tweo = Tweo(model)
    tweo.mask = mask
    with pytest.raises(ValueError, match="the mask is"):
        model(images)


def test_a_loop_that_forgets_the_penalty_is_told_so():
    model, (images, _) = tiny_vit().train(), batch()
    tweo = Tweo(model)
    for _ in range(8):
        model(images)
    with pytest.raises(RuntimeError, match=r"8 forward passes have waited for penalty\(\)"):
        model(images)
    tweo.remove()
    model(images)


def test_weight_zero_measures_and_adds_nothing():
    model, (images, _) = tiny_vit().train(), batch()
    tweo = Tweo(model, TweoConfig(weight=0))
    model(images)
    found = tweo.penalty()
    assert found == 0
    assert not found.requires_grad
    assert tweo.peak_abs > 0


def test_a_schedule_has_to_be_told_where_the_training_is():
    model, (images, _) = tiny_vit().train(), batch()
    tweo = Tweo(model, TweoConfig(weight=0.1, schedule="linear"))
    with pytest.raises(RuntimeError, match="set_progress"):
        model(images)
    tweo.set_progress(0.5)
    model(images)
    half = tweo.penalty()
    tweo.set_progress(0)
    model(images)
    assert half == tweo.penalty() / 2


def test_a_compiled_model_gives_the_same_penalty_and_gradients():
    model, (images, _) = tiny_vit().train(), batch()
    twin = copy.deepcopy(model)
    tweo, reference = Tweo(model, CONFIG), Tweo(twin, CONFIG)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        (compiled(images).sum() + compiled(images).sum() + tweo.penalty()).backward()
        (twin(images).sum() + twin(images).sum() + reference.penalty()).backward()
    assert equal(gradients(model), gradients(twin), 1e-5)
    assert torch.equal(tweo.block_peaks, reference.block_peaks)


def test_attach_tweo_on_a_bare_model_names_tweo():
    with pytest.raises(TypeError, match="Tweo"):
        attach_tweo(tiny_vit(), TweoConfig())
