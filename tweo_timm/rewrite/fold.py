"""Folding: what acts on single channels of the stream moves into the weights beside it, but for one constant.

A norm's gains and shift and a LayerScale know channels by their index, so they stand in the way of any change of basis.
Gains move into the Linear layers that read the norm, a LayerScale into the layer that writes through it, a shift into
the readers' biases. Where a reader has no bias that could take it, the shift stays in the norm as shift / gain, with
the gain folded; that needs gains that are not 0.

Each keeps the rms of its vector as a constant, which commutes with every rotation. Without it a layer behind a
LayerScale of 1e-5 would shrink a hundred-thousandfold, and one step of AdamW, whose size does not depend on the
gradient's, would wreck it: fine-tuning goes on as before only because weights keep their size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tweo_timm.families import describe_stream
from tweo_timm.rewrite.edit import Edit, Step
from tweo_timm.structure import Port, Stage


def fold_affine(model: nn.Module) -> dict[str, str]:
    """Fold every norm and LayerScale of the described streams into the weights beside them, in place and exactly.

    Args:
        model: a timm model; keys, shapes and dtypes stay.

    Returns:
        Norm or scale -> what became of it. Rotating does this itself; alone it makes outliers worse.

    Raises:
        ValueError: for a model that `describe_stream` refuses, or gains of 0 under a shift that has to stay; the model
            is unchanged then.
    """
    stream = describe_stream(model)
    edit = Edit(model)
    folded = {name: words for stage in stream.stages for name, words in fold(edit, stage).items()}
    edit.apply()
    return folded


def fold(edit: Edit, stage: Stage) -> dict[str, str]:
    """Note the folding of one stage; returns norm or scale -> what becomes of it."""
    folded: dict[str, str] = {}
    for norm, readers in stage.norms.items():
        if readers:  # the norm of a model without a head keeps its gains, unless its features may change
            folded |= fold_norm(edit, norm, readers)
    for scale, writers in _scales(stage).items():
        folded[scale] = _fold_scale(edit, scale, writers)
    return folded


def shift_stays(edit: Edit, norm: str, readers: list[Port]) -> bool:
    """Whether a norm has a shift that its readers cannot take."""
    return edit.has(f"{norm}.bias") and not all(_takes_all(edit, port) for port in readers)


def constant_of(edit: Edit, name: str) -> float:
    """The rms of a vector as its own dtype has it: a constant that a rotation commutes with."""
    rms = float(edit.old(name).square().mean().sqrt().to(edit.dtype(name)))
    return rms if rms > 0 else 1.0


def _takes_all(edit: Edit, port: Port) -> bool:
    return sum(stop - start for start, stop in (share.rows for share in port.shares)) == edit.shape(port.name)[0]


def fold_norm(edit: Edit, norm: str, readers: list[Port]) -> dict[str, str]:
    """Note the folding of one norm into the layers that read it; returns norm -> what becomes of it."""
    weight, bias = f"{norm}.weight", f"{norm}.bias"
    gain = edit.old(weight) if edit.has(weight) else None
    words = []
    if edit.has(bias):
        words.append(_fold_shift(edit, norm, gain, readers))
    if gain is not None:
        kept = constant_of(edit, weight)
        for port in readers:
            edit.then(port.name, lambda value: value * _beside(gain / kept, value))
        edit.then(weight, lambda value: torch.full_like(value, kept))
        words.append(f"gains into {', '.join(port.name for port in readers)}")
    return {norm: "; ".join(words)} if words else {}


def _fold_shift(edit: Edit, norm: str, gain: Tensor | None, readers: list[Port]) -> str:
    shift = edit.old(f"{norm}.bias")
    if shift_stays(edit, norm, readers):
        over = _over(norm, shift, gain) * (constant_of(edit, f"{norm}.weight") if gain is not None else 1.0)
        edit.then(f"{norm}.bias", lambda value: over)
        return "its shift stays"
    biases = take_constant(edit, readers, shift)
    edit.then(f"{norm}.bias", torch.zeros_like)
    return f"shift into {', '.join(biases)}"


def take_constant(edit: Edit, readers: list[Port], constant: Tensor) -> list[str]:
    """Note that the readers' biases take a constant that leaves their input; returns the biases."""
    biases = []
    for port in readers:
        for share in port.shares:
            if share.bias:
                edit.then(share.bias, _plus(edit, port, share.rows, constant))
                biases.append(share.bias)
    return biases


def _plus(edit: Edit, port: Port, rows: tuple[int, int], shift: Tensor) -> Step:
    """The step that gives a bias what rows of a reader make of a constant in its input."""
    weight = edit.old(port.name)[slice(*rows)]
    given = weight @ _beside(shift, weight)
    return lambda value: value + given


def _beside(vector: Tensor, weight: Tensor) -> Tensor:
    """A vector of the norm's channels, once for each token that a reader reads side by side."""
    return vector.repeat(weight.shape[-1] // len(vector))


def _over(norm: str, shift: Tensor, gain: Tensor | None) -> Tensor:
    """Shift / gain; 0 where both are."""
    if gain is None:
        return shift
    lost = ((gain == 0) & (shift != 0)).nonzero().flatten().tolist()
    if lost:
        raise ValueError(
            f"{norm}.weight is 0 where its bias is not (channels {', '.join(map(str, lost[:8]))}), and what reads "
            "it has no bias that could take the shift: it cannot be folded; the model stays as it was"
        )
    return torch.where(gain == 0, 0.0, shift / torch.where(gain == 0, 1.0, gain))


def _scales(stage: Stage) -> dict[str, list[Port]]:
    scales: dict[str, list[Port]] = {}
    for port in stage.writers:
        if port.scale:
            scales.setdefault(port.scale, []).append(port)
    return scales


def _fold_scale(edit: Edit, scale: str, writers: list[Port]) -> str:
    vector, kept = edit.old(scale), constant_of(edit, scale)
    for port in writers:
        shape = [-1] + [1] * (len(edit.shape(port.name)) - 1)
        edit.then(port.name, (vector / kept).reshape(shape).mul)
    edit.then(scale, lambda value: torch.full_like(value, kept))
    return f"into {', '.join(port.name for port in writers)}"


def fold_features(edit: Edit, stage: Stage) -> dict[str, Tensor]:
    """Note that the last norm of a model without a head loses its affine, and return what it loses."""
    assert stage.features
    weight, bias = f"{stage.features}.weight", f"{stage.features}.bias"
    lost = {
        "weight": edit.old(weight) if edit.has(weight) else torch.ones(stage.width, dtype=torch.float64),
        "bias": edit.old(bias) if edit.has(bias) else torch.zeros(stage.width, dtype=torch.float64),
        "constant": torch.tensor(constant_of(edit, weight) if edit.has(weight) else 1.0, dtype=torch.float64),
    }
    if edit.has(weight):
        edit.then(weight, lambda value: torch.full_like(value, float(lost["constant"])))
    if edit.has(bias):
        edit.then(bias, torch.zeros_like)
    return lost
