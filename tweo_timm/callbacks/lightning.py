"""The penalty in Lightning's Trainer: `Trainer(callbacks=[TweoCallback(TweoConfig(weight=0.01))])`.

Lightning hands a callback the loss right before its backward pass, already divided for accumulation and multiplied by
the scale of float16. The penalty is added there in the same units, so nothing of the LightningModule changes.

Refused: manual optimization, whose losses cannot be told apart (add `Tweo(model).penalty()` in training_step).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from tweo_timm.blocks import find_blocks
from tweo_timm.config import TweoConfig
from tweo_timm.extras import installation
from tweo_timm.penalty import Tweo

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise ImportError(f"Lightning is missing ({error}): {installation('lightning')}") from error


class TweoCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Adds the TWEO penalty to the loss of every training step, and logs `train_tweo_penalty` and `train_peak_abs`.

    The loss that Lightning logs stays the task's.

    Args:
        config: the penalty and its schedule, which follows the trainer's steps.
        model: name of the module of the LightningModule that training_step calls, such as "student"; "" takes the
            one child that holds all transformer blocks.
        blocks: regular expression naming that module's blocks by hand; None finds them by structure.

    Attributes:
        tweo: the `Tweo` of the current fit; None outside of one.
    """

    def __init__(self, config: TweoConfig | None = None, model: str = "", blocks: str | None = None) -> None:
        self.tweo: Tweo | None = None
        self._config, self._model, self._blocks = config or TweoConfig(), model, blocks

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the model.

        Raises:
            ValueError: for manual optimization, for a schedule without an end, and if the model is not told.
        """
        if not pl_module.automatic_optimization:
            raise ValueError(
                "TweoCallback adds to the loss of automatic optimization, and this module optimizes by hand: make a "
                "Tweo(model) of your own, and add its penalty() to the loss in training_step"
            )
        if self._config.schedule != "constant" and math.isinf(trainer.estimated_stepping_batches):
            raise ValueError(
                f"the {self._config.schedule} schedule needs the end of the training: give Trainer max_epochs or "
                "max_steps"
            )
        module = pl_module.get_submodule(self._model) if self._model else _called_model(pl_module)
        self.tweo = Tweo(module, self._config, self._blocks)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Move the schedule, and leave out a pass of before whose batch training_step has skipped."""
        assert self.tweo is not None
        self.tweo.forget()
        if self._config.schedule != "constant":
            self.tweo.set_progress(min(1.0, trainer.global_step / trainer.estimated_stepping_batches))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Add the penalty to the loss, in place: it is the quotient that Lightning made of training_step's."""
        assert self.tweo is not None
        penalty = self.tweo.penalty()
        pl_module.log("train_tweo_penalty", penalty.detach())
        pl_module.log("train_peak_abs", self.tweo.peak_abs)
        penalty = penalty / trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss.add_(penalty if scaler is None else scaler.scale(penalty))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the hooks off."""
        if self.tweo is not None:
            self.tweo.remove()
            self.tweo = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks off."""
        self.on_fit_end(trainer, pl_module)


def _called_model(pl_module: nn.Module) -> nn.Module:
    """The child that holds all blocks: what training_step calls."""
    owners = sorted({name.split(".")[0] for name in find_blocks(pl_module)})
    child = pl_module.get_submodule(owners[0])
    if len(owners) > 1 or isinstance(child, nn.ModuleList | nn.ModuleDict):
        raise ValueError(
            f"transformer blocks stand in {', '.join(owners)} of {type(pl_module).__name__}: name the module that "
            f"training_step calls and trains, TweoCallback(model={owners[0]!r}) say"
        )
    return child
