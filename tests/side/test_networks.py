"""Side networks: their equations in float64, what is frozen, and what the backward pass keeps."""

import copy

import pytest
import torch
from torch import nn

from tests.models import batch, tiny_swin, tiny_vit
from tweo_timm import find_blocks
from tweo_timm.side import Last, LowRankAttention, Miet
from tweo_timm.side.basis import OwnBasis
from tweo_timm.side.miet import in_transit, message_bytes

SIDES = {"last": Last, "miet": Miet}


def network(kind, backbone=None, depth=4, gap=2, **settings):
    """A side network whose up-projections are no zeros, in float64."""
    backbone = backbone or tiny_vit(depth=depth)
    torch.manual_seed(3)
    net = SIDES[kind](backbone, 5, rank=6, gap=gap, num_heads=2, **settings).double()
    for module in net.modules():
        if isinstance(module, LowRankAttention):
            nn.init.normal_(module.up.weight, std=0.3)
            nn.init.normal_(module.up.bias, std=0.3)
    return net


def streams(backbone, images):
    """z_0 and the output of every block, by timm's own parts."""
    x = backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(backbone.patch_embed(images))))
    found = [x]
    for block in backbone.blocks:
        found.append(block(found[-1]))
    return found


def attention(state, prefix, x, heads):
    """One low-rank module as the equations have it."""
    y = nn.functional.layer_norm(x, x.shape[-1:], state[f"{prefix}norm.weight"], state[f"{prefix}norm.bias"])
    q, k, v = (y @ state[f"{prefix}qkv.weight"].T + state[f"{prefix}qkv.bias"]).chunk(3, -1)
    outputs = []
    for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        outputs.append(torch.softmax(qh @ kh.mT / qh.shape[-1] ** 0.5, -1) @ vh)
    return x + torch.cat(outputs, -1) @ state[f"{prefix}up.weight"].T + state[f"{prefix}up.bias"]


def head(state, x):
    y = nn.functional.layer_norm(x, x.shape[-1:], state["head.norm.weight"], state["head.norm.bias"], 1e-6)
    return y[:, 0] @ state["head.fc.weight"].T + state["head.fc.bias"]


def by_the_equations(kind, net, state, images):
    z = [stream.detach() for stream in streams(net.backbone, images)][:: net.config.gap]
    if kind == "miet":
        u = sum(z)
        for index in range(net.config.modules_per_block):
            u = attention(state, f"edge.{index}.", u, net.config.num_heads)
        return head(state, u)
    u = z[0]
    for i in range(1, len(z)):
        u = u + z[i]
        for index in range(net.config.modules_per_block):
            u = attention(state, f"blocks.{i - 1}.{index}.", u, net.config.num_heads)
    return head(state, u - sum(z[:-1]))


@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize("gap", [1, 2, 4])
def test_logits_and_gradients_are_those_of_the_equations(kind, gap):
    net, (images, targets) = network(kind, gap=gap), batch()
    images, targets = images.double(), targets % 5
    logits = net(images)
    nn.functional.cross_entropy(logits, targets).backward()
    state = {name: value.clone().requires_grad_() for name, value in net.state_dict().items()}
    expected = by_the_equations(kind, net, state, images)
    nn.functional.cross_entropy(expected, targets).backward()
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert trained.keys() == state.keys()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-8, atol=1e-12)


def test_with_zero_up_projections_last_reads_the_last_stream_by_its_head():
    backbone, (images, _) = tiny_vit(depth=4), batch()
    net = Last(backbone, 5, rank=4, gap=2).double()
    last = streams(backbone, images.double())[-1]
    torch.testing.assert_close(net(images.double()), net.head(last), rtol=1e-10, atol=1e-12)
    net.head.fc = backbone.head  # the backbone's own: then the logits are the backbone's
    torch.testing.assert_close(net(images.double()), backbone(images.double()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", SIDES)
def test_backward_keeps_no_parameter_and_no_activation_of_the_backbone(kind):
    net, (images, _) = network(kind, drop_path=0.1, drop=0.1).train(), batch()
    theirs, saved = {p.untyped_storage().data_ptr() for p in net.backbone.parameters()}, []
    kept = []  # alive, so that no address is used again

    def keep(module, args, output):
        kept.extend(value for value in (*args, output) if isinstance(value, torch.Tensor))

    for module in net.backbone.modules():
        module.register_forward_hook(keep)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        net(images.double()).sum().backward()
    theirs |= {value.untyped_storage().data_ptr() for value in kept}
    assert saved
    assert kept
    assert not [tensor.shape for tensor in saved if tensor.untyped_storage().data_ptr() in theirs]
    assert not any(value.requires_grad for value in kept)


@pytest.mark.parametrize("kind", SIDES)
def test_only_side_network_and_head_are_trained_and_stored(kind):
    net = network(kind)
    net.train()
    assert not any(module.training for module in net.backbone.modules())
    assert net.head.training
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == set(net.state_dict())
    assert not any(name.startswith("backbone.") for name in trained)
    other = network(kind, backbone=net.backbone)
    for p in other.head.parameters():
        nn.init.normal_(p)
    other.load_state_dict(net.state_dict(), strict=True)
    images = batch()[0].double()
    assert torch.equal(other.eval()(images), net.eval()(images))
    with pytest.raises(RuntimeError, match=r"head\.fc\.bias"):
        other.load_state_dict({name: v for name, v in net.state_dict().items() if name != "head.fc.bias"})


@pytest.mark.parametrize("kind", SIDES)
def test_a_copy_reads_its_own_backbone(kind):
    net, images = network(kind), batch()[0].double()
    twin = copy.deepcopy(net)
    expected = net(images)
    for p in net.backbone.parameters():
        p.zero_()
    assert torch.equal(twin(images), expected)
    assert not any(block._forward_hooks for block in find_blocks(net.backbone).values())


@pytest.mark.parametrize("kind", SIDES)
def test_features_are_the_same_in_training_under_autocast_and_from_a_cache(kind):
    net, images = network(kind).float().train(), batch()[0]
    expected = net.features(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.features(images), expected)
    assert expected.shape[1:] == net.feature_shape
    logits = net.eval()(images)
    net.from_cache = True
    assert torch.equal(net(expected), logits)


def with_affine_norms(model):
    """A model without a head, in float64, whose norms have gains and shifts that differ from channel to channel."""
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 3.0, 1.0)
            nn.init.normal_(module.bias)
    return model.double().eval()


@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (lambda: tiny_vit(depth=4, num_classes=0, init_values=0.1), {}),
        (lambda: tiny_vit(depth=4, num_classes=0, global_pool="avg", class_token=False, fc_norm=True), {}),
        (lambda: tiny_swin(num_classes=0), {"gap": 1, "blocks": r"layers\.1\.blocks\.\d+"}),
        (lambda: tiny_swin(num_classes=0), {"gap": 1, "blocks": r"layers\.0\.blocks\.\d+"}),
    ],
    ids=["vit", "vit of averages", "last stage of a swin", "first, which is not rotated"],
)
def test_beside_a_rotated_backbone_the_network_is_the_one_beside_the_backbone_as_it_was(kind, model, settings):
    plain, images = with_affine_norms(model()), batch()[0].double()
    rotated = copy.deepcopy(plain)
    basis = OwnBasis.rotating(rotated, "random", [images])
    turned = network(kind, rotated, basis=basis, **settings)
    mine = network(kind, plain, **settings)
    torch.testing.assert_close(turned.features(images), mine.features(images), rtol=1e-9, atol=1e-10)
    assert all(torch.equal(value, turned.state_dict()[name]) for name, value in mine.state_dict().items())
    torch.testing.assert_close(turned(images), mine(images), rtol=1e-8, atol=1e-9)


def test_backbones_of_several_shapes_are_refused_and_one_of_their_stages_is_not():
    with pytest.raises(ValueError, match="different shapes") as refusal:
        Last(tiny_swin(), 5, gap=1)
    assert r"layers\.2\.blocks" in str(refusal.value)
    one = Last(tiny_swin(), 5, rank=4, gap=1, blocks=r"layers\.1\.blocks\.\d+")
    images = batch()[0]
    assert one(images).shape == (4, 5)
    assert one.feature_shape == (2, 16, 32)


@pytest.mark.parametrize(
    ("settings", "part"),
    [({"gap": 3}, "divide the 4 blocks"), ({"rank": 5, "num_heads": 2}, "divisor"), ({"rank": 0}, "rank is 0")],
)
def test_settings_that_do_not_fit_are_refused(settings, part):
    with pytest.raises(ValueError, match=part):
        Last(tiny_vit(depth=4), 5, **settings)


def test_messages_arrive_within_half_a_step():
    message = torch.randn(3, 1, 7, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 50, 1e-3]).view(
        3, 1, 1, 1
    )
    step = message.abs().amax((1, 2, 3)) / 127
    assert bool(((in_transit(message, 8) - message).abs().amax((1, 2, 3)) <= step / 2 * 1.001).all())
    _, tokens, dim = Miet(tiny_vit(depth=4), 5, rank=4, gap=2).feature_shape
    assert [message_bytes(tokens, dim, bits) for bits in (16, 8)] == [17 * 32 * 2, 17 * 32 + 4]
    for refused in (lambda: message_bytes(1, 1, 4), lambda: in_transit(message, 4)):
        with pytest.raises(ValueError, match="16 or 8"):
            refused()
