"""Two gloo processes against one process that sees the whole batch."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.models import batch, definition, gradients, largest_relative_error, tiny_task, tiny_vit
from tweo_timm import TweoConfig, attach_tweo, record_outliers

CONFIG = TweoConfig(weight=0.3, tau=0.8)
WORLD = 2
SIZE = 12
GROUPS = [slice(0, 8), slice(8, 12)]  # two micro-batches of two images a process, and one that remains


def halves(tensor, rank):
    return tensor.chunk(WORLD)[rank]


def train(rank, mode):
    """One step of each process on its half, gradients as the optimizer would see them."""
    task = tiny_task(tiny_vit())
    task.trainable_module.set_grad_checkpointing(mode == "checkpointing")
    attach_tweo(task, CONFIG)
    if mode == "compiled":
        task.compile(backend="aot_eager")
    task.prepare_distributed()
    images, targets = batch(SIZE)
    task.trainable_module.train()
    if mode != "accumulation":
        result = task(halves(images, rank), halves(targets, rank))
        result["loss"].backward()
        return model_gradients(task), float(result["tweo_loss"])
    found = []
    for group in GROUPS:
        task.zero_grad()
        parts = halves(images[group], rank).split(2), halves(targets[group], rank).split(2)
        micro_batches = list(zip(*parts, strict=True))
        for i, micro_batch in enumerate(micro_batches, start=1):
            if i < len(micro_batches):
                with task.no_sync():
                    (task(*micro_batch)["loss"] / len(micro_batches)).backward()
            else:
                (task(*micro_batch)["loss"] / len(micro_batches)).backward()
        found.append(model_gradients(task))
    return found


def model_gradients(task):
    return {
        name.replace("module.", "").replace("_orig_mod.", ""): g for name, g in gradients(task.trainable_module).items()
    }


def gather(rank):
    """Statistics of both processes, the peak on the second one's images."""
    model = tiny_vit().eval()
    images, _ = batch(SIZE)
    images[-1] *= 50
    with record_outliers(model) as record, torch.no_grad():
        model(halves(images, rank))
    own = record.summary()["peak_abs"]
    record.gather()
    return own, record.summary()


def worker(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    found = {mode: train(rank, mode) for mode in ("plain", "checkpointing", "compiled", "accumulation")}
    found["gather"] = gather(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def whole_batch():
    return definition(tiny_task(tiny_vit()), *batch(SIZE), CONFIG)


@pytest.mark.parametrize("mode", ["plain", "checkpointing", "compiled"])
def test_gradients_of_both_processes_are_those_of_the_whole_batch(ranks, whole_batch, mode):
    _, tweo, _, expected = whole_batch
    for rank in ranks:
        assert largest_relative_error(rank[mode][0], expected) < 1e-5
    assert sum(rank[mode][1] for rank in ranks) / WORLD == pytest.approx(tweo, rel=1e-5)


def test_accumulation_with_a_remainder_equals_the_large_batches(ranks):
    images, targets = batch(SIZE)
    for group, found in zip(GROUPS, zip(*(rank["accumulation"] for rank in ranks), strict=True), strict=True):
        expected = definition(tiny_task(tiny_vit()), images[group], targets[group], CONFIG)[-1]
        assert all(largest_relative_error(each, expected) < 1e-5 for each in found)


def test_gathered_statistics_are_those_of_one_process(ranks):
    model = tiny_vit().eval()
    images, _ = batch(SIZE)
    images[-1] *= 50
    with record_outliers(model) as record, torch.no_grad():
        model(images)
    expected = record.summary()
    (first_own, first), (_, second) = (rank["gather"] for rank in ranks)
    assert first == second
    assert first_own < expected["peak_abs"]  # the peak was on the other process
    assert (first["peak_abs"], first["peak_block"]) == (expected["peak_abs"], expected["peak_block"])
    for block, reference in zip(first["blocks"], expected["blocks"], strict=True):
        assert block.pop("name") == reference.pop("name")
        assert block == pytest.approx(reference, rel=1e-5)
