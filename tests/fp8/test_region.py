"""When scales move, when they must not, and what travels with a run."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests import models
from tests.needed import dynamos_own, needs
from tweo_timm import Fp8Recipe, fp8_state, load_fp8_state, patch_fp8
from tweo_timm.needs import lacking


def tiny_vit(recipe=None, **kwargs):
    model = models.tiny_vit(num_classes=10, **kwargs)
    patch_fp8(model, recipe or Fp8Recipe(amax_history_len=4))
    return model


def batch(step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(4, 3, 32, 32, generator=generator) * (1 + step)
    return images, torch.randint(0, 10, (4,), generator=generator)


def train(model, steps, forward=None, autocast=True):
    """Plain SGD; returns the losses."""
    forward = model if forward is None else forward
    losses = []
    for step in steps:
        images, targets = batch(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(forward(images).float(), targets)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return losses


def assert_same_training(a, b):
    for expected, actual in ((fp8_state(a), fp8_state(b)), (a.state_dict(), b.state_dict())):
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_scales_are_those_of_the_largest_operands_seen():
    """Input, weight and gradient of the head, watched from outside the layer."""
    model = tiny_vit()
    seen = {}
    model.head.register_forward_hook(lambda module, args, output: seen.update(x=args[0].detach().abs().max()))
    model.register_forward_hook(
        lambda module, args, output: output.register_hook(lambda g: seen.update(dy=g.abs().max())) and None
    )
    for step in range(3):
        seen["w"] = model.head.weight.detach().abs().max()
        train(model, [step], autocast=False)
        state = fp8_state(model)
        assert state["head.scaling_fwd.amax_history"][-1].tolist() == [seen["x"], seen["w"]]
        assert state["head.scaling_bwd.amax_history"][-1].tolist() == [seen["dy"]]
        largest = state["head.scaling_fwd.amax_history"].amax(0)
        assert torch.equal(state["head.scaling_fwd.scale"], torch.full((2,), 448.0).div(largest))


def test_histories_roll_once_a_step():
    model = tiny_vit()
    for step in range(3):
        train(model, [step])
        for direction in ("fwd", "bwd"):
            history = fp8_state(model)[f"blocks.0.mlp.fc1.scaling_{direction}.amax_history"]
            assert ((history != 0).sum(0) == step + 1).all()


def test_evaluation_neither_reads_nor_writes_training_state():
    trained, untouched = tiny_vit(), tiny_vit()
    untouched.load_state_dict(trained.state_dict())
    train(trained, range(2))
    before = fp8_state(trained)
    untouched.load_state_dict(trained.state_dict())
    images = batch(7)[0] * 100
    trained.eval()
    untouched.eval()
    assert torch.equal(trained(images), untouched(images))
    with torch.no_grad():
        trained.train()(images)
    assert all(torch.equal(before[key], value) for key, value in fp8_state(trained).items())


def test_evaluation_between_forward_and_backward_does_not_disturb_the_step():
    plain, interrupted = tiny_vit(), tiny_vit()
    for model in (plain, interrupted):
        model.set_grad_checkpointing(True)
        images, targets = batch(0)
        loss = F.cross_entropy(model(images), targets)
        if model is interrupted:
            model.eval()
            with torch.no_grad():
                model(images * 50)
            model.train()
        loss.backward()
    gradients = zip(plain.parameters(), interrupted.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in gradients)
    assert_same_training(plain, interrupted)


def test_interrupted_step_leaves_no_trace_in_the_region():
    model, images = tiny_vit(), batch(0)[0]
    with pytest.raises(AssertionError):
        model(images[:, :, :8])
    model.eval()
    model(images)
    train(model.train(), range(2))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(use_reentrant):
    """The recomputation meets scales that have moved on, and must neither use them nor count a maximum twice."""
    plain, recomputed = tiny_vit(), tiny_vit()
    for block in recomputed.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=use_reentrant)
    assert train(plain, range(4)) == train(recomputed, range(4))
    assert_same_training(plain, recomputed)


def test_checkpointed_backward_over_two_forwards_is_refused_when_scales_differ():
    model = tiny_vit()
    model.set_grad_checkpointing(True)
    first, second = model(batch(0)[0]), model(batch(1)[0])
    with pytest.raises(RuntimeError, match="one backward spans several forwards"):
        (first.sum() + second.sum()).backward()
    train(model, range(1))


def test_two_forwards_then_two_checkpointed_backwards_each_use_their_own_scales():
    plain, recomputed = tiny_vit(), tiny_vit()
    recomputed.set_grad_checkpointing(True)
    for model in (plain, recomputed):
        train(model, range(1))
        first, second = model(batch(1)[0]), model(batch(2)[0])
        first.sum().backward()
        second.sum().backward()
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_each_micro_batch_of_an_accumulation_is_one_region():
    model = tiny_vit()
    for step in range(3):
        F.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
    history = fp8_state(model)["head.scaling_bwd.amax_history"]
    assert ((history != 0).sum(0) == 3).all()


def test_training_a_layer_outside_the_patched_model_is_an_error():
    model = tiny_vit()
    with pytest.raises(RuntimeError, match=r"'blocks\.0\.attn\.qkv' was trained outside.*call the model itself"):
        model.forward_features(batch(0)[0])
    model.eval()
    assert model.forward_features(batch(0)[0]).isfinite().all()


def test_outputs_nested_in_containers_still_end_the_backward():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x):
            return {"out": [self.a(x), None], "n": 3}

    model = Nested()
    patch_fp8(model)
    model(torch.randn(2, 16))["out"][0].sum().backward()
    assert fp8_state(model)["a.scaling_bwd.scale"].item() == 57344.0


@pytest.mark.parametrize("scaling", ["delayed", "current", "unit"])
def test_resume_in_the_middle_is_bit_identical(scaling, tmp_path):
    recipe = Fp8Recipe(scaling=scaling, amax_history_len=3)
    straight, interrupted = tiny_vit(recipe), tiny_vit(recipe)
    losses = train(straight, range(6))
    train(interrupted, range(3))
    torch.save({"model": interrupted.state_dict(), "fp8": fp8_state(interrupted)}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = tiny_vit(recipe)
    resumed.load_state_dict(saved["model"])
    load_fp8_state(resumed, saved["fp8"])
    assert train(resumed, range(3, 6)) == losses[3:]
    assert_same_training(straight, resumed)


def test_state_of_another_model_or_history_is_refused():
    model = tiny_vit()
    state = fp8_state(model)
    with pytest.raises(ValueError, match=r"1 entries missing, such as \['head.scaling_fwd.scale'\]"):
        load_fp8_state(model, {key: value for key, value in state.items() if key != "head.scaling_fwd.scale"})
    with pytest.raises(ValueError, match="belong to no layer here"):
        load_fp8_state(model, {**state, "neck.scaling_fwd.scale": torch.ones(2)})
    with pytest.raises(ValueError, match=r"shape \(4, 2\), this run needs \(8, 2\).*amax_history_len"):
        load_fp8_state(tiny_vit(Fp8Recipe(amax_history_len=8)), state)
    with pytest.raises(ValueError, match="belong to no layer"):
        load_fp8_state(tiny_vit(Fp8Recipe(scaling="unit")), state)


def test_loading_state_does_not_write_into_tensors_held_by_a_pending_backward():
    model = tiny_vit()
    train(model, range(2))
    state = fp8_state(model)
    output = model(batch(2)[0])
    load_fp8_state(model, state)
    output.sum().backward()


def test_ema_copy_lives_its_own_life():
    model, reference = tiny_vit(), tiny_vit()
    ema = ModelEmaV3(model, decay=0.5)
    for step in range(3):
        train(model, [step])
        ema.update(model)
        ema(batch(9)[0] * 1000)
    train(reference, range(3))
    assert_same_training(reference, model)
    assert ema.module.head._fp8_site.region is not model.head._fp8_site.region
    late = copy.deepcopy(model)
    train(late, [5])
    assert_same_training(reference, model)
    train(model, [5])
    assert_same_training(model, late)


def test_state_is_found_through_wrappers_and_follows_the_model_from_meta():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16))
        patch_fp8(model)
    model = model.to_empty(device="cpu")
    nn.init.ones_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    model(torch.ones(2, 16)).sum().backward()
    assert fp8_state(nn.Sequential(model))["0.scaling_fwd.scale"].tolist() == [448.0, 448.0]


@needs("compiled fp8")
@dynamos_own
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_training_is_one_graph_and_bit_identical(checkpointing):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager, compiled = tiny_vit(), tiny_vit()
    for model in (eager, compiled):
        model.set_grad_checkpointing(checkpointing)
    losses = train(eager, range(3))
    assert train(compiled, range(3), forward=torch.compile(compiled, backend="aot_eager")) == losses
    assert_same_training(eager, compiled)
    if not lacking("whole fp8 graph"):
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]


@needs("compiled fp8")
@dynamos_own
@pytest.mark.slow
def test_inductor_trains_as_eager_does_to_its_own_rounding():
    torch._dynamo.reset()
    eager, compiled = tiny_vit(), tiny_vit()
    losses = train(eager, range(3))
    assert train(compiled, range(3), forward=torch.compile(compiled)) == pytest.approx(losses, rel=0.02)


class Checkpointed(torch.nn.Module):
    """Calls a whole model under an activation checkpoint."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images):
        return checkpoint(self.backbone, images, use_reentrant=False)


def test_a_checkpoint_around_the_patched_model_changes_nothing():
    plain, inside = tiny_vit(), tiny_vit()
    assert train(plain, range(4)) == train(Checkpointed(inside), range(4))
    assert_same_training(plain, inside)


def test_a_backward_that_an_exception_ended_leaves_nothing_to_an_evaluation():
    model, images = tiny_vit(), batch(0)[0]
    train(model, range(3))
    model.eval()
    expected = model(20 * images)
    model.train()

    def interrupt(gradient):
        raise KeyboardInterrupt

    output = model(images)
    handle = model.blocks[0].mlp.fc1.weight.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        output.sum().backward()
    handle.remove()
    model.eval()
    assert torch.equal(model(20 * images), expected)


def test_a_loss_that_does_not_pass_through_the_output_moves_the_gradients_scales():
    model, images = tiny_vit(), batch(0)[0]
    kept = []
    model.blocks[1].register_forward_hook(lambda block, args, output: kept.append(output))
    for _ in range(3):
        model.zero_grad()
        model(images)
        (1e-4 * kept.pop().square().mean()).backward()
    assert float(fp8_state(model)["blocks.0.attn.qkv.scaling_bwd.scale"]) > 1
    assert float(model.blocks[0].attn.qkv.weight.grad.norm()) > 0
