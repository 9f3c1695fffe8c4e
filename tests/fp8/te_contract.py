"""Contracts with NVIDIA's own Python layer, run by test_te.py in a process of its own.

The compiled extension is replaced by a stub in which every name exists and every call raises, so construction,
parameters, state, copies and contexts are NVIDIA's own code, and kernels are not. The stub edits sys.modules and
pretends that there is a GPU: never import this file in another process than that.
"""

import copy
import dataclasses
import enum
import os
import sys
import types
from functools import partial

import pytest
import torch
from torch import nn

os.environ["NVTE_PROJECT_BUILDING"] = "1"


class _Name:
    """A name of the compiled extension: comparable and hashable, and not callable."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return _names.setdefault(f"{self._name}.{attribute}", _Name(f"{self._name}.{attribute}"))

    def __call__(self, *args, **kwargs):
        raise RuntimeError(f"{self._name} needs the compiled extension")

    def __int__(self):
        return 0


_names = {}


class _Extension(types.ModuleType):
    # The enums whose members the Python layer mirrors and checks at import.
    DType = enum.IntEnum(
        "DType",
        ["kByte", "kInt32", "kFloat32", "kFloat16", "kBFloat16", "kFloat8E4M3", "kFloat8E5M2", "kFloat4E2M1"],
        start=0,
    )
    NVTE_Fused_Attn_Backend = enum.IntEnum(
        "NVTE_Fused_Attn_Backend",
        {f"NVTE_{name}": value for name, value in (("No_Backend", -1), ("F16_arbitrary_seqlen", 1), ("FP8", 2))},
    )

    def __getattr__(self, attribute):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return _names.setdefault(attribute, _Name(attribute))


def _load_stub(framework):
    sys.modules["transformer_engine_torch"] = _Extension("transformer_engine_torch")


import transformer_engine.common  # noqa: E402

transformer_engine.common.load_framework_extension = _load_stub
import timm  # noqa: E402
import transformer_engine.pytorch as te  # noqa: E402
from timm.layers import LayerNorm2d  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402
from transformer_engine.common import recipe as te_recipes  # noqa: E402
from transformer_engine.pytorch import quantization  # noqa: E402
from transformer_engine.pytorch.quantization import DelayedScalingRecipeState, FP8GlobalStateManager  # noqa: E402

from tests.models import VIT, tiny_swin  # noqa: E402
from tweo_timm import (  # noqa: E402
    Fp8Recipe,
    check_fp8_ran,
    fp8_state,
    load_fp8_state,
    patch_fp8,
    unpatch_fp8,
)
from tweo_timm.fp8 import patch  # noqa: E402
from tweo_timm.fp8 import te as backend  # noqa: E402


@pytest.fixture(autouse=True)
def pretend_there_is_a_gpu(monkeypatch):
    """Construction and state on the CPU: buffers that would be allocated on the GPU are allocated here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(patch, "choose_backend", lambda recipe, device: ("te", "contract test"))
    monkeypatch.setattr(quantization, "check_fp8_support", lambda: (True, ""))
    create = DelayedScalingRecipeState.__init__

    def on_cpu(self, *args, **kwargs):
        create(self, *args, **{**kwargs, "device": torch.device("cpu")})

    monkeypatch.setattr(DelayedScalingRecipeState, "__init__", on_cpu)
    yield
    FP8GlobalStateManager.reset()


def tiny_vit(name="vit_tiny_patch16_224", **kwargs):
    return timm.create_model(name, **{**VIT, "num_classes": 10, **kwargs})


def hidden_kinds(model):
    return {name: hidden.kind for name, hidden in patch.patch_of(model).region.hidden.items()}


def test_every_recipe_field_we_pass_exists_and_arrives():
    built = backend.build_recipe(Fp8Recipe(amax_history_len=16, margin=1, amax_compute_algo="most_recent"))
    assert type(built) is te_recipes.DelayedScaling
    assert (built.amax_history_len, built.margin, built.amax_compute_algo) == (16, 1, "most_recent")
    assert built.fp8_format == te_recipes.Format.HYBRID
    assert built.reduce_amax
    assert backend.build_recipe(Fp8Recipe(format="e4m3")).fp8_format == te_recipes.Format.E4M3
    assert type(backend.build_recipe(Fp8Recipe(scaling="current"))) is te_recipes.Float8CurrentScaling


def test_misspelt_field_would_be_ignored_by_transformer_engine_which_is_why_we_check():
    te_recipes.DelayedScaling(override_linear_precision=(True, True, True))
    assert "override_linear_precision" not in {field.name for field in dataclasses.fields(te_recipes.DelayedScaling)}


def test_fused_and_plain_kinds_of_a_vit():
    model = tiny_vit()
    report = patch_fp8(model)
    kinds = hidden_kinds(model)
    for block in ("blocks.0", "blocks.1"):
        assert kinds[f"{block}.attn.qkv"] == kinds[f"{block}.mlp.fc1"] == "LayerNormLinear"
        assert kinds[f"{block}.attn.proj"] == kinds[f"{block}.mlp.fc2"] == "Linear"
    assert kinds["norm"] == "LayerNorm"
    assert kinds["head"] == "Linear"
    assert len(report.converted) == 9


def test_swin_fuses_its_second_norm_and_its_reductions_only():
    model = tiny_swin(patch_size=2, embed_dim=32)
    patch_fp8(model)
    kinds = hidden_kinds(model)
    assert kinds["layers.0.blocks.0.norm1"] == "LayerNorm"
    assert kinds["layers.0.blocks.0.attn.qkv"] == "Linear"
    assert kinds["layers.0.blocks.0.mlp.fc1"] == "LayerNormLinear"
    assert kinds["layers.1.downsample.reduction"] == "LayerNormLinear"


def test_whole_mlp_is_fused_only_for_the_tanh_gelu():
    model = tiny_vit(act_layer=partial(nn.GELU, approximate="tanh"))
    patch_fp8(model)
    assert hidden_kinds(model)["blocks.0.mlp"] == "LayerNormMLP"
    hidden = patch.patch_of(model).region.hidden["blocks.0.mlp"]
    module = hidden.build()
    assert module.fc1_weight is model.blocks[0].mlp.fc1.weight
    assert module.layer_norm_bias is model.blocks[0].norm2.bias
    assert module.eps == model.blocks[0].norm2.eps


def test_names_parameters_and_state_dict_stay_those_of_timm():
    model = tiny_vit()
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    patch_fp8(model)
    fp8_state(model)  # builds every hidden module and its FP8 metadata
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert isinstance(model.head, nn.Linear)
    assert {id(p) for p in model.parameters()} == {id(p) for group in optimizer.param_groups for p in group["params"]}
    tiny_vit().load_state_dict(model.state_dict(), strict=True)


def test_hidden_modules_hold_the_very_parameters_of_the_model():
    model = tiny_vit()
    patch_fp8(model)
    hidden = patch.patch_of(model).region.hidden
    fused = hidden["blocks.0.attn.qkv"].build()
    assert isinstance(fused, te.LayerNormLinear)
    assert fused.weight is model.blocks[0].attn.qkv.weight
    assert fused.bias is model.blocks[0].attn.qkv.bias
    assert fused.layer_norm_weight is model.blocks[0].norm1.weight
    assert fused.eps == 1e-6
    model.blocks[0].attn.qkv.weight = nn.Parameter(torch.zeros(96, 32))
    assert hidden["blocks.0.attn.qkv"].build().weight is model.blocks[0].attn.qkv.weight


def test_layer_with_dimensions_hardware_refuses_computes_on_padded_parameters():
    model = tiny_vit()
    patch_fp8(model)
    module = patch.patch_of(model).region.hidden["head"].build()
    assert (module.in_features, module.out_features) == (32, 16)
    assert module.weight.shape == (16, 32)
    assert torch.equal(module.weight[:10], model.head.weight)
    assert not module.weight[10:].any()
    (module.weight.sum() + module.bias.sum()).backward()
    assert torch.equal(model.head.weight.grad, torch.ones(10, 32))
    assert torch.equal(model.head.bias.grad, torch.ones(10))


def test_tokens_are_padded_with_rows_that_get_no_gradient():
    model = tiny_vit()
    patch_fp8(model)
    hidden = patch.patch_of(model).region.hidden["head"]
    seen = []

    class Recorder:
        def __call__(self, rows):
            seen.append(rows)
            return rows[:, :16] * 2

    hidden.build = lambda: Recorder()
    x = torch.randn(3, 5, 32, requires_grad=True)
    out = hidden.run(x, 10)
    assert out.shape == (3, 5, 10)
    assert seen[0].shape == (16, 32)
    assert torch.equal(seen[0][15], x[2, 4])
    out.sum().backward()
    assert torch.equal(x.grad[..., :10], torch.full((3, 5, 10), 2.0))


def test_state_is_plain_tensors_and_goes_back_into_transformer_engines_own_buffers():
    model = tiny_vit()
    patch_fp8(model, Fp8Recipe(amax_history_len=4))
    state = fp8_state(model)
    assert state["head.scaling_fwd.amax_history"].shape == (4, 2)
    assert state["head.scaling_bwd.scale"].tolist() == [1.0]
    changed = {key: torch.rand_like(value) for key, value in state.items()}
    load_fp8_state(model, changed)
    assert all(torch.equal(fp8_state(model)[key], value) for key, value in changed.items())
    buffers = patch.patch_of(model).region.hidden["head"].module.fp8_meta
    assert torch.equal(buffers["scaling_fwd"].scale[:2], changed["head.scaling_fwd.scale"])
    assert buffers["scaling_fwd"].scale[2] == 1  # the unused output slot


def test_state_keys_are_those_of_the_other_backends(monkeypatch):
    model, other = tiny_vit(), tiny_vit()
    patch_fp8(model)
    monkeypatch.setattr(patch, "choose_backend", lambda recipe, device: ("emulated", ""))
    patch_fp8(other)
    expected = {key: value.shape for key, value in fp8_state(other).items()}
    assert {key: value.shape for key, value in fp8_state(model).items()} == expected
    load_fp8_state(other, fp8_state(model))


def test_copies_start_without_hidden_modules_and_ema_survives():
    model = tiny_vit()
    patch_fp8(model)
    fp8_state(model)
    ema = ModelEmaV3(model)
    copied = patch.patch_of(ema.module).region
    assert copied is not patch.patch_of(model).region
    assert all(hidden.module is None for hidden in copied.hidden.values())
    assert copied.hidden["head"].parameters["weight"][0] is ema.module.head
    ema.update(model)
    assert ema.module(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_evaluation_is_the_original_forward_bit_for_bit_and_touches_no_state():
    model = tiny_vit().eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    patch_fp8(model)
    before = fp8_state(model)
    assert torch.equal(model(images), expected)
    assert all(torch.equal(before[key], value) for key, value in fp8_state(model).items())
    modules = dict(copy.deepcopy(model).named_modules())
    unpatch_fp8(model)
    assert torch.equal(model(images), expected)
    assert [type(m) for m in model.modules()] != [type(m) for m in modules.values()]
    assert type(model.head) is nn.Linear


def test_one_autocast_surrounds_the_training_forward_and_is_left_even_after_an_error():
    model = tiny_vit()
    patch_fp8(model)
    manager = FP8GlobalStateManager
    inside = []
    model.patch_embed.register_forward_hook(lambda *_: inside.append(manager.is_fp8_enabled()))
    with pytest.raises(Exception):  # noqa: B017, PT011  the first kernel call raises whatever the stub provokes
        model(torch.randn(2, 3, 32, 32))
    assert inside == [True]
    assert not manager.is_fp8_enabled()
    with pytest.raises(RuntimeError, match="no training forward"):
        check_fp8_ran(model)
    model.eval()(torch.randn(2, 3, 32, 32))
    assert inside == [True, False]


def test_layer_trained_outside_the_forward_of_the_model_is_refused_with_the_reason():
    model = tiny_vit()
    patch_fp8(model)
    with pytest.raises(RuntimeError, match=r"outside the forward.*te\.autocast.*call the model itself"):
        model.blocks[0](torch.randn(1, 4, 32))


def test_norm_over_channels_first_is_left_alone():
    model = timm.create_model("davit_tiny", embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), num_classes=10)
    patch_fp8(model)
    assert hidden_kinds(model)["stages.0.blocks.0.0.norm1"] == "LayerNorm"
    assert type(model.stem.norm) is type(model.head.norm) is LayerNorm2d
