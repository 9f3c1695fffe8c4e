import copy
import re

import pytest
import timm
import torch
from torch import nn

from tests.models import SWIN, VIT, tiny_vit
from tweo_timm import Fp8Recipe, check_fp8_ran, fp8_state, patch_fp8, unpatch_fp8
from tweo_timm.fp8.backend import choose_backend
from tweo_timm.fp8.linear import Fp8Linear

FINE_SWIN = {**SWIN, "patch_size": 2, "embed_dim": 32, "depths": (1, 2)}
RUN = {
    "vit_tiny_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "beit_base_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT,
    "vit_small_patch16_dinov3": VIT,
    "swin_tiny_patch4_window7_224": FINE_SWIN,
    "swinv2_tiny_window8_256": FINE_SWIN,
    "swinv2_cr_tiny_ns_224": FINE_SWIN,
    "cait_xxs24_224": {**VIT, "patch_size": 16, "depth_token_only": 1},
    "xcit_nano_12_p16_224": {**VIT, "patch_size": 16, "num_heads": 2},
    "hiera_tiny_224": {"img_size": 64, "embed_dim": 32, "stages": (1, 1, 1, 1)},
    "maxvit_rmlp_nano_rw_256": {"img_size": 64, "embed_dim": (32, 32), "depths": (1, 1)},
}
INVENTORY = [f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")]
INVENTORY += [f"deit3_{size}_patch16_224" for size in ("small", "base", "large")]
INVENTORY += [f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base", "large")]
INVENTORY += ["swinv2_tiny_window8_256", "beit_base_patch16_224", "eva02_base_patch14_224", "vit_base_patch16_dinov3"]
INVENTORY += ["cait_xxs24_224", "xcit_small_12_p16_224", "hiera_tiny_224", "maxvit_tiny_tf_224"]


def linear_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def loss_of(model, images):
    output = model(images)
    return sum(o.float().square().mean() for o in (output if isinstance(output, tuple) else (output,)))


@pytest.mark.parametrize("name", INVENTORY)
def test_every_linear_of_the_zoo_is_converted_and_nothing_is_renamed(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    names, keys, parameters = linear_names(model), list(model.state_dict()), dict(model.named_parameters())
    report = patch_fp8(model, Fp8Recipe(backend="emulated"))
    assert list(report.converted) == names
    assert report.skipped == {}
    assert any(n.startswith("head") for n in report.converted) or model.num_classes == 0
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[n] for n, parameter in model.named_parameters())
    unpatch_fp8(model)
    assert not any(isinstance(module, Fp8Linear) for module in model.modules())


@pytest.mark.parametrize("name", RUN)
def test_architecture_trains_in_every_layer_with_an_optimizer_built_before_and_unpatch_restores_it(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **RUN[name]).train()
    size = RUN[name]["img_size"]
    images = torch.randn(2, 3, size, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.eval()
    before = model(images)
    report = patch_fp8(model, Fp8Recipe(backend="emulated"))
    model.train()
    loss_of(model, images).backward()  # raises if a converted layer did not run
    check_fp8_ran(model)
    assert len(report.converted) == len(linear_names(model))
    gradients = {n: p.grad for n, p in model.named_parameters() if n.removesuffix(".weight") in report.converted}
    assert all(g is not None for g in gradients.values())
    head = model.get_submodule(report.converted[-1])
    head.weight.grad.fill_(1.0)  # it may be zero at a zero initialisation
    expected = head.weight.detach() - 0.1
    optimizer.step()
    assert torch.equal(head.weight, expected)

    fresh = timm.create_model(name, num_classes=10, **RUN[name]).eval()
    unpatch_fp8(model)
    fresh.load_state_dict(model.state_dict())
    model.eval()
    assert torch.equal(model(images), fresh(images))
    assert before.shape == model(images).shape


def test_unpatch_restores_modules_flags_and_hooks_by_identity():
    model = timm.create_model("beit_base_patch16_224", num_classes=4, **VIT)
    modules = dict(model.named_modules())
    patch_fp8(model, Fp8Recipe(backend="emulated"))
    assert all(block.attn.qkv_bias_separate for block in model.blocks)
    calls = []
    handle = model.blocks[0].attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    model.eval()
    unpatch_fp8(model)
    assert dict(model.named_modules()) == modules
    assert not any(block.attn.qkv_bias_separate for block in model.blocks)
    assert not any(module.training for module in model.modules())
    model.blocks[0].attn.qkv(torch.randn(1, 32))
    assert calls == [1]
    handle.remove()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_layer_used_in_two_places_stays_one_layer():
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.GELU(), nn.Sequential(shared))
    report = patch_fp8(model, Fp8Recipe())
    assert report.converted == ("0",)
    assert model[0] is model[2][0]
    gradients = []

    def watch(module, args, output):
        output.register_hook(gradients.append)

    shared_output = model[0].register_forward_hook(watch)
    model(torch.randn(2, 16)).square().sum().backward()
    shared_output.remove()
    assert len(gradients) == 2
    expected = max(gradient.abs().max() for gradient in gradients)
    assert fp8_state(model)["0.scaling_bwd.amax_history"].max() == expected
    unpatch_fp8(model)
    assert model[0] is model[2][0] is shared


def test_layer_under_two_names_of_one_parent_is_replaced_in_both():
    model = nn.Module()
    model.a = model.b = nn.Linear(16, 16)
    patch_fp8(model)
    assert model.a is model.b
    assert isinstance(model.b, Fp8Linear)


def test_attention_whose_qkv_is_excluded_keeps_its_flag():
    model = timm.create_model("beit_base_patch16_224", num_classes=4, **VIT)
    patch_fp8(model, Fp8Recipe(exclude=["qkv"]))
    assert not any(block.attn.qkv_bias_separate for block in model.blocks)


def test_include_and_exclude_leave_layers_alone_and_the_report_says_why():
    model = tiny_vit()
    report = patch_fp8(model, Fp8Recipe(include=[r"blocks", "head"], exclude=[r"head", r"\.1\.mlp"]))
    assert report.skipped.keys() == {"head", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"}
    assert "exclude pattern 'head'" in report.skipped["head"]
    assert "6 linear layers converted, 3 Linear layers skipped, backend emulated" in str(report)
    assert "left alone: head" in str(report)
    assert type(model.head) is nn.Linear


def test_zero_conversions_is_an_error():
    model = tiny_vit()
    with pytest.raises(ValueError, match=r"no layer of VisionTransformer was converted.*exclude pattern"):
        patch_fp8(model, Fp8Recipe(exclude=["."]))
    with pytest.raises(ValueError, match="no layer of Conv2d"):
        patch_fp8(nn.Conv2d(3, 3, 1))


def test_second_patch_and_unpatch_of_a_plain_model_are_errors():
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ValueError, match="not in FP8"):
        unpatch_fp8(model)
    patch_fp8(model)
    with pytest.raises(ValueError, match="already in FP8"):
        patch_fp8(nn.Sequential(model))


def test_scripted_model_is_refused():
    class Scripted(torch.jit.ScriptModule):
        pass

    with pytest.raises(TypeError, match="scripted"):
        patch_fp8(nn.Sequential(Scripted(), nn.Linear(16, 16)))


@pytest.mark.parametrize("backend", ["native", "te"])
def test_backend_that_cannot_run_is_an_error_with_a_remedy(backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=rf"'{backend}' cannot run: .*compute capability 8\.9.*backend='emulated'"):
        patch_fp8(nn.Sequential(nn.Linear(16, 16)), Fp8Recipe(backend=backend))


@pytest.mark.parametrize(
    ("device", "capability", "chosen", "reason"),
    [
        ("cuda", (9, 0), "native", "te: .*not installed"),
        ("cuda", (8, 0), "emulated", "compute capability 8.0"),
        ("cpu", (9, 0), "emulated", "the model is on cpu"),
    ],
)
def test_auto_takes_the_first_backend_that_runs_and_says_why(device, capability, chosen, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    name, why = choose_backend(Fp8Recipe(), torch.device(device))
    assert name == chosen
    assert re.search(reason, why)


def test_subclass_whose_forward_may_differ_is_left_alone_with_a_reason():
    class Odd(nn.Linear):
        pass

    model = nn.Sequential(Odd(16, 16), nn.Linear(16, 16), nn.MultiheadAttention(16, 2))
    report = patch_fp8(model)
    assert report.converted == ("1",)
    assert "Odd is a subclass" in report.skipped["0"]
    assert "2 is a torch.nn.MultiheadAttention" in report.skipped["2.out_proj"]
    assert "2 is a torch.nn.MultiheadAttention" in report.skipped["2.in_proj_weight"]
    assert "1 linear layers converted, 3 Linear layers skipped" in str(report)


def test_layer_whose_weight_is_used_without_calling_it_is_found_after_the_first_forward():
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.bypassed = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return nn.functional.linear(self.used(x), self.bypassed.weight)

    model = Bypass()
    patch_fp8(model)
    with pytest.raises(RuntimeError, match="no training forward"):
        check_fp8_ran(model)
    with pytest.raises(RuntimeError, match=r"1 converted layers did not run .*\['bypassed'\].*exclude"):
        model(torch.randn(2, 16))


def test_patched_checkpoint_is_a_plain_timm_checkpoint():
    model = tiny_vit(num_classes=4)
    patch_fp8(model)
    loss_of(model, torch.randn(2, 3, 32, 32)).backward()
    plain = tiny_vit(num_classes=4)
    plain.load_state_dict(model.state_dict(), strict=True)
    patched_copy = copy.deepcopy(model)
    patched_copy.load_state_dict(plain.state_dict(), strict=True)


def test_a_layer_put_in_place_after_the_patch_is_not_taken_out_with_it():
    model = tiny_vit(depth=1)
    qkv = model.blocks[0].attn.qkv
    patch_fp8(model)
    model.reset_classifier(10)
    head = model.head
    unpatch_fp8(model)
    assert model.head is head
    assert model.blocks[0].attn.qkv is qkv


@pytest.mark.parametrize("shape", [(4, 64), (2, 3, 31), (4, 0)])
def test_an_input_of_another_width_is_an_error_as_in_a_plain_linear(shape):
    model = nn.Sequential(nn.Linear(32, 8))
    with pytest.raises(RuntimeError):
        model(torch.ones(shape))
    patch_fp8(model)
    with pytest.raises(RuntimeError, match="32 features"):
        model(torch.ones(shape))
