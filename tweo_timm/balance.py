"""How hard the penalty pulls beside the task: the norms of their gradients, and a weight that keeps to a share.

The same weight means something else under another loss (a mean of 1000 binary cross-entropies has a small gradient) and
for a model that was trained without the penalty, whose L_TWEO may be in the millions. What can be compared is the
gradients of the parameters. Both norms come from extra backward passes over the graph that the step has anyway, so they
draw no random number and leave no gradient behind. Knows tensors, no models. Not the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

INTERVAL = 5
"""Passes from one measurement of a `Balance` to the next."""
_MEMORY = 0.5  # what a measurement leaves of those before it: ten passes count, more or less


class Norms(NamedTuple):
    """The gradients of the two terms of a loss, over all parameters: float32 scalars on the device.

    Attributes:
        task: of the task's loss.
        penalty: of L_TWEO, without its weight.
    """

    task: Tensor
    penalty: Tensor


def gradient_norms(
    task_loss: Tensor,
    penalty: Tensor,
    parameters: Iterable[nn.Parameter],
    average: Callable[[Tensor], Tensor] | None = None,
) -> Norms:
    """Return the norms of both gradients; the graph stays, and no parameter's `grad` is touched.

    Args:
        task_loss: a scalar with a graph.
        penalty: L_TWEO of the same forward pass.
        parameters: those that are trained.
        average: returns the mean of a gradient over the processes, whose batches together are the step's; None for
            one process. A parameter that a loss does not reach has zeros.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    with torch.autocast(task_loss.device.type, enabled=False):
        found = [
            torch.autograd.grad(term, trained, retain_graph=True, materialize_grads=True)
            for term in (task_loss, penalty)
        ]
    with torch.no_grad():  # zeros in the place of no gradient ask for one themselves in torch 2.8
        return Norms(*(_norm([average(one) if average else one for one in gradients]) for gradients in found))


def _norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all together; divided by the largest element first, whose square may be no float32."""
    largest = torch.stack([gradient.abs().amax().float() for gradient in gradients]).amax()
    unit = torch.where(largest > 0, largest, 1.0)
    return largest * torch.stack([(gradient.float() / unit).square().sum() for gradient in gradients]).sum().sqrt()


class Balance:
    """A weight under which the penalty's gradient is at most a share of the task's.

        weight = min(most, share * mean |g_task| / mean |g_penalty|)

    The means forget: each measurement halves what was before it. Nothing waits for the device.

    Args:
        share: r, the largest ratio of the weighted penalty's gradient to the task's.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._means: Norms | None = None
        self._passes = 0

    def due(self) -> bool:
        """Count a pass, and say whether it is to be measured; the first is."""
        self._passes += 1
        return self._passes % INTERVAL == 1

    def note(self, norms: Norms) -> None:
        """Count in a measurement; one that is not finite, of a batch that a loop skips, leaves the means alone."""
        before = torch.stack(self._means if self._means is not None else norms)
        new = torch.stack(norms)
        before = torch.where(before.isfinite().all(), before, new)  # those of a first one
        mixed = _MEMORY * before + (1 - _MEMORY) * new
        self._means = Norms(*torch.where(new.isfinite().all(), mixed, before))

    def weight(self, most: float) -> Tensor:
        """Return the weight, a float32 scalar on the device: `most`, or less where the penalty would pull too hard."""
        assert self._means is not None, "the first pass is measured"
        task, penalty = self._means
        allowed = self.share * task
        return torch.where(most * penalty <= allowed, most, allowed / penalty)

    def state(self) -> dict[str, Any]:
        """Return what a continuation needs, as plain tensors and numbers; empty before the first measurement."""
        if self._means is None:
            return {}
        return {"means": torch.stack(self._means).cpu(), "passes": self._passes}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from `state()`; an empty one begins anew.

        Raises:
            ValueError: it is no such state.
        """
        self._means, self._passes = None, 0
        if not state:
            return
        means, passes = state["means"], int(state["passes"])
        if means.shape != (2,) or not bool((torch.isfinite(means) & (means >= 0)).all()) or passes < 1:
            raise ValueError(f"means of gradients {means.tolist()} after {passes} passes")
        self._means, self._passes = Norms(*means.float().to(device)), passes
