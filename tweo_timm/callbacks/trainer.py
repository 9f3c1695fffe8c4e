"""The penalty in the Trainer of transformers: `Trainer(..., callbacks=[TweoCallback(TweoConfig(weight=0.01))])`.

A callback of that Trainer never sees the loss, but the Trainer takes it from what the model returns, so the penalty is
added there: in a hook on the model, during training passes only. Over several micro-batches of one update the model
divides its own loss by the number of labels in all of them, and the penalty is weighted alike.

Refused: a model that returns no loss (own loss functions and label smoothing, which compute it elsewhere; override
`compute_loss` there and add `Tweo(model).penalty()`), tuples, and torch's DataParallel, whose replicas have no hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from tweo_timm.config import TweoConfig
from tweo_timm.extras import installation
from tweo_timm.penalty import Tweo

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(f"transformers is missing ({error}): {installation('transformers')}") from error

_IGNORED = -100
"""The label that torch's cross-entropy leaves out, and the Trainer does not count."""


class TweoCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Adds the TWEO penalty to the loss that a model returns in training.

    The loss that the Trainer logs holds it.

    Args:
        config: the penalty and its schedule, which follows the Trainer's steps.
        blocks: regular expression naming the blocks by hand; None finds them by structure.

    Attributes:
        tweo: the `Tweo` of the current training, with `peak_abs`; None outside of one.
    """

    def __init__(self, config: TweoConfig | None = None, blocks: str | None = None) -> None:
        self.tweo: Tweo | None = None
        self._config, self._blocks = config or TweoConfig(), blocks
        self._handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Hook the model.

        Raises:
            ValueError: for DataParallel, and label smoothing.
        """
        if args.n_gpu > 1:
            raise ValueError("torch.nn.DataParallel runs copies of the model that TWEO does not see: use torchrun")
        if args.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor={args.label_smoothing_factor}: {_ELSEWHERE}")
        self.on_train_end(args, state, control)  # of a training that was broken off, at whose end nobody calls
        model = unwrap_model(model)
        self.tweo = Tweo(model, self._config, self._blocks)
        self._handle = model.register_forward_hook(self._hook(model, self.tweo), with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the schedule."""
        if self.tweo is not None and self._config.schedule != "constant":
            self.tweo.set_progress(min(1.0, state.global_step / state.max_steps))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off."""
        if self.tweo is not None:
            self.tweo.remove()
            self._handle.remove()
            self.tweo = None

    def _hook(self, model: nn.Module, tweo: Tweo) -> Any:
        def add(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            if module is not model or not (module.training and torch.is_grad_enabled()):
                return output
            if not isinstance(output, dict) or output.get("loss") is None:
                raise ValueError(f"{type(module).__name__} returned no loss in a dict: {_ELSEWHERE}")
            output["loss"] = output["loss"] + tweo.penalty() * _share(kwargs)
            return output

        return add


_ELSEWHERE = (
    "TweoCallback adds to the loss that a model returns. Where it is computed elsewhere, override Trainer.compute_loss "
    "and add Tweo(model).penalty() to it"
)


def _share(kwargs: dict[str, Any]) -> Tensor | float:
    """This micro-batch's share of its update: 1 where the Trainer divides the loss itself."""
    items = kwargs.get("num_items_in_batch")
    return 1.0 if items is None else kwargs["labels"].ne(_IGNORED).sum() / items
