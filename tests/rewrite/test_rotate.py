"""A rotated model computes what it computed, in the same architecture; what cannot be rotated stays untouched."""

import copy

import pytest
import timm
import torch
from timm.layers.attention import Attention

from tests.models import tiny_vit
from tests.rewrite.families import FAMILIES, make_images, make_model, scramble
from tweo_timm import describe_stream, fold_affine, record_outliers, rotate
from tweo_timm.modes import evaluating


def relative(model, other, images):
    with evaluating(model), evaluating(other), torch.no_grad():
        a, b = model(images).flatten(1), other(images).flatten(1)
    return float(((a - b).norm(dim=1) / a.norm(dim=1)).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotated_model_computes_the_same_with_the_same_keys_and_every_port_changed(family):
    model, images = make_model(family), make_images(family)
    original = copy.deepcopy(model)
    report = rotate(model, seed=3)
    assert relative(original, model, images) < 1e-12
    assert report.output_error < 1e-12
    before, after = original.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(before[name].shape == after[name].shape for name in before)
    for stage in describe_stream(original).stages:
        for port in stage.ports:
            assert float((before[port.name] - after[port.name]).norm() / before[port.name].norm()) > 0.05, port.name


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_only_rounding_differs(family):
    model, images = make_model(family, dtype=torch.float32), make_images(family).float()
    original = copy.deepcopy(model)
    assert rotate(model, "hadamard", [images]).output_error < 1e-5
    assert relative(original.double(), model.double(), images.double()) < 1e-5


@pytest.mark.parametrize("family", ["dinov2", "swin, padded windows", "dinov3"])
def test_folding_alone_computes_the_same(family):
    model, images = make_model(family), make_images(family)
    original = copy.deepcopy(model)
    folded = fold_affine(model)
    assert relative(original, model, images) < 1e-12
    for name in folded:
        scale = model.get_parameter(name if "gamma" in name else f"{name}.weight")
        assert len(set(scale.tolist())) == 1, name


def test_gated_attention_is_rotated_with_its_gate():
    model = make_model("vit", dtype=torch.float32)
    for block in model.blocks:
        block.attn = Attention(24, num_heads=2, qkv_bias=True, gated=True)
    scramble(model)
    model.double()
    original = copy.deepcopy(model)
    rotate(model)
    assert relative(original, model, make_images("vit")) < 1e-12


def test_swins_padding_sees_what_it_saw_at_another_image_size_too():
    """Windows are filled up with zeros after the norm: a shift moved into the bias would reach them."""
    model = make_model("swin of any size")
    original = copy.deepcopy(model)
    rotate(model)
    for size in (32, 36, 44):
        assert relative(original, model, torch.randn(2, 3, size, size, dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("method", ["random", "hadamard", "learned"])
def test_rotations_take_a_planted_outlier_away(method):
    model = tiny_vit(embed_dim=64, depth=3)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc2.bias[7] += 40
    images = [torch.randn(4, 3, 32, 32)]
    with record_outliers(model) as before:
        model(images[0])
    report = rotate(model, method, images)
    with record_outliers(model) as after:
        model(images[0])
    assert after.summary()["peak_abs"] < before.summary()["peak_abs"] / 2.5
    seen = {site.name: site for site in report.sites}
    last = before.summary()["blocks"][-1]
    assert seen["blocks.2"].before.peak_abs == pytest.approx(last["peak_abs"], rel=1e-5)
    assert seen["blocks.2"].after.peak_abs == pytest.approx(after.summary()["blocks"][-1]["peak_abs"], rel=1e-5)


def test_a_learned_rotation_is_flatter_than_the_random_one_it_began_with():
    images = [make_images("deit3", 8).float()]
    drawn, learned = (rotate(make_model("deit3", dtype=torch.float32), m, images) for m in ("random", "learned"))
    assert learned.output_error < 1e-5

    def ratio(report):
        return sum(site.after.peak_abs / site.before.peak_abs for site in report.sites)

    assert ratio(learned) < ratio(drawn)


def test_one_step_of_adamw_moves_each_matrix_relatively_as_much_as_before():
    model, images = make_model("dinov2", dtype=torch.float32), make_images("dinov2").float()
    rotated = copy.deepcopy(model)
    rotate(rotated)

    def movement(model):
        start = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0)
        model(images).square().mean().backward()
        optimizer.step()
        names = [name for name, value in start.items() if value.ndim == 2]
        return {n: float((model.state_dict()[n] - start[n]).norm() / start[n].norm()) for n in names}

    before, after = movement(model), movement(rotated)
    for name in before:
        assert after[name] == pytest.approx(before[name], rel=1.5), name
        assert after[name] < 4 * before[name], name


@pytest.mark.parametrize("method", ["random", "hadamard", "learned"])
def test_a_seed_repeats(method):
    images = [make_images("vit")]
    first, second, other = (rotate(make_model("vit"), method, images, seed=seed) for seed in (1, 1, 2))
    assert first.digests == second.digests
    assert first.digests != other.digests


def test_bfloat16_stays_bfloat16():
    model = make_model("dinov2", dtype=torch.bfloat16)
    report = rotate(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert report.output_error < 0.1


def test_wrapped_models_and_modes_and_hooks_are_left_as_they_were():
    model = make_model("vit").train()
    model.blocks[0].eval()
    compiled = torch.compile(model, backend="eager")
    rotate(compiled)
    assert [m.training for m in (model, model.blocks[0], model.blocks[1].attn)] == [True, False, True]
    assert not any(module._forward_hooks for module in model.modules())


def unchanged(model, action, match):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        action(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_without_a_head_is_refused_unless_its_pool_hides_the_basis():
    unchanged(make_model("dinov2", num_classes=0), rotate, "no head")
    unchanged(make_model("swin", num_classes=0), rotate, "no head")
    assert rotate(make_model("siglip without a head")).output_error < 1e-12


def test_what_is_refused_is_refused_unchanged():
    unchanged(make_model("vit"), lambda model: rotate(model, "lerned"), "did you mean")
    unchanged(make_model("vit"), lambda model: rotate(model, "learned"), "images")
    clip = timm.create_model("vit_base_patch32_clip_224", img_size=32, embed_dim=24, depth=1, num_heads=2)
    unchanged(clip, rotate, "norm_pre")


def test_a_shift_that_must_stay_under_a_gain_of_zero_is_refused_by_name():
    model = make_model("dinov3")
    with torch.no_grad():
        model.blocks[1].norm1.weight[5] = 0
    unchanged(model, rotate, r"blocks\.1\.norm1\.weight is 0 .*channels 5\)")


def test_a_gain_of_zero_is_fine_where_nothing_stays():
    model = make_model("vit")
    with torch.no_grad():
        model.blocks[1].norm1.weight[5] = 0
        model.blocks[0].norm2.weight.zero_()
    original = copy.deepcopy(model)
    rotate(model)
    assert relative(original, model, make_images("vit")) < 1e-12


def test_what_meets_the_stream_undescribed_is_found_and_everything_put_back():
    model = make_model("vit")
    model.blocks[0].register_forward_hook(lambda module, args, output: output * torch.linspace(0.5, 1, 24))
    unchanged(model, rotate, "not described")


def test_weights_that_are_not_finite_are_refused():
    model = make_model("vit")
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    before = copy.deepcopy(model.blocks.state_dict())
    with pytest.raises(ValueError, match="not finite"):
        rotate(model)
    assert all(torch.equal(before[name], value) for name, value in model.blocks.state_dict().items())


@pytest.mark.parametrize("family", ["dinov2", "eva02", "vit without a last norm", "swin", "beit"])
def test_rotated_features_can_be_taken_back(family, tmp_path):
    from tweo_timm.rewrite.features import RotatedFeatures

    model, images = make_model(family, num_classes=0), make_images(family)
    original = copy.deepcopy(model)
    report = rotate(model, allow_rotated_features=True)
    path = tmp_path / "OUT.rotation.safetensors"
    RotatedFeatures(report.rotations, report.norms).save(path)
    features = RotatedFeatures.load(path)
    normed = family != "vit without a last norm"
    assert torch.allclose(features.unrotate(model(images), normed=normed), original(images), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(images), original(images), rtol=0.1)
    stage = list(report.rotations)[-1]
    index = len(original.layers) - 1 if family == "swin" else 1
    was, now = (m.forward_intermediates(images, indices=[index], intermediates_only=True)[0] for m in (original, model))
    assert torch.allclose(features.unrotate(now, stage, normed=False, channel_axis=1), was, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="was not rotated"):
        features.unrotate(now, "layers.0")
