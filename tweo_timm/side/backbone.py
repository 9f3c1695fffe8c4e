"""The frozen backbone: which it is, and what it computes in.

Weights are named by a fingerprint of their values, not by a path; what they do not tell, such as the number of heads,
by the architecture's arguments. A quantized backbone is the float one, the scheme and the calibration images: these
name it, so that it can be made again where a network is validated.

Refused: whatever `quantize_static` refuses. A backbone that is to be rotated (+rot, +rotr) is rotated here, before it
is quantized, so that its streams can be read in the basis that they had (basis.py).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from tweo_timm.fingerprint import fingerprint
from tweo_timm.quant.scheme import Scheme
from tweo_timm.quant.static import quantize_static
from tweo_timm.side.basis import OwnBasis
from tweo_timm.side.config import PRECISIONS

CALIBRATION_BATCH = 32
"""Images in a calibration batch, wherever a backbone is quantized."""
_LONGEST = 60  # characters of a text that an error shows


def prepare(
    backbone: nn.Module,
    arch: str,
    precision: str,
    calibration: Callable[[], Sequence[Tensor]],
    seed: int,
    blocks: str | None,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[nn.Module, OwnBasis | None, dict[str, Any]]:
    """Bring a float backbone into its precision.

    Args:
        backbone: without a head, with its weights; on its device.
        arch: timm's name of it.
        precision: "float32", "bfloat16", or a scheme of `quantize_static`.
        calibration: makes the calibration batches (B, C, H, W); called for schemes only.
        seed: by which they were chosen.
        blocks: regular expression naming the transformer blocks by hand.
        arguments: further ones of the architecture, by which the same weights may be another function: the number of
            heads, say. None is the same as nothing.

    Returns:
        The backbone; the basis that it had, if it was rotated; and what names it: arch and its arguments, fingerprint,
        precision and, for schemes, the calibration's images, seed and fingerprint.

    Raises:
        ValueError: it cannot be quantized in this way.
    """
    basis = None
    record: dict[str, Any] = {
        "arch": arch,
        "arguments": _recorded(arguments),
        "fingerprint": fingerprint(backbone.state_dict()),
        "precision": precision,
        "calibration": None,
    }
    if precision == "bfloat16":
        backbone.to(torch.bfloat16)
    elif precision not in PRECISIONS:
        scheme, batches = Scheme.parse(precision), list(calibration())
        images = {str(index): batch for index, batch in enumerate(batches)}
        count = sum(len(batch) for batch in batches)
        record["calibration"] = {"images": count, "seed": seed, "fingerprint": fingerprint(images)}
        try:
            if scheme.rotation:
                basis = OwnBasis.rotating(backbone, scheme.rotation_method, batches)
            backbone = quantize_static(backbone, batches, replace(scheme, rotation=""), blocks)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"a backbone in {precision} is not possible for {arch}: {error}") from error
    return backbone, basis, record


def _recorded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as JSON has them; the size of images is told by the weights and the features."""
    kept = {name: value for name, value in sorted(arguments.items()) if value is not None and name != "img_size"}
    found: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return found


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Say in what two descriptions of a network or a backbone differ: 'arch a, not b; ...'; empty if in nothing."""
    names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    parts = []
    for name in names:
        one, other = mine.get(name), theirs.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            parts.append(differences(one, other))
        else:
            parts.append("{} {}, not {}".format(name, *_shown(str(one), str(other))))
    return "; ".join(parts)


def _shown(one: str, other: str) -> Iterator[str]:
    """Two texts, of long ones what is around their first difference."""
    alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    begin = max(alike - _LONGEST // 3, 0) if max(len(one), len(other)) > _LONGEST else 0
    for text in (one, other):
        end = begin + _LONGEST
        yield f"{'...' if begin else ''}{text[begin:end]}{'...' if end < len(text) else ''}"
