"""BlockTap: speaks for the modules it was put on, once a call, and leaves nothing behind."""

import copy

import pytest
import torch
from torch import nn

from tests.models import batch, tiny_vit
from tweo_timm import find_blocks
from tweo_timm.tap import BlockTap


def tapped(model):
    calls = []
    tap = BlockTap(find_blocks(model), lambda name, block, output: calls.append((name, block, output.shape)))
    return tap, calls


def test_every_block_is_observed_once_in_forward_order():
    model = tiny_vit()
    _, calls = tapped(model)
    model(batch()[0])
    assert calls == [(f"blocks.{i}", model.blocks[i], torch.Size([4, 17, 32])) for i in range(2)]


def test_observing_does_not_change_the_output():
    model = tiny_vit()
    images, _ = batch()
    before = model(images)
    tapped(model)
    assert torch.equal(model(images), before)


def test_a_deep_copy_carries_the_hooks_but_is_not_observed():
    model = tiny_vit()
    _, calls = tapped(model)
    copy.deepcopy(model)(batch()[0])
    assert calls == []


def test_leaving_the_context_and_removing_twice_take_every_hook_off():
    model = tiny_vit()
    tap, calls = tapped(model)
    with tap:
        model(batch()[0])
    tap.remove()
    model(batch()[0])
    assert len(calls) == 2
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_come_off_when_the_context_is_left_by_an_error():
    model = tiny_vit()
    with pytest.raises(KeyError), tapped(model)[0]:
        raise KeyError
    assert not any(module._forward_hooks for module in model.modules())


def test_no_blocks_is_an_error():
    with pytest.raises(ValueError, match="find_blocks"):
        BlockTap({}, lambda *_: None)


def test_a_block_that_returns_no_tensor_is_an_error_naming_it():
    class Pair(nn.Module):
        def forward(self, x):
            return None, x

    pair = Pair()
    BlockTap({"stage.3": pair}, lambda *_: None)
    with pytest.raises(TypeError, match=r"'stage\.3' \(Pair\) returned tuple.*blocks=REGEX"):
        pair(torch.zeros(1))
