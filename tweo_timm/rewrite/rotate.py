"""Repair of a trained model: its residual stream in a basis in which no channel stands out. Exact, without training.

Outliers of a pre-norm transformer sit in a few channels of its residual stream, and channels are an accident of the
basis. Multiply the stream by an orthogonal Q and their energy is shared among all channels; what the model computes
does not change, because everything that meets the stream can be written in the new basis beforehand:

1. Norm gains and LayerScales know channels by their index. They are folded into the Linear layers beside them
   (fold.py), and each leaves a constant behind.
2. Q fixes the all-ones direction, Q 1 = 1 (orthogonal.py). A norm subtracts the mean and divides by the deviation; both
   commute with such a Q, so LayerNorm(x Q) = LayerNorm(x) Q, and the model stays a LayerNorm model: the same timm
   architecture, keys and shapes. (The usual Q of language models needs every LayerNorm converted to an RMSNorm.)
3. Every tensor that writes the stream takes Q along its output axis, every one that reads it along its input axis
   (families.py knows them): W x becomes (W Q)(Q' x).

All in float64, each tensor rounded once (edit.py), and afterwards the outputs before and after are compared
(change.py): if they differ by more than rounding, everything is put back and an error says so.

A random Q is enough to take peaks away; a learned one (learned.py) spreads them as evenly as this model permits. What
no Q can change: the norm of a single token, which massive tokens keep, and activations inside the branches.

Source: rotations as in QuaRot (arXiv:2404.00456) and SpinQuant (arXiv:2405.16406); Q 1 = 1, the constants that stay,
and the stages of Swin are this package's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from tweo_timm.batches import image_batches
from tweo_timm.families import describe_stream
from tweo_timm.rewrite.change import RotationReport, Site, View, generated_images, look, output_error, tolerance
from tweo_timm.rewrite.edit import Edit
from tweo_timm.rewrite.fold import fold, fold_features, shift_stays
from tweo_timm.rewrite.learned import learn_orthogonal, stream_samples
from tweo_timm.rewrite.methods import METHODS
from tweo_timm.rewrite.orthogonal import digest, turn
from tweo_timm.structure import Stage, Stream
from tweo_timm.suggestion import suggest


def rotate(
    model: nn.Module,
    method: str = "random",
    calibration_batches: Iterable[Tensor] | None = None,
    seed: int = 0,
    *,
    allow_rotated_features: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> RotationReport:
    """Rotate the residual stream of a model in place; what the model computes does not change.

    Args:
        model: a timm model, possibly wrapped by DDP or torch.compile; keys, shapes and dtypes stay.
        method: "random", "hadamard" (both work without images) or "learned" (descends from a random Q).
        calibration_batches: preprocessed image batches (B, C, H, W); None compares outputs on four generated images.
        seed: of the random matrix. It repeats on one machine; `report.rotations` holds the matrices.
        allow_rotated_features: take a model without a head too. Its features are in another basis then, without the
            last norm's gains and shift; `RotatedFeatures` takes them back.
        progress: called with a line of text now and then.

    Returns:
        The report: `output_error`, `sites` before and after, what was folded, what stayed and why.

    Raises:
        ValueError: with the reason, and nothing changed, for a model that cannot be rotated, one without a head, an
            unknown method, "learned" without images, and a model whose output would change by more than rounding.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: accepted are {', '.join(METHODS)}{suggest(method, list(METHODS))}")
    bare = unwrap_model(model)
    stream = describe_stream(bare)
    _refuse_headless(stream, allow_rotated_features)
    given = None if calibration_batches is None else image_batches(calibration_batches)
    if METHODS[method].learns and not given:
        raise ValueError("a learned rotation needs images to learn from: pass calibration_batches, or method='random'")
    batches = given or [generated_images(bare)]

    before = look(bare, stream, batches)
    edit = Edit(bare)
    folded = {name: words for stage in stream.stages for name, words in fold(edit, stage).items()}
    norms = {stage.name: fold_features(edit, stage) for stage in stream.stages if stage.features}
    rotations = _rotations(bare, stream, edit, method, batches, seed, progress)
    for stage in stream.stages:
        _turn_stage(edit, stage, rotations[stage.name])
    try:
        edit.apply()
        after = look(bare, stream, batches)
        error = _checked_error(bare, stream, before, after, rotations, norms)
    except BaseException:
        edit.undo()
        raise
    return RotationReport(
        method=method,
        seed=seed,
        output_error=error,
        images=len(before.outputs),
        sites=[Site(name, spread, after.spreads[name]) for name, spread in before.spreads.items()],
        folded=folded,
        left=stream.undescribed,
        digests={name: digest(rotation) for name, rotation in rotations.items()},
        rotations=rotations,
        norms=norms,
        rotated_features=stream.stages[-1].features is not None,
    )


def _refuse_headless(stream: Stream, allowed: bool) -> None:
    if any(stage.features is not None for stage in stream.stages) and not allowed:
        raise ValueError(
            "the model has no head (num_classes=0): its features would be in another basis, without the last norm's "
            "gains and shift, and everything that stands on them would be wrong. Give it a head that returns the "
            "features (add_feature_head, tweo-repair --as-head), or accept rotated ones (allow_rotated_features)"
        )


def _rotations(
    model: nn.Module,
    stream: Stream,
    edit: Edit,
    method: str,
    batches: Sequence[Tensor],
    seed: int,
    progress: Callable[[str], None],
) -> dict[str, Tensor]:
    """Draw a Q for each stage, and learn from there if asked to: on the folded model, whose norms are plain."""
    generator = torch.Generator().manual_seed(seed)
    draw = METHODS[method].draw.load()
    rotations: dict[str, Tensor] = {stage.name: draw(stage.width, generator) for stage in stream.stages}
    if not METHODS[method].learns:
        return rotations
    try:
        edit.apply()
        samples = stream_samples(model, stream, batches, generator)
    finally:
        edit.undo()
    for stage in stream.stages:
        progress(f"learning a rotation of {stage.name} from {len(samples[stage.name])} sites of width {stage.width}")
        rotations[stage.name] = learn_orthogonal(samples[stage.name], rotations[stage.name], progress=progress)
    return rotations


def _turn_stage(edit: Edit, stage: Stage, rotation: Tensor) -> None:
    """Note Q for every tensor of a stage, and for the shifts that stay in its norms."""
    for port in stage.ports:
        edit.then(port.name, partial(turn, rotation=rotation, axis=port.axis, copies=port.copies))
    for norm, readers in stage.norms.items():
        if readers and shift_stays(edit, norm, readers):
            copies = edit.shape(f"{norm}.bias")[0] // stage.width
            edit.then(f"{norm}.bias", partial(turn, rotation=rotation, axis=0, copies=copies))


def _checked_error(
    model: nn.Module,
    stream: Stream,
    before: View,
    after: View,
    rotations: dict[str, Tensor],
    norms: dict[str, dict[str, Tensor]],
) -> float:
    """Compare outputs, rotated features taken back first.

    Raises:
        ValueError: if they differ by more than rounding.
    """
    outputs = after.outputs
    last = stream.stages[-1]
    if last.features is not None:
        from tweo_timm.rewrite.features import RotatedFeatures

        features = RotatedFeatures(rotations, norms)
        parts = outputs.reshape(-1, last.width) if outputs.shape[1] % last.width == 0 else outputs
        outputs = features.unrotate(parts, last.name, normed=bool(last.features)).reshape(outputs.shape)
    error = output_error(before.outputs, outputs)
    if not error <= tolerance(model):
        raise ValueError(
            f"the model's output would change by {error:.2g} (relatively; rounding explains {tolerance(model):.0e}): "
            "something in it meets the stream and was not described; the model stays as it was"
        )
    return error
