"""The stream in what a block returns: hand-made outputs, and the three families of timm whose blocks return tuples."""

import types
from typing import NamedTuple

import pytest
import timm
import torch
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.task import ClassificationTask
from torch import nn

from tests.quant.families import randomize
from tweo_timm import TweoConfig, attach_tweo, colinearity, find_blocks, quantize_static, record_outliers, tweo_loss
from tweo_timm.diagnose.sites import record_sites
from tweo_timm.quant.fidelity import fidelity
from tweo_timm.stream import stream_of, with_stream

A, B = torch.ones(1, 2, 3), torch.zeros(1, 2, 3)


class Named(NamedTuple):
    """A tuple with names, as some blocks return it."""

    stream: torch.Tensor
    size: tuple[int, int]


@pytest.mark.parametrize(
    "output",
    [A, (A, (1, 2)), [A, None], Named(A, (1, 2)), types.SimpleNamespace(last_hidden_state=A, attentions=B)],
    ids=["tensor", "tuple", "list", "named tuple", "transformers"],
)
def test_the_stream_is_the_tensor_the_first_or_the_last_hidden_state_and_can_be_replaced(output):
    assert stream_of(output) is A
    replaced = with_stream(output, B)
    assert type(replaced) is type(output)
    assert stream_of(replaced) is B
    assert stream_of(output) is A
    if isinstance(output, (tuple, list)):
        assert list(replaced[1:]) == list(output[1:])


@pytest.mark.parametrize("output", [(), ("x", A), {"x": A}, None, types.SimpleNamespace()])
def test_an_output_without_a_stream_is_refused(output):
    with pytest.raises(TypeError, match=rf"^returned {type(output).__name__}, and no tensor in it"):
        stream_of(output)


def mvitv2():
    return MultiScaleVit(MultiScaleVitCfg(depths=(1, 1), embed_dim=16), img_size=32, num_classes=10)


def tnt():
    sizes = {"embed_dim": 32, "inner_dim": 8, "depth": 2, "num_heads_inner": 2, "num_heads_outer": 2}
    return timm.create_model("tnt_s_patch16_224", img_size=32, num_classes=10, **sizes)


def coat():
    sizes = {"embed_dims": (16,) * 4, "serial_depths": (1,) * 4, "parallel_depth": 2, "mlp_ratios": (2,) * 4}
    return timm.create_model("coat_tiny", img_size=64, num_classes=10, **sizes)


IMAGES = {"mvitv2": 32, "tnt": 32, "coat": 64}
# Which elements of the tuple the blocks' own code adds to and hands on: read in timm's code, held here independently.
WRITTEN = {"mvitv2": (0,), "tnt": (1,), "coat": (1, 2, 3)}
NAMES = {"mvitv2": "stages.0.blocks.0", "tnt": "blocks.1", "coat": "parallel_blocks.1"}


@pytest.fixture(params=IMAGES)
def family(request):
    torch.manual_seed(0)
    model = randomize({"mvitv2": mvitv2, "tnt": tnt, "coat": coat}[request.param]()).eval()
    return request.param, model, torch.randn(4, 3, IMAGES[request.param], IMAGES[request.param])


def returned(model, images, name):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(out))
    model(images)
    handle.remove()
    return seen[0]


def test_peaks_of_blocks_that_return_tuples_are_those_of_what_they_write(family):
    kind, model, images = family
    with torch.no_grad():
        output = returned(model, images, NAMES[kind])
        with record_outliers(model) as recorder, record_sites(model, kinds=("block",)) as sites:
            model(images)
    expected = max(float(output[index].abs().max()) for index in WRITTEN[kind])
    for rows in (recorder.summary()["blocks"], sites.summary()["sites"]):
        found = {row["name"]: row for row in rows}
        assert found.keys() == find_blocks(model).keys()
        assert found[NAMES[kind]]["peak_abs"] == pytest.approx(expected, rel=1e-6)


def test_the_penalty_of_blocks_that_return_tuples_has_the_gradient_of_its_definition(family):
    kind, model, images = family
    config = TweoConfig(weight=0.5)
    task = ClassificationTask(model, nn.CrossEntropyLoss())
    handle = attach_tweo(task, config)
    task.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.eval()
    model.training = True
    for block in find_blocks(model).values():
        block.training = True
    result = task(images, torch.arange(4))
    result["loss"].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    handle.remove()
    model.zero_grad()
    streams = []
    hooks = [
        block.register_forward_hook(lambda m, args, out: streams.append(out)) for block in find_blocks(model).values()
    ]
    logits = model(images)
    for hook in hooks:
        hook.remove()
    loss = nn.functional.cross_entropy(logits, torch.arange(4))
    parts = [
        out if isinstance(out, torch.Tensor) else torch.cat([out[index] for index in WRITTEN[kind]], 1)
        for out in streams
    ]
    (loss + 0.5 * tweo_loss(parts, config)).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("suffix", ["+res", "+res+qwtblock", "+res+qwtlinear"])
def test_models_whose_blocks_return_tuples_are_quantized(family, suffix):
    _, model, images = family
    quantized = quantize_static(model, [images], f"w8a8-ct{suffix}")
    with torch.no_grad():
        y, y_q = model(images), quantized(images)
    assert 0 < float((y - y_q).norm() / y.norm()) < 0.2
    found = fidelity(model, quantized, images)
    rows = [row for row in found["layers"] if row["kind"] == "block"]
    assert [row["name"] for row in rows] == list(find_blocks(model))
    assert all(row["sqnr_db"] > 10 for row in rows)


def test_the_mlp_behind_a_peak_is_found_in_blocks_that_return_tuples():
    torch.manual_seed(0)
    model = randomize(mvitv2()).eval()
    record = colinearity(model, torch.randn(2, 3, 32, 32))
    assert record["mlp"].endswith("mlp")
