"""What goes wrong ends the run with one message and a status, and loses nothing that was written."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageDataset
from torch.distributed.fsdp import fully_shard

from tests.images import write_images
from tests.models import batch, tiny_maxvit, tiny_swin, tiny_vit
from tests.train.runs import command, last, load, same_tensors, session_of, train
from tweo_timm.blocks import find_blocks
from tweo_timm.run.pictures import StrictImages
from tweo_timm.run.world import World
from tweo_timm.train.cli import main
from tweo_timm.train.health import HealthWatch, TrainingStopped
from tweo_timm.train.loop import Trainer
from tweo_timm.train.signals import PatientWorker, SignalWatch
from tweo_timm.train.step import TrainStep

CPU = World(torch.device("cpu"))


def failure(words, capsys, status=1):
    """Run, expecting this status and one message without a traceback."""
    capsys.readouterr()
    assert main(words) == status
    message = capsys.readouterr().err
    assert message.count("train.py: error:") == 1
    assert "Traceback" not in message
    return message


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A finished run of one epoch, never to be changed."""
    return train(images, tmp_path_factory.mktemp("finished"), "--epochs", "1", "--grad-checkpointing")


@pytest.fixture
def earlier(finished, tmp_path):
    """A copy of it, in tmp_path/run, and what its files held."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


BAD_SETTINGS = {
    "--num-classes 10": ["3 classes", "--num-classes 3"],
    "--model vit_of_nothing": ["vit_of_nothing", "list_models"],
    "--model vit_smal_patch16_224": ["did you mean 'vit_small_patch16_224'"],
    "--model-kwargs depht=3": ["depht"],
    "--device abacus": ["abacus"],
    "--worker-seeding torch": ["--worker-seeding 'torch'", "all, part"],
    "--train-interpolation bicubik": ["--train-interpolation 'bicubik'", "did you mean 'bicubic'"],
    "--train-crop-mode src": ["--train-crop-mode 'src'", "rkrc"],
    "--input-img-mode L": ["mode L", "1 channels", "takes 3", "--in-chans 1"],
    "--in-chans 1": ["--in-chans 1 contradicts --input-size 3 32 32"],
    "--opt adamww": ["--opt adamww", "did you mean 'adamw'"],
    "--opt-betas 2": ["--opt-betas is [2.0]", "below 1"],
    "--opt-betas 0.9": ["--opt adamw"],
    "--opt adahessian": ["--opt adahessian", "TIMM_FUSED_ATTN=0"],
    "--opt adahessian --fp8 emulated": ["--opt adahessian", "leave out --fp8"],
    "--log-interval 0": ["--log-interval is 0"],
    "--stop-epoch 3": ["--stop-epoch 3", "2 epochs"],
    "--sched plateau --sched-on-updates": ["--sched plateau", "--sched-on-updates"],
    "--kd-model-name deit_smal_patch16_224": ["--kd-model-name", "did you mean 'deit_small_patch16_224'"],
    "--kd-model-name resnet10t --kd-distill-type feature --fp8 emulated": ["--kd-distill-type logit", "--fp8"],
    "--loss bce --loss-class-weight 1,2": ["--loss-class-weight 1,2", "2 values", "3 classes"],
    "--task multilabel --eval-metric loss --loss-pos-weight 1,2": ["--loss-pos-weight 1,2", "2 values", "3 classes"],
    "--loss bce --loss-class-weight weights.json": ["--loss-class-weight weights.json", "nor a file"],
    "--loss bce --loss-class-weight 1,two,3": ["--loss-class-weight 1,two,3", "two"],
    "--loss bce --bce-pos-weight -1": ["--bce-pos-weight is -1", "at least 0"],
    "--input-size 3 48 48": ["(48, 48)", "model_kwargs.img_size=32", "leave img_size out of --model-kwargs"],
    "--train-split trian": ["no split 'trian'", "did you mean 'train'"],
    "--val-split vla": ["no split 'vla'", "train, val"],
    "--pretrained-path weights.pth": ["--pretrained-path", "--pretrained;", "--initial-checkpoint"],
    "--epoch-repeats 2": ["--epoch-repeats", "leave it out"],
    "--val-num-samples 5": ["--val-num-samples"],
    "--device-modules tweo_timm.upstream": ["tweo_timm.upstream", "--tweo-weight"],
    "--device-modules torch_npuu": ["--device-modules torch_npuu"],
    "--model-kwargs patch_size=0": ["patch_size"],
    "--aug-repeats 3": ["--aug-repeats 3", "torchrun", "--aug-repeats 0"],
    "--img-size 64": ["--img-size 64 contradicts --input-size 3 32 32", "--input-size 3 64 64"],
    "--mean 0.5 0.5": ["--mean has 2 values", "3 channels"],
    "--torchcompile induktor": ["--torchcompile induktor", "did you mean 'inductor'"],
    "--lr-cycle-mul 0": ["--lr-cycle-mul is 0", "above 0"],
    "--target-key label": ["cannot open split 'train'", "target_key"],
    "--mixup inf": ["--mixup is inf", "finite"],
    "-b 1000": ["smaller --batch-size"],
    "--tweo-blocks nothing_is_called_so": ["nothing_is_called_so"],
    "--fsdp": ["single process", "torchrun"],
}


def bad_folder(images, tmp_path):
    return ["--data-dir", str(tmp_path / "nowhere")], ["nowhere", "does not exist"]


def bad_continuation_of_a_run_without_a_name(images, tmp_path):
    return ["--experiment", "", "--resume", "auto"], ["--resume auto", "--experiment NAME"]


def bad_spelling_of_the_folder(images, tmp_path):
    (tmp_path / "imagenet").mkdir()
    return ["--data-dir", str(tmp_path / "imagnet" / "train")], ["does not exist", "did you mean 'imagenet'"]


def bad_yaml(images, tmp_path):
    (tmp_path / "recipe.yaml").write_text("tweo_wieght: 0.1\n")
    return ["-c", str(tmp_path / "recipe.yaml")], ["tweo_wieght", "tweo_weight"]


def bad_checkpoint(images, tmp_path):
    torch.save({"state_dict": {"conv.weight": torch.ones(1)}, "arch": "resnet50"}, tmp_path / "other.pth.tar")
    return ["--resume", str(tmp_path / "other.pth.tar")], ["other.pth.tar", "resnet50", "does not fit"]


def bad_initial_checkpoint(images, tmp_path):
    torch.save({"state_dict": {"conv.weight": torch.ones(1)}}, tmp_path / "other.pth.tar")
    return ["--initial-checkpoint", str(tmp_path / "other.pth.tar")], ["other.pth.tar", "do not fit"]


def bad_file_of_weights(images, tmp_path):
    (tmp_path / "weights.pth").write_text("no weights")
    return ["--initial-checkpoint", str(tmp_path / "weights.pth")], [
        "weights.pth",
        "truncated, damaged or no checkpoint",
    ]


def bad_safetensors(images, tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"")
    path = str(tmp_path / "weights.safetensors")
    return ["--pretrained", "--pretrained-path", path], ["weights.safetensors", "damaged or no checkpoint"]


def bad_optimizer_for_a_checkpoint(images, tmp_path):
    path = str(tmp_path / "run" / "last.pth.tar")
    return ["--resume", path, "--opt", "sgd"], ["--opt adamw", "--opt sgd", "--no-resume-opt"]


def bad_folder_of_one_split(images, tmp_path):
    return ["--data-dir", str(images / "train")], ["neither split", "train/ and val/"]


def bad_path_of_checkpoint(images, tmp_path):
    return ["--resume", str(tmp_path / "run" / "lats.pth.tar")], ["no checkpoint", "did you mean 'last.pth.tar'"]


def bad_path_of_weights(images, tmp_path):
    words = ["--initial-checkpoint", str(tmp_path / "run" / "lats.pth.tar")]
    return words, ["--initial-checkpoint", "does not exist", "did you mean 'last.pth.tar'"]


def bad_statistics_of_classes(images, tmp_path):
    return ["--class-stats", str(tmp_path / "nothing.json")], ["--class-stats", "nothing.json"]


def bad_statistics_of_other_classes(images, tmp_path):
    (tmp_path / "stats.json").write_text('{"pos_counts": [4, 2], "num_samples": 8}')
    words = ["--task", "multilabel", "--eval-metric", "map", "--loss", "db"]
    return [*words, "--class-stats", str(tmp_path / "stats.json")], ["--class-stats", "2 values", "3 classes"]


def bad_split(images, tmp_path):
    data = write_images(tmp_path / "odd", train=9, val=9)
    (data / "val" / "class2").rename(data / "val" / "classX")
    return ["--data-dir", str(data)], [
        "classes",
        "differ",
        "train has no image of classX",
        "validation has no image of class2",
    ]


def bad_fp8_backend_that_cannot_run(images, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this GPU may be able to run it")
    return ["--fp8", "native"], ["--fp8 native", "compute capability 8.9", "emulated"]


BAD = [value for name, value in sorted(globals().items()) if name.startswith("bad_")]


@pytest.mark.parametrize("case", [*BAD_SETTINGS, *BAD], ids=lambda case: getattr(case, "__name__", case))
def test_bad_input_is_one_message_and_leaves_an_earlier_run_as_it_was(case, images, tmp_path, earlier, capsys):
    folder, files = earlier
    words, expected = case(images, tmp_path) if callable(case) else (case.split(), BAD_SETTINGS[case])
    message = failure([*command(images, tmp_path), *words], capsys, status=2 if "-c" in words else 1)
    for word in expected:
        assert word in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert [path.name for path in tmp_path.iterdir() if "old" in path.name] == []


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_image_is_named(workers, tmp_path, capsys):
    data = write_images(tmp_path / "data", train=16, val=6)
    (data / "train" / "class1" / "4.png").write_bytes(b"no picture")
    message = failure(command(data, tmp_path, "-j", workers), capsys)
    assert "class1/4.png" in message
    assert "damaged" in message


def test_an_error_of_an_augmentation_is_not_blamed_on_the_image(images):
    dataset = StrictImages(ImageDataset(str(images / "train")))
    dataset.transform = lambda image: torch.zeros(2) + torch.zeros(3)
    with pytest.raises(RuntimeError, match="size of tensor"):
        dataset[0]


def test_a_second_run_in_the_same_folder_sets_the_first_aside(images, tmp_path, earlier):
    folder, files = earlier
    train(images, tmp_path, "--epochs", "1", "--lr", "1e-4")
    aside = tmp_path / "run.old1"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == files
    assert not same_tensors(last(folder)["state_dict"], last(aside)["state_dict"])


def poison(monkeypatch, what):
    original = TrainStep.__call__

    def call(self, images, targets):
        if self.cursor.updates == 9:
            what(self)
        original(self, images, targets)

    monkeypatch.setattr(TrainStep, "__call__", call)


def test_a_loss_that_is_no_number_stops_with_update_block_and_last_good(images, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, lambda step: step.session.model.blocks[1].mlp.fc1.weight.data.fill_(float("nan")))
    message = failure(command(images, tmp_path, "--recovery-interval", "2"), capsys)
    assert "update 9" in message
    assert "blocks.1" in message
    assert "recovery-1-2.pth.tar" in message
    good = load(tmp_path / "run" / "recovery-1-2.pth.tar")
    assert all(torch.isfinite(value).all() for value in good["state_dict"].values())


def test_a_gradient_that_is_no_number_stops_and_names_where_it_came_first(images, tmp_path, monkeypatch, capsys):
    def spoil(step):
        step.session.model.blocks[0].mlp.fc2.bias.register_hook(lambda gradient: gradient * float("inf"))

    poison(monkeypatch, spoil)
    message = failure(command(images, tmp_path, "--outlier-interval", "0"), capsys)
    assert "update 9" in message
    assert "blocks.0.mlp.fc2.bias" in message
    assert "last.pth.tar" in message


def break_one_weight(step):
    """A finite gradient, an update that is not: what a rate or a trust ratio that overflows does."""

    def overflow(optimizer, args, kwargs):
        step.session.model.blocks[1].attn.qkv.weight.data[3, 5] = float("inf")

    step.session.optimizer.register_step_post_hook(overflow)


def test_a_weight_that_its_own_update_breaks_is_found_by_the_next_loss_and_named(images, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, break_one_weight)
    message = failure(command(images, tmp_path), capsys)
    assert "update 10" in message
    assert "first at block blocks.1, because blocks.1.attn.qkv.weight is not finite after update 9" in message


def test_weights_that_are_not_finite_are_never_written(images, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, break_one_weight)
    message = failure(command(images, tmp_path, "--recovery-interval", "1"), capsys)
    assert "stopped at update 9: blocks.1.attn.qkv.weight is not finite after update 9" in message
    written = list((tmp_path / "run").glob("*.pth.tar"))
    assert "recovery-1-2.pth.tar" in message
    assert len(written) == 5
    assert all(torch.isfinite(value).all() for path in written for value in load(path)["state_dict"].values())


def test_stop_on_peak_stops_and_names_the_block(images, tmp_path, capsys):
    message = failure(command(images, tmp_path, "--stop-on-peak", "0.5"), capsys)
    assert "update 0" in message
    assert "max |A|" in message
    assert "blocks.0" in message


def spoil_gradient(layer, value):
    """Put one element of this value into what comes back to a layer's output, until the hook it returns is removed."""

    def spoil(gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        gradient.view(-1)[gradient.numel() // 2] = value
        return gradient

    def spoil_backward(module, args, output):
        output.register_hook(spoil)

    return layer.register_forward_hook(spoil_backward)


def tiny_crossvit():
    """Two branches, for patches of 12 and 16 pixels, each with a first layer of its own."""
    sizes = {"embed_dim": (16, 32), "num_heads": (2, 2), "depth": ((1, 1, 0), (1, 1, 0)), "num_classes": 6}
    return timm.create_model("crossvit_9_240", **sizes)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("build", [tiny_vit, tiny_swin, tiny_maxvit, tiny_crossvit])
def test_one_bad_element_anywhere_in_a_backward_pass_is_seen_in_the_same_update(build, value):
    model = build()
    images, _ = batch(2, {tiny_maxvit: 64, tiny_crossvit: 240}.get(build, 32))
    for block in find_blocks(model).values():
        watch = HealthWatch(model, [], CPU.device)
        model.zero_grad()
        hook = spoil_gradient(block, value)
        model(images).square().mean().backward()
        hook.remove()
        watch.note_gradients(3)
        with pytest.raises(TrainingStopped, match="update 3: gradients are not finite, first that of"):
            watch.check(CPU, "none")


OPTIMIZERS = [[], ["--clip-grad", "1"], ["--clip-grad", "1", "--clip-mode", "value"]]
OPTIMIZERS += [["--opt", name] for name in ("lamb", "lion", "adopt")]


@pytest.mark.parametrize("words", OPTIMIZERS, ids=" ".join)
def test_a_gradient_that_is_not_finite_is_named_in_its_own_update(words, images, tmp_path):
    """Clipping and signs would hide it, and LAMB, which clips by the norm of all, spread it to every weight."""
    session = session_of(images, tmp_path, *words)
    name = "blocks.1.mlp.fc1.weight"
    session.model.get_parameter(name).register_hook(lambda gradient: gradient + float("nan"))
    with pytest.raises(TrainingStopped, match=f"update 0: gradients are not finite, first that of {name}"):
        Trainer(session, SignalWatch()).train_epoch(0)


MARKING_WHO_WAITS = """
import os, pathlib, signal, sys
from tweo_timm.train.cli import main
def wait(*_):
    pathlib.Path(sys.argv[1]).touch()
    os._exit(0)
signal.sigtimedwait = wait
sys.exit(main(sys.argv[2:]))
"""
"""A training command whose workers end at once, and leave a mark, where they would begin to wait for their run."""


@pytest.fixture
def lone_process():
    """A process group of one, in which tensors can be sharded."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def watch_of_gradient(gradient):
    """A watch that has looked at a layer whose weight has this gradient."""
    layer = torch.nn.Linear(*reversed(gradient.shape), bias=False).to(gradient.dtype)
    layer.weight.grad = gradient
    watch = HealthWatch(layer, [], CPU.device)
    watch.note_gradients(0)
    return watch


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(1e20, torch.float32), (300.0, torch.float16), (1e20, torch.bfloat16), (1e300, torch.float64)],
    ids=str,
)
def test_a_million_large_gradients_do_not_stop_a_run_and_one_that_is_not_finite_does(value, dtype):
    gradient = torch.full((1000, 1000), value, dtype=dtype)
    watch_of_gradient(gradient).check(CPU, "none")
    for bad in (float("inf"), -float("inf"), float("nan")):
        spoiled = gradient.clone()
        spoiled[500, 500] = bad
        with pytest.raises(TrainingStopped, match="update 0: gradients are not finite, first that of weight"):
            watch_of_gradient(spoiled).check(CPU, "none")


def test_gradients_of_sharded_weights_are_looked_at(lone_process):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    fully_shard(model, mesh=lone_process)
    model(torch.ones(1, 4)).sum().backward()
    watch = HealthWatch(model, [], CPU.device)
    watch.note_gradients(0)
    watch.check(CPU, "none")
    model[1].weight.grad.mul_(float("nan"))
    watch.note_gradients(1)
    with pytest.raises(TrainingStopped, match=r"update 1: gradients are not finite, first that of 1\.weight"):
        watch.check(CPU, "none")


def test_a_run_that_cannot_go_on_does_not_wait_for_its_workers(tmp_path):
    """Its own process: workers that are left when Python exits are told to end by a signal, which they outlive."""
    data = write_images(tmp_path / "data", train=24, val=6)
    next((data / "train" / "class0").iterdir()).write_bytes(b"")
    program = [sys.executable, "-c", MARKING_WHO_WAITS, str(tmp_path / "waited")]
    done = subprocess.run([*program, *command(data, tmp_path, "-j", "2")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the file is damaged" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "waited").exists()


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="nobody knows here who sent a signal")
@pytest.mark.parametrize("own_run", [True, False])
def test_a_worker_ends_at_once_for_its_own_run_and_waits_for_it_when_anybody_else_sends_the_signal(own_run):
    fork = multiprocessing.get_context("fork")
    ready, waiting = fork.Event(), fork.Event()

    def wait(*_):
        waiting.set()
        os._exit(0)

    def work():
        signal.sigtimedwait = wait
        PatientWorker(None)(0)
        ready.set()
        threading.Event().wait()

    worker = fork.Process(target=work)
    worker.start()
    ready.wait()
    if own_run:
        worker.terminate()
    else:
        subprocess.run(["kill", str(worker.pid)], check=True)
    worker.join()
    assert (worker.exitcode, waiting.is_set()) == (0, not own_run)


def test_the_first_bad_step_is_the_one_that_is_reported():
    watch = HealthWatch(torch.nn.Identity(), ["a", "b"], CPU.device, stop_on_peak=10.0)
    watch.note(3, torch.tensor(1.0), torch.tensor([1.0, 11.0]))
    watch.note(4, torch.tensor(float("nan")), torch.tensor([float("nan"), 1.0]))
    with pytest.raises(TrainingStopped, match=r"update 3: loss 1, max \|A\| = 11 first at block b"):
        watch.check(CPU, "none")


def test_a_weight_is_blamed_only_while_no_update_has_spread_what_is_wrong():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    for spread, reason in ((False, r"block a, because 1\.weight is not finite after update 2\."), (True, r"block a\.")):
        watch = HealthWatch(model, ["a"], CPU.device)
        watch.note_gradients(2)
        model[1].weight.data.fill_(float("inf"))
        watch.note(3, torch.tensor(float("nan")), torch.tensor([float("nan")]))
        if spread:  # by gradients that are not finite, every weight: the first of them tells nothing
            watch.note_gradients(3)
            model[0].weight.data.fill_(float("nan"))
        with pytest.raises(TrainingStopped, match="update 3: .* first at " + reason):
            watch.check(CPU, "none")


def test_a_bad_loss_with_healthy_blocks_points_at_the_head():
    watch = HealthWatch(torch.nn.Identity(), ["a"], CPU.device)
    watch.note(0, torch.tensor(float("inf")), torch.tensor([1.0]))
    with pytest.raises(TrainingStopped, match="look at the head"):
        watch.check(CPU, "none")


@pytest.fixture
def python_interrupts():
    """Python's own SIGINT, which a shell takes from the commands that it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_interrupts")
def test_a_second_signal_acts_at_once():
    with SignalWatch() as watch:
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        signal.raise_signal(signal.SIGINT)
        assert watch.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_no_process_waits_for_a_checkpoint_that_is_a_picture(images, tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
    message = failure(command(images, tmp_path, "--resume", str(tmp_path / "picture.png")), capsys)
    assert "no checkpoint" in message
