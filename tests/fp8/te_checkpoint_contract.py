"""Contracts of activation checkpointing with NVIDIA's te.checkpoint, run by test_te.py in a process of its own.

NVIDIA's are: te.checkpoint, te.autocast, what a module does before and after its kernels (scales put aside and taken
up again, registration for updates), and when scales are updated. Ours, in place of the compiled kernels: the products,
the norms and the update of the scales.
"""

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from tests.fp8.te_contract import FP8GlobalStateManager, pretend_there_is_a_gpu, quantization, te  # noqa: F401
from tests.models import batch, tiny_maxvit, tiny_swin, tiny_task, tiny_vit
from tweo_timm import Fp8Recipe, TweoConfig, fp8_state, patch_fp8, unpatch_fp8
from tweo_timm.fp8.scaling import current_scale, delayed_update
from tweo_timm.task import attach_tweo

# After te_contract, which puts the stub in place.
from transformer_engine.pytorch import distributed  # isort: skip
from transformer_engine.pytorch.module.linear import _check_fp8_reduce_and_update  # isort: skip

TORCHS = torch.utils.checkpoint.checkpoint
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


def rounded(x, meta, direction, slot, dtype):
    """What the cast kernel does: round with the scale in force and record the maximum."""
    fp8_max, amax, state = torch.finfo(dtype).max, x.abs().amax(), meta[f"scaling_{direction}"]
    if meta["recipe"].delayed():
        state.amax_history[0, slot].clamp_(min=amax)
        scale = state.scale[slot].clone()
    else:
        scale = current_scale(amax, fp8_max=fp8_max, margin=0)
    return (x * scale).clamp(-fp8_max, fp8_max).to(dtype).float() / scale


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, module, gemm, x, weight):
        ctx.meta, ctx.gemm, ctx.updates = module.fp8_meta, gemm, _check_fp8_reduce_and_update()
        x, weight = (
            rounded(tensor, ctx.meta, "fwd", 3 * gemm + slot, FORWARD) for slot, tensor in enumerate((x, weight))
        )
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = rounded(dy, ctx.meta, "bwd", 2 * ctx.gemm, BACKWARD)
        if ctx.updates:
            FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)
        return None, None, dy @ weight, dy.T @ x


class OnGpu:
    """The input as a module looks at it before it runs its kernels."""

    is_cuda, dtype = True, torch.float32

    def is_contiguous(self):
        return True


def normed(module, x):
    shape = x.shape[-1:]
    return F.layer_norm(x, shape, module.layer_norm_weight, module.layer_norm_bias, module.eps)


def product(module, gemm, x, weight, bias):
    y = Product.apply(module, gemm, x, weight)
    return y + bias if module.use_bias else y


def linear(module, x):
    return product(module, 0, x, module.weight, module.bias)


def mlp(module, x):
    x = product(module, 0, normed(module, x), module.fc1_weight, module.fc1_bias)
    return product(module, 1, F.gelu(x, approximate="tanh"), module.fc2_weight, module.fc2_bias)


def kernels(compute, num_gemms):
    def forward(self, x):
        with self.prepare_forward_ctx(OnGpu(), num_gemms=num_gemms):
            return compute(self, x)

    return forward


def update_scales(amax, histories, scales, algorithm, dtype, margin):
    fp8_max = torch.finfo(FORWARD if dtype.name == "kFloat8E4M3" else BACKWARD).max
    for last, history, scale in zip(amax.split([s.numel() for s in scales]), histories, scales, strict=True):
        new_scale, new_history = delayed_update(
            scale, history, last, fp8_max=fp8_max, margin=margin, algorithm=algorithm
        )
        scale.copy_(new_scale)
        history.copy_(new_history)


@pytest.fixture(autouse=True)
def kernels_in_python(monkeypatch, pretend_there_is_a_gpu):  # noqa: F811
    monkeypatch.setattr(te.Linear, "forward", kernels(linear, 1))
    monkeypatch.setattr(te.LayerNormLinear, "forward", kernels(lambda m, x: linear(m, normed(m, x)), 1))
    monkeypatch.setattr(te.LayerNormMLP, "forward", kernels(mlp, 2))
    monkeypatch.setattr(te.LayerNorm, "forward", lambda m, x: F.layer_norm(x, x.shape[-1:], m.weight, m.bias, m.eps))
    monkeypatch.setattr(quantization.tex, "fused_amax_and_scale_update_after_reduction", update_scales, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(distributed, "_get_cuda_rng_state", lambda **_: None)
    monkeypatch.setattr(distributed, "_set_cuda_rng_state", lambda *_, **__: None)
    yield
    assert torch.utils.checkpoint.checkpoint is TORCHS


BUILDERS = {
    "vit": partial(tiny_vit, drop_path_rate=0.3),
    "vit with LayerNormMLP": partial(tiny_vit, act_layer=partial(nn.GELU, approximate="tanh")),
    "swin: flags on its stages": tiny_swin,
    "davit: stages and blocks nested": partial(
        timm.create_model, "davit_tiny", embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), num_classes=6
    ),
    "eva: keyword arguments": partial(timm.create_model, "eva02_tiny_patch14_224", img_size=28, depth=2, num_classes=6),
    "maxvit: convolutions in between": tiny_maxvit,
}
IMG_SIZES = {"eva: keyword arguments": 28, "maxvit: convolutions in between": 64}


def patched(build=tiny_vit, checkpointing=False, **recipe):
    torch.manual_seed(0)
    model = build().train()
    model.set_grad_checkpointing(checkpointing)
    patch_fp8(model, Fp8Recipe(**{"amax_history_len": 3, **recipe}))
    return model


def backward(model, *outputs):
    model.zero_grad()
    sum(output.square().sum() for output in outputs).backward()


def trace(model):
    """Gradients and FP8 state as one flat list, to compare bit for bit."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**gradients, **fp8_state(model)}


def assert_same(one, other):
    assert one.keys() == other.keys()
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different


def images(seed=0, img_size=32):
    return batch(2, img_size, seed)[0]


def train(model, steps=3, img_size=32):
    for seed in range(steps):
        torch.manual_seed(seed)
        backward(model, model(images(seed, img_size)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
    return trace(model)


def count_runs(model):
    """How often each converted layer runs."""
    runs = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, output: runs.append(torch.is_grad_enabled()))
    return runs


@pytest.mark.parametrize("name", BUILDERS)
def test_recomputation_changes_no_gradient_scale_or_history(name):
    img_size = IMG_SIZES.get(name, 32)
    plain, checkpointed = patched(BUILDERS[name]), patched(BUILDERS[name], checkpointing=True)
    runs, reruns = count_runs(plain), count_runs(checkpointed)
    assert_same(train(plain, img_size=img_size), train(checkpointed, img_size=img_size))
    assert len(reruns) > 1.5 * len(runs)  # or nothing would have been recomputed


def test_scales_have_moved_on_when_the_recomputation_asks_for_them():
    """Or the comparisons here would hold for a recomputation with any scales."""
    model = patched()
    before = fp8_state(model)
    model(images())
    after = fp8_state(model)
    assert not torch.equal(before["blocks.1.mlp.fc2.scaling_fwd.scale"], after["blocks.1.mlp.fc2.scaling_fwd.scale"])


def test_scales_are_reduced_and_updated_twice_a_step_and_not_by_recomputations(monkeypatch):
    updates = []
    reduce_and_update = FP8GlobalStateManager.reduce_and_update_fp8_tensors

    def counted(forward=True):
        updates.append(forward)
        reduce_and_update(forward=forward)

    monkeypatch.setattr(FP8GlobalStateManager, "reduce_and_update_fp8_tensors", counted)
    train(patched(checkpointing=True), steps=2)
    assert updates == [True, False] * 2


@pytest.mark.parametrize("recipe", [{"scaling": "current"}, {"amax_compute_algo": "most_recent"}], ids=str)
def test_recomputation_changes_nothing_under_other_recipes(recipe):
    assert_same(train(patched(**recipe)), train(patched(checkpointing=True, **recipe)))


def test_recomputation_is_not_reentrant_even_where_timm_is_told_so(monkeypatch):
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: True)
    checkpointed = patched(checkpointing=True)
    reruns = count_runs(checkpointed)
    assert_same(train(patched()), train(checkpointed))
    assert all(reruns)


def test_torchs_autocast_is_that_of_the_forward():
    plain, checkpointed = patched(), patched(checkpointing=True)
    enabled = []
    checkpointed.blocks[0].register_forward_hook(lambda *_: enabled.append(torch.is_autocast_enabled("cpu")))
    for model in (plain, checkpointed):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(images())
        backward(model, output.float())
    assert_same(trace(plain), trace(checkpointed))
    assert enabled == [True, True]


def test_switched_on_after_patching_and_off_again():
    plain, checkpointed = patched(), patched()
    checkpointed.set_grad_checkpointing(True)
    reruns = count_runs(checkpointed)
    for enable, per_step in ((True, 17), (False, 9)):
        checkpointed.set_grad_checkpointing(enable)
        reruns.clear()
        assert_same(train(plain, steps=1), train(checkpointed, steps=1))
        assert len(reruns) == per_step


def test_unpatched_model_checkpoints_with_torch_as_before():
    reference, model = tiny_vit(), patched(checkpointing=True)
    backward(model, model(images()))
    unpatch_fp8(model)
    reference.load_state_dict(model.state_dict())
    reference.train()
    called = []
    model.blocks[0].register_forward_pre_hook(lambda *_: called.append(torch.utils.checkpoint.checkpoint))
    for plain in (reference, model):
        backward(plain, plain(images()))
    gradients = zip(reference.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in gradients)
    assert called == [TORCHS, TORCHS]


def test_evaluation_checkpoints_with_torch():
    model = patched(checkpointing=True).eval()
    called = []
    model.blocks[0].register_forward_pre_hook(lambda *_: called.append(torch.utils.checkpoint.checkpoint))
    before = fp8_state(model)
    backward(model, model(images()))
    with torch.no_grad():
        model(images())
        model.train()(images())
    assert called == [TORCHS] * 4
    assert_same(before, fp8_state(model))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_without_a_backward_does_not_disturb_the_next_step(checkpointing):
    """Transformer Engine alone would recompute the second step with the first one's scales."""
    model = patched(checkpointing=checkpointing)
    model(images(1))
    backward(model, model(images(2)))
    plain = patched()
    plain(images(1))
    backward(plain, plain(images(2)))
    assert_same(trace(plain), trace(model))
    assert not any(FP8GlobalStateManager.quantization_state.fp8_tensors_recompute_buffer)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), None], ids=["in turn", "last first", "one backward"])
def test_several_forwards_before_their_backwards(order):
    traces = []
    for model in (patched(), patched(checkpointing=True)):
        outputs = [model(images(1)), model(images(2))]
        for index in order or ():
            backward(model, outputs[index])
        if order is None:
            backward(model, *outputs)
        traces.append(trace(model))
    assert_same(*traces)


class Interrupted(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()], ids=repr)
def test_interrupted_forward_leaves_nothing_behind_for_the_next_one(error):
    model = patched(checkpointing=True)
    dropout = model.blocks[1].mlp.drop2
    model.blocks[1].mlp.drop2 = Interrupted(error)
    with pytest.raises(type(error)):
        model(images(1))
    model.blocks[1].mlp.drop2 = dropout
    backward(model, model(images(2)))
    assert torch.utils.checkpoint.checkpoint is TORCHS
    assert not FP8GlobalStateManager.is_fp8_enabled()


def test_unpatching_after_an_interrupted_forward_gives_torchs_function_back():
    model = patched(checkpointing=True)
    model.head = Interrupted(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        model(images())
    unpatch_fp8(model)
    assert torch.utils.checkpoint.checkpoint is TORCHS
    assert not FP8GlobalStateManager.is_fp8_enabled()


def test_checkpoint_imported_by_name_is_refused_when_it_recomputes():
    model = patched()
    model.blocks[0].forward = partial(TORCHS, model.blocks[0].forward, use_reentrant=False)
    output = model(images())
    with pytest.raises(RuntimeError, match=r"imported by name recomputes on its own"):
        backward(model, output)


def test_exception_in_a_recomputation_leaves_no_scales_queued():
    model = patched(checkpointing=True)
    output = model(images())
    handle = model.blocks[1].mlp.fc2.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward(model, output)
    handle.remove()
    assert not any(FP8GlobalStateManager.quantization_state.fp8_tensors_recompute_buffer)
    assert torch.utils.checkpoint.checkpoint is TORCHS


@pytest.mark.parametrize("name", ["vit", "swin: flags on its stages", "davit: stages and blocks nested"])
@pytest.mark.parametrize("weight", [0.3, 0.0])
def test_penalty_and_its_gradient_are_the_same_when_blocks_are_recomputed(name, weight):
    results, traces = [], []
    for checkpointing in (False, True):
        task = tiny_task(patched(BUILDERS[name], checkpointing))
        handle = attach_tweo(task, TweoConfig(weight=weight, tau=0.8))
        for seed in range(2):
            torch.manual_seed(seed)
            task.zero_grad()
            result = task(*batch(2, seed=seed))
            result["loss"].backward()
        results.append({key: float(torch.as_tensor(result[key])) for key in ("loss", "tweo_loss", "peak_abs")})
        traces.append(trace(task.trainable_module) | {"peaks": handle.block_peaks})
    assert results[0] == results[1]
    assert results[0]["tweo_loss"] > 0
    assert_same(*traces)


def test_penalty_reaches_the_gradients_of_recomputed_blocks():
    """Or the two steps above would agree in having none."""
    traces = []
    for weight in (0.3, 0.0):
        task = tiny_task(patched(checkpointing=True))
        attach_tweo(task, TweoConfig(weight=weight, tau=0.8))
        task(*batch(2))["loss"].backward()
        traces.append(trace(task.trainable_module))
    assert not torch.equal(traces[0]["blocks.0.mlp.fc1.weight"], traces[1]["blocks.0.mlp.fc1.weight"])
