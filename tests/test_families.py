"""What is declared of a stream is what is observed when the model runs; everything else is refused with its reason."""

import copy

import pytest
import timm
import torch
from torch import nn

from tests.rewrite.families import FAMILIES, make_images, make_model
from tweo_timm import Fp8Recipe, describe_stream, families, patch_fp8
from tweo_timm.layers import projections_called
from tweo_timm.quant.smooth import Readers

_SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_declared_readers_of_a_norm_are_those_that_its_output_is_seen_to_flow_into(family):
    model = make_model(family)
    watch = Readers(model)
    with torch.no_grad(), projections_called(model):
        watch.follow(model, make_images(family))
    stages = describe_stream(model).stages
    declared = {norm: {port.module for port in ports} for stage in stages for norm, ports in stage.norms.items()}
    assert declared or family == "vit without a last norm"
    for norm, modules in declared.items():
        seen = set(watch.linears[norm]) - {""}
        pooled = norm == "norm" and "mean" in watch.others[norm]  # nothing is followed through an average
        assert seen == (set() if pooled else modules), norm


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_of_every_declared_writer_is_invisible_and_that_of_no_other_parameter(family):
    """LayerNorms take the stream's mean away: a constant added to a writer is seen by no norm."""
    if family in ("vit with RmsNorm", "vit without a last norm"):
        pytest.skip("the mean of this stream is read")
    model, images = make_model(family), make_images(family, 1)
    stages = describe_stream(model).stages
    merged = {port.norm for stage in stages for port in stage.readers if port.copies > 1}
    writers = {port.name: port for stage in stages for port in stage.writers if not _enters(stage, merged)}
    with torch.no_grad():
        before = model(images)
        for name, port in writers.items():
            after = _with_constant(model, name, port)(images)
            assert torch.allclose(before, after, rtol=1e-9, atol=1e-11), name


def _enters(stage, merged):
    return any(norm in merged for norm in stage.norms)


def _with_constant(model, name, port):
    """A copy whose writer adds the same number to every channel, after its LayerScale."""
    changed = copy.deepcopy(model)
    parameter = changed.get_parameter(name)
    direction = torch.ones(parameter.shape[port.axis], dtype=parameter.dtype)
    if port.scale:
        direction = direction / changed.get_parameter(port.scale)
    shape = [1] * parameter.ndim
    shape[port.axis] = -1
    parameter.add_(direction.reshape(shape).expand_as(parameter))
    return changed


REFUSED = {
    "clip": (lambda: timm.create_model("vit_base_patch32_clip_224", **_SIZES, num_classes=10), "norm_pre"),
    "max pooling": (lambda: timm.create_model("vit_tiny_patch16_224", **_SIZES, global_pool="max"), "maxima"),
    "mean and max": (lambda: timm.create_model("vit_tiny_patch16_224", **_SIZES, global_pool="avgmax"), "maxima"),
    "prr": (lambda: timm.create_model("vit_tiny_patch16_224", **_SIZES, global_pool="prr"), "single channels"),
    "res-post": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", **_SIZES, block_fn=timm.models.vision_transformer.ResPostBlock
        ),
        "after its branches",
    ),
    "relpos rpn": (lambda: timm.create_model("vit_relpos_base_patch16_rpn_224", **_SIZES), "after its branches"),
    "swin v2": (lambda: timm.create_model("swinv2_tiny_window8_256", img_size=64, embed_dim=12), "res-post-norm"),
    "swin v2 cr": (lambda: timm.create_model("swinv2_cr_tiny_224", img_size=224, embed_dim=12), "res-post-norm"),
    "swin, max": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, global_pool="max"),
        "maxima",
    ),
    "swin of one stage": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, depths=(2,), num_heads=(2,)),
        "only stage",
    ),
    "eva post-norm": (
        lambda: timm.create_model("eva02_tiny_patch14_224", **_SIZES, use_post_norm=True),
        "after its branches",
    ),
    "norm in the embedding": (
        lambda: timm.create_model("vit_tiny_patch16_224", **_SIZES, embed_norm_layer=nn.LayerNorm),
        "patch_embed.norm",
    ),
    "naflex": (
        lambda: timm.create_model("naflexvit_base_patch16_gap", embed_dim=24, depth=1),
        "described",
    ),
    "no transformer": (lambda: timm.create_model("resnet10t"), "described"),
    "another norm": (
        lambda: timm.create_model("vit_tiny_patch16_224", **_SIZES, norm_layer=timm.layers.SimpleNorm),
        "SimpleNorm",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rewritten_is_refused_with_the_reason(name):
    make, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        describe_stream(make())


def test_layers_that_are_no_longer_plain_are_refused():
    model = make_model("vit", dtype=torch.float32)
    patch_fp8(model, Fp8Recipe(backend="emulated"))
    with pytest.raises(ValueError, match=r"not a plain Linear layer"):
        describe_stream(model)


def test_a_tensor_with_two_places_is_refused():
    model = make_model("vit")
    model.blocks[1].mlp.fc2.weight = model.blocks[0].mlp.fc2.weight
    with pytest.raises(ValueError, match="one tensor"):
        describe_stream(model)


def test_a_subclass_is_another_family():
    class Mine(type(make_model("vit"))):
        pass

    model = make_model("vit")
    model.__class__ = Mine
    with pytest.raises(ValueError, match="described"):
        describe_stream(model)


def test_stages_are_described_in_forward_order_with_their_widths():
    stream = describe_stream(make_model("swin"))
    assert [(stage.name, stage.width) for stage in stream.stages] == [("layers.1", 24), ("layers.2", 48)]
    assert "norm" in stream.undescribed["layers.0"]
    assert stream.stages[0].blocks == ["layers.1.blocks.0", "layers.1.blocks.1"]
    assert {"layers.1.downsample.reduction.weight", "layers.1.blocks.1.mlp.fc2.bias"} <= {
        port.name for port in stream.stages[0].writers
    }


@pytest.mark.slow
def test_so_many_architectures_of_the_described_families_may_be_rotated(capsys):
    classes = [name for family in families.FAMILIES for name in family.classes if family.name != "SwinV2"]
    modules = sorted({"vision_transformer_hybrid", *(name.split(".")[0] for name in classes)})
    described, refused = [], []
    for arch in (arch for module in modules for arch in timm.list_models(module=module)):
        with torch.device("meta"):
            model = timm.create_model(arch)
        try:
            describe_stream(model)
            described.append(arch)
        except ValueError:
            refused.append(arch)
    with capsys.disabled():
        print(f"\n{len(described)} of {len(described + refused)} architectures; timm {timm.__version__}")
    if timm.__version__ == "1.0.31":  # as README and docs/repair.md say
        assert (len(described), len(refused)) == (238, 60)
