"""Runs the contract tests against Transformer Engine's pure-Python wheel, and, where there is a GPU, the real thing."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.task import ClassificationTask

from tests.models import tiny_vit
from tweo_timm import Fp8Recipe, TweoConfig, attach_tweo, check_fp8_ran, fp8_state, load_fp8_state, patch_fp8
from tweo_timm.fp8.te import obstacle

REQUIREMENTS = ["transformer_engine==2.20.2", "einops", "onnxscript", "onnx_ir"]
WITH_DEPENDENCIES = ["pydantic"]
SIZES = {"embed_dim": 64, "num_classes": 10}


@pytest.fixture(scope="module")
def te_site(tmp_path_factory):
    """A directory with the wheel; inside the environment it would look like a working installation."""
    site = tmp_path_factory.mktemp("te_site")
    for arguments in (["--no-deps", *REQUIREMENTS], WITH_DEPENDENCIES):
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target", str(site)]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.skip(f"the pure-Python wheel of Transformer Engine cannot be installed here: {done.stderr[-300:]}")
    return site


@pytest.mark.te
def test_contracts_hold_against_nvidias_python_layer(te_site):
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{te_site}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)  # what the caller asks of its own tests, coverage say
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        "tests/fp8/te_contract.py",
        "tests/fp8/te_checkpoint_contract.py",
    ]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


def test_reasons_why_transformer_engine_cannot_run(monkeypatch):
    assert "no unit scaling" in obstacle(Fp8Recipe(scaling="unit"))
    assert "no margin" in obstacle(Fp8Recipe(scaling="current", margin=1))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in obstacle(Fp8Recipe())


def needs_gpu(backend):
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    if torch.cuda.get_device_capability() < (8, 9):
        return "the GPU has no FP8 units (compute capability below 8.9)"
    return obstacle(Fp8Recipe()) if backend == "te" else None


@pytest.fixture(params=["native", "te"])
def backend(request):
    reason = needs_gpu(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def gpu_run(backend, steps, batch=16, resume=None, checkpointing=False):
    """Train a small ViT; returns losses, FP8 state and gradients of the last step."""
    model = tiny_vit(**SIZES).cuda()
    model.set_grad_checkpointing(checkpointing)
    patch_fp8(model, Fp8Recipe(backend=backend))
    if resume:
        load_fp8_state(model, resume)
    images, targets = torch.randn(batch, 3, 32, 32).cuda(), torch.randint(0, 10, (batch,)).cuda()
    losses = []
    for _ in range(steps):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images).float(), targets)
        loss.backward()
        losses.append(loss.item())
    check_fp8_ran(model)
    return losses, fp8_state(model), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [16, 8, 3], ids=lambda b: f"{b * 17}_tokens")
def test_gpu_backend_agrees_with_the_emulation(backend, batch):
    """Close scales, losses and gradients; odd token counts and a 10-class head included."""
    losses, state, gradients = gpu_run(backend, 4, batch)
    expected_losses, expected_state, expected_gradients = gpu_run("emulated", 4, batch)
    assert losses == pytest.approx(expected_losses, rel=0.02)
    for key, expected in expected_state.items():
        assert torch.allclose(state[key].cpu(), expected.cpu(), rtol=0.25), key
    for name, expected in expected_gradients.items():
        error = (gradients[name] - expected).norm() / expected.norm().clamp_min(1e-6)
        assert error < 0.25, name


@pytest.mark.gpu
def test_gpu_state_survives_a_resume(backend):
    _, state, _ = gpu_run(backend, 3)
    assert all(
        torch.equal(value.cpu(), state[key].cpu()) for key, value in gpu_run(backend, 0, resume=state)[1].items()
    )


@pytest.mark.gpu
def test_gpu_checkpointing_changes_nothing(backend):
    """Losses, scales and gradients; several steps, so that the recomputation meets scales that have moved on."""
    plain, recomputed = gpu_run(backend, 3), gpu_run(backend, 3, checkpointing=True)
    assert recomputed[0] == plain[0]
    for expected, found in zip(plain[1:], recomputed[1:], strict=True):
        for name, value in expected.items():
            assert torch.allclose(found[name].float(), value.float(), rtol=0.02, atol=1e-6), name


@pytest.mark.gpu
def test_gpu_checkpointing_keeps_the_penalty_and_its_gradient(backend):
    steps = []
    for checkpointing in (False, True):
        model = tiny_vit(**SIZES).cuda()
        patch_fp8(model, Fp8Recipe(backend=backend))
        model.set_grad_checkpointing(checkpointing)
        task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), device=torch.device("cuda"), verbose=False)
        attach_tweo(task, TweoConfig(weight=0.3, tau=0.8))
        task.train()
        images, targets = torch.randn(16, 3, 32, 32).cuda(), torch.randint(0, 10, (16,)).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            result = task(images, targets)
        result["loss"].backward()
        steps.append((result["tweo_loss"].item(), {name: p.grad for name, p in model.named_parameters()}))
    (penalty, gradients), (found_penalty, found_gradients) = steps
    assert found_penalty == pytest.approx(penalty, rel=1e-3)
    for name, expected in gradients.items():
        error = (found_gradients[name] - expected).norm() / expected.norm().clamp_min(1e-6)
        assert error < 0.02, name


@pytest.mark.gpu
def test_gpu_evaluation_leaves_state_alone(backend):
    model = tiny_vit(**SIZES).cuda()
    patch_fp8(model, Fp8Recipe(backend=backend))
    model(torch.randn(16, 3, 32, 32).cuda()).sum().backward()
    before = fp8_state(model)
    model.eval()
    with torch.inference_mode():
        model(100 * torch.randn(5, 3, 32, 32).cuda())
    assert all(torch.equal(before[key], value) for key, value in fp8_state(model).items())
