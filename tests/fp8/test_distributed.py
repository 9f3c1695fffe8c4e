"""Two processes over gloo: unequal data, equal scales."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests import models
from tweo_timm import Fp8Recipe, fp8_state, patch_fp8


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tiny_vit():
    model = models.tiny_vit(depth=1, num_classes=10)
    patch_fp8(model, Fp8Recipe(amax_history_len=4))
    return model


def images_of(rank, step):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(10 * step + rank)) * (1 + 5 * rank)


def worker(rank, port, folder, compiled):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        calls = []
        reduce = dist.all_reduce
        dist.all_reduce = lambda tensor, *args, **kwargs: (
            calls.append(tensor.numel()),
            reduce(tensor, *args, **kwargs),
        )[1]
        inner = tiny_vit()
        model = torch.compile(inner, backend="aot_eager") if compiled else inner
        model = DistributedDataParallel(model)
        for step in range(2):
            with model.no_sync():
                model(images_of(rank, 2 * step)).square().mean().backward()
            model(images_of(rank, 2 * step + 1)).square().mean().backward()
        torch.save({"state": fp8_state(model), "calls": calls}, os.path.join(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_both_ranks_have_the_scales_of_the_larger_maxima(tmp_path, compiled):
    mp.start_processes(worker, args=(free_port(), str(tmp_path), compiled), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first["state"][key], second["state"][key]) for key in first["state"])
    # Four micro-batches, each one flat reduction forward (input and weight of 5 layers) and one backward.
    assert first["calls"] == [10, 5] * 4

    # The first layer's input does not depend on any FP8 rounding, so its maxima are those of the two ranks' own data.
    name = "blocks.0.attn.qkv.scaling_fwd.amax_history"
    alone = []
    for rank in (0, 1):
        model = tiny_vit()
        for step in range(4):
            model(images_of(rank, step)).square().mean().backward()
        alone.append(fp8_state(model)[name][:, 0])
    assert not torch.equal(*alone)
    assert torch.equal(first["state"][name][:, 0], torch.maximum(*alone))
