"""The score of a site against the damage that the site does alone, and against its own formula by plain autograd."""

import pytest
import torch
import torch.nn.functional as F

from tests.quant.families import make_images, make_model
from tests.survey import planted
from tweo_timm import quantize_static
from tweo_timm.quant.static import quantization_scales
from tweo_timm.survey.sensitivity import DRAWS, sensitivities


def ranks(values):
    return torch.tensor(values).argsort().argsort().double()


def rank_correlation(a, b):
    """Spearman's, of values without ties."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


@pytest.mark.parametrize("family", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheme", ["w8a8-tt+res", "w4a4-tt"])
def test_the_order_is_that_of_the_damage_each_does_alone(family, scheme):
    model, images = make_model(family), make_images(family, 32)
    quantized = quantize_static(model, [images], scheme)
    found = {site.name: site.score for site in sensitivities(model, quantized, [images])}
    names = list(quantization_scales(quantized))
    assert set(found) == set(names)
    with torch.no_grad():
        wanted = model(images).log_softmax(-1)
        damage = []
        for name in names:
            alone = quantize_static(model, [images], scheme, keep_float=[n for n in names if n != name])
            damage.append(float((wanted.exp() * (wanted - alone(images).log_softmax(-1))).sum(-1).mean()))
    assert rank_correlation([found[name] for name in names], damage) > 0.9


def test_a_score_is_the_mean_square_of_gradient_times_error():
    model, images = make_model("vit"), make_images("vit", 4)
    quantized = quantize_static(model, [images], "w4a4-tt")
    name, kept = "blocks.1.mlp.fc1", {}
    layer = model.get_submodule(name)
    layer.register_forward_hook(lambda m, args, y: kept.update(x=args[0], y=y))
    logits = model(images)
    error = (quantized.get_submodule(name)(kept["x"].detach()) - kept["y"]).detach().double()
    generator, total = torch.Generator().manual_seed(0), 0.0
    for _ in range(DRAWS):
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
        (gradient,) = torch.autograd.grad(
            F.cross_entropy(logits, labels, reduction="sum"), kept["y"], retain_graph=True
        )
        total += float((gradient.double() * error).flatten(1).sum(1).square().mean())
    found = {site.name: site for site in sensitivities(model, quantized, [images])}[name]
    assert found.score == pytest.approx(total / DRAWS, rel=1e-4)
    assert found.peak_abs == pytest.approx(float(kept["x"].detach().abs().max()), rel=1e-5)


def test_a_site_that_is_not_finite_comes_first_and_the_model_stays_as_it_was():
    model, images = make_model("swin"), make_images("swin", 4)
    quantized = quantize_static(model, [images], "fp8+res")
    before = {name: value.clone() for name, value in quantized.state_dict().items()}
    quantized.layers[0].blocks[1].mlp.fc1.bias[0] = torch.inf
    assert sensitivities(model, quantized, [images])[0].name == "layers.0.blocks.1.mlp.fc1"
    quantized.layers[0].blocks[1].mlp.fc1.bias[0] = before["layers.0.blocks.1.mlp.fc1.bias"][0]
    assert all(torch.equal(value, quantized.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("family", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
def test_a_layer_that_loses_q_and_k_comes_first_though_a_saturated_softmax_has_no_gradient(family):
    model, images = make_model(family), make_images(family, 32)
    name = f"{planted.SECOND[family]}.attn.qkv"
    layer = model.get_submodule(name)
    with torch.no_grad():
        layer.weight[: 2 * layer.in_features] *= 40.0
        planted.bad_layer(model, family, 18)
        quantized = quantize_static(model, [images], "w8a8-tt")
        names = list(quantization_scales(quantized))
        alone = quantize_static(model, [images], "w8a8-tt", keep_float=[n for n in names if n != name])
        wanted, got = (m(images).double().log_softmax(-1) for m in (model, alone))
    found = sensitivities(model, quantized, [images])
    assert found[0].name == name
    assert found[0].score == pytest.approx(2 * float((wanted.exp() * (wanted - got)).sum(-1).mean()), rel=1e-3)


def test_layers_whose_outputs_a_model_changes_in_place_are_scored_as_the_others_are():
    """SwinV2's position bias goes through a ReLU in place, and sees no images."""
    model, images = make_model("swinv2"), make_images("swinv2", 16)
    quantized = quantize_static(model, [images], "w4a4-tt")
    found = {site.name: site.score for site in sensitivities(model, quantized, [images])}
    name = "layers.0.blocks.0.attn.cpb_mlp.0"
    alone = quantize_static(model, [images], "w4a4-tt", keep_float=[n for n in found if n != name])
    with torch.no_grad():
        wanted, got = (m(images).double().log_softmax(-1) for m in (model, alone))
    assert found[name] == pytest.approx(2 * float((wanted.exp() * (wanted - got)).sum(-1).mean()), rel=1e-3)


def test_a_model_without_a_head_is_scored_by_the_change_of_its_features():
    model, images = make_model("vit"), make_images("vit", 64)
    model.reset_classifier(0)
    quantized = quantize_static(model, [images], "w4a4-tt")
    found = {site.name: site.score for site in sensitivities(model, quantized, [images], features=True)}
    names = list(quantization_scales(quantized))
    damage = []
    with torch.no_grad():
        for name in names:
            alone = quantize_static(model, [images], "w4a4-tt", keep_float=[n for n in names if n != name])
            damage.append(float((alone(images) - model(images)).square().sum()))
    assert rank_correlation([found[name] for name in names], damage) > 0.9
