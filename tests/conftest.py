"""What every test may ask for."""

import pytest
import torch


@pytest.fixture
def dynamo():
    """torch.compile from a clean slate; yields the counters of graphs and graph breaks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()
