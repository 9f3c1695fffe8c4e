"""The mode of every module of a model, stored and put back: whoever looks at a model leaves it as it was.

`model.train(was_training)` is not that: it sets all modules alike, and unfreezes what its user keeps in evaluation
mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode inside the context, and back into its own after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
