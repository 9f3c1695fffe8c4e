"""Distillation: the teacher is the trained model, sees what it was trained on, and is refused otherwise."""

import signal

import pytest
import timm
import torch
from timm.models import save_for_hf

from tests.train.runs import TINY, VIT, command, last, rows, same_tensors, session_of, train
from tweo_timm.train.cli import main


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A function that writes a trained model as timm publishes it, and returns its name."""

    def write(arch="resnet10t", num_classes=3, size=32, **settings):
        folder = tmp_path_factory.mktemp("teacher")
        torch.manual_seed(1)
        shape = (settings.get("in_chans", 3), size, size)
        trained = {"num_classes": num_classes, "input_size": shape, "mean": (0.1,) * 3, "std": (0.9,) * 3}
        model = timm.create_model(arch, num_classes=num_classes, pretrained_cfg_overlay=trained, **settings)
        save_for_hf(model, folder, model_args=settings or None)
        return f"local-dir:{folder}"

    return write


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["logit", "feature", "token"])
def test_distillation_trains_the_student_with_tweo(kind, dtype, images, tmp_path, teachers):
    name = "deit_tiny_distilled_patch16_224" if kind == "token" else "vit_tiny_patch16_224"
    model = ["--model", name, "--model-kwargs", *TINY, "--num-classes", "3", "--input-size", "3", "32", "32"]
    words = ("--kd-model-name", teachers(), "--kd-distill-type", kind, "--epochs", "1", "--tweo-weight", "0.1")
    folder = train(images, tmp_path, *words, "--model-dtype", dtype, model=model)
    assert {row["block"] for row in rows(folder)} == {"blocks.0", "blocks.1"}


@pytest.mark.parametrize("kind", ["logit", "feature", "token"])
def test_the_teacher_sees_images_normalized_as_in_its_training_whatever_the_loader_does(
    kind, images, tmp_path, teachers
):
    name = "deit_tiny_distilled_patch16_224" if kind == "token" else "vit_tiny_patch16_224"
    model = ["--model", name, *VIT[2:]]
    words = ("--kd-model-name", teachers(), "--kd-distill-type", kind)
    loaded = ("--mean", "0.2", "0.3", "0.4", "--std", "0.5", "0.6", "0.7")
    task = session_of(images, tmp_path, *words, *loaded, model=model).task
    raw = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ((0.2, 0.3, 0.4), (0.5, 0.6, 0.7)))
    seen = []
    task.teacher.model.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    task(((raw - mean) / std).float(), torch.tensor([0, 1]))
    torch.testing.assert_close(seen[0].double(), (raw - 0.1) / 0.9, atol=1e-5, rtol=1e-5)


def refusal(words, capsys):
    assert main(words) == 1
    message = capsys.readouterr().err
    assert "--kd-model-name local-dir:" in message
    return message


def test_a_teacher_of_other_classes_would_get_a_head_of_random_weights_and_is_refused(
    images, tmp_path, teachers, capsys
):
    words = ("--kd-model-name", teachers(num_classes=4))
    assert "4 classes apart and the student 3" in refusal(command(images, tmp_path, *words), capsys)
    session_of(images, tmp_path, *words, "--kd-distill-type", "feature")  # no head takes part


def test_a_teacher_of_other_channels_or_of_another_size_is_refused_before_the_first_step(
    images, tmp_path, teachers, capsys
):
    gray = command(images, tmp_path, "--kd-model-name", teachers(in_chans=1))
    assert "images of 1 channels and the student 3" in refusal(gray, capsys)
    vit = teachers("vit_tiny_patch16_224", size=64, img_size=64, embed_dim=32, depth=1, num_heads=2)
    large = command(images, tmp_path, "--kd-model-name", vit)
    assert "the teacher does not accept images of 32x32" in refusal(large, capsys)


@pytest.fixture
def weights(images, tmp_path):
    """A file of weights that a run may start from."""
    torch.save(session_of(images, tmp_path, "--seed", "5").model.state_dict(), tmp_path / "start.pth")
    return str(tmp_path / "start.pth")


def test_a_teacher_called_self_is_the_model_as_it_starts_and_stays_so(images, tmp_path, weights):
    words = ["--kd-model-name", "self", "--initial-checkpoint", weights]
    session = session_of(images, tmp_path, *words)
    batch = torch.rand(8, 3, 32, 32), torch.randint(0, 3, (8,))
    teacher = session.task.teacher.model
    session.model.eval()
    with torch.no_grad():
        assert torch.equal(teacher(batch[0]), session.model(batch[0]))
    session.model.train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    session.task(*batch)["loss"].backward()
    session.optimizer.step()
    assert same_tensors(teacher.state_dict(), before)
    assert not same_tensors(session.model.state_dict(), before)


def test_distilling_from_itself_a_run_continues_bit_for_bit(images, tmp_path, weights, interrupt):
    words = ["--kd-model-name", "self", "--initial-checkpoint", weights, "--tweo-weight", "auto"]
    whole = train(images, tmp_path, *words, name="whole")
    interrupt(3)
    stopped = command(images, tmp_path, *words, "--resume", "auto", name="stopped")
    assert main(stopped) == 128 + signal.SIGTERM
    assert main(stopped) == 0
    assert same_tensors(last(whole)["state_dict"], last(tmp_path / "stopped")["state_dict"])


def test_the_recipe_of_a_repair_runs(images, tmp_path, weights):
    folder = train(images, tmp_path, "-c", "repair", "--initial-checkpoint", weights, "--epochs", "1")
    assert (folder / "last.pth.tar").exists()
