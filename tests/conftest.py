"""What every test may ask for."""

import os

import pytest
import torch
import torch._inductor.config


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write what tests/photograph sees into its golden files, whose diff is then read in review",
    )


@pytest.fixture
def dynamo():
    """torch.compile from a clean slate; yields the counters of graphs and graph breaks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # inductor asks the processor how wide its vectors are, not this variable, by which a common processor is imitated:
    # its loops of 512 bits beside torch's own of 256 give NaN.
    narrow = os.environ.get("ATEN_CPU_CAPABILITY") == "avx2"
    with torch._inductor.config.patch({"cpp.simdlen": 256} if narrow else {}):
        yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def pytest_collection_modifyitems(items):
    """Run the tests that fork processes first, those of training before the others.

    torch refuses a backward pass in a fork of a process whose autograd has started threads, which some tests make it
    do. The option --no-loadscope-reorder of `make test` keeps this order.
    """
    forking = {"processes", "run_together", "train_together", "start", "start_together", "killed_after_an_update"}
    items.sort(key=lambda item: (not forking & vars(item.module).keys(), "train" not in item.path.parts))
