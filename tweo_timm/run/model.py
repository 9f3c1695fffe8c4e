"""What every command asks of a model before it works: is its name known, does it take these images, can it compile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import list_models
from torch import Tensor, nn

from tweo_timm.clipped_softmax import clip_softmax
from tweo_timm.modes import evaluating
from tweo_timm.run.checkpoint_file import CheckpointFile
from tweo_timm.suggestion import suggest


def suggest_model(name: str, error: Exception) -> str:
    """Name the model of timm whose name is nearest, if the error is that it knows none of this name."""
    return suggest(name, list_models()) if "Unknown model" in str(error) else ""


def without_classifier(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the weights but for those of the classifier, for a model that was created without one."""
    config: Any = getattr(model, "pretrained_cfg", None)
    named = (config or {}).get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))
    return {name: value for name, value in weights.items() if not name.startswith(prefixes)}


def clip_as_asked(model: nn.Module, arch: str, alpha: float) -> None:
    """Clip the softmax of a model's attention as --clipped-softmax says.

    Raises:
        ValueError: if the model's attention cannot be clipped.
    """
    try:
        clip_softmax(model, alpha)
    except ValueError as error:
        raise ValueError(f"--clipped-softmax {alpha:g}: {arch}: {error}; leave it out") from error


def clipped_in(file: CheckpointFile) -> float | None:
    """Return the alpha with which the weights of a file were trained, 0 without; None where the file does not say."""
    args = file.args
    alpha = args.get("clipped_softmax", 0.0)
    return float(alpha) if args and isinstance(alpha, int | float) else None


def refuse_clipped(file: CheckpointFile, flag: str) -> None:
    """Refuse weights of a clipped softmax as a frozen backbone, which is known by its weights alone.

    Raises:
        ValueError: if they are.
    """
    alpha = clipped_in(file)
    if alpha:
        raise ValueError(
            f"{flag} {file.path} was trained with --clipped-softmax {alpha:g}, which its weights do not show: give a "
            "side network a backbone without"
        )


def check_compiler(backend: str | None) -> None:
    """Refuse a backend of torch.compile that is not there.

    Raises:
        ValueError: with the names of those that are.
    """
    if backend and backend not in torch.compiler.list_backends(exclude_tags=()):
        known = torch.compiler.list_backends()
        raise ValueError(f"--torchcompile {backend}: torch knows {', '.join(known)}{suggest(backend, known)}")


@torch.no_grad()
def check_image_size(arch: str, model: nn.Module, input_size: Sequence[int]) -> None:
    """Try a model on one blank image: windows, strides and heads set conditions that nothing else tells.

    Args:
        arch: its name, for the message.
        model: on its device, in any mode, which it keeps.
        input_size: channels, height and width.

    Raises:
        ValueError: if the model does not accept it.
    """
    weight = next(model.parameters())
    try:
        with evaluating(model):
            model(torch.zeros(1, *input_size, dtype=weight.dtype, device=weight.device))
    except (AssertionError, RuntimeError, ValueError) as error:
        size = "x".join(map(str, input_size[1:]))
        reason = str(error)[:400] or type(error).__name__
        raise ValueError(f"{arch} does not accept images of {size}: {reason}") from error
