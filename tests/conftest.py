"""What every test may ask for."""

import pytest
import torch


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
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()
