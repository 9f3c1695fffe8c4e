"""From a quantized model to files, and the proof that the files compute the same: one record for a report.

The files run in onnxruntime over the images that the PyTorch model was scored on. Two things are compared: Top-1, and
the logits. Those cannot be equal bit by bit: a float operation that rounds differently (a fused softmax does) moves a
value across the edge between two integers, and later layers amplify that. So the difference is measured against what
quantization itself did, as `error_ratio`; and because some models amplify so much that they differ as far from
themselves, `self_error_ratio` is the same for the PyTorch model with every layer's input multiplied by 1.000001.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tweo_timm import machine
from tweo_timm.artefact import Artefact
from tweo_timm.quant.export import TARGETS, artefact_of, export_onnx, refusal_of, require_export_extra
from tweo_timm.quant.onnx_file import OnnxModel
from tweo_timm.quant.quantizer import QuantizedLayer
from tweo_timm.quant.sidecar import write_scales

_logger = logging.getLogger(__name__)

LATENCY_BATCH = 8
"""Images in the larger batch that latency is measured at, unless the loader's are smaller."""

JITTER = 1 + 1e-6
"""What layers' inputs are multiplied by to see how far a quantized model is from itself: some ten float32 roundings."""

ERROR_RATIO_LIMIT = 1.0
"""A file that is further from its model than quantization moved that model is not the model."""
DAMAGE_LIMIT = 2.0
"""A float16 file rounds each of a layer's inputs by up to a tenth of a step before int8 does, which puts a part of them
on the neighbouring integer: its error ratio is near 1 without a fault. It must be as near to the float model."""
RELATIVE_ERROR_LIMIT = 0.1
"""The same for a float file, whose logits differ from the model's by rounding alone: 1e-6 to 1e-3."""


class Agreement:
    """How far a file is from the model that it was exported from, over many batches."""

    def __init__(self) -> None:
        self._images = self._same = 0
        self._powers = torch.zeros(4, dtype=torch.float64)
        self._largest = 0.0

    def update(self, model: Tensor, file: Tensor, original: Tensor) -> None:
        """Count one batch of logits in: of the quantized model, of the file, and of the float model."""
        model, file, original = (logits.detach().cpu().double() for logits in (model, file, original))
        self._images += len(model)
        self._same += int((model.argmax(-1) == file.argmax(-1)).sum())
        pairs = ((file, model), (model, original), (file, original), (model, torch.zeros(())))
        self._powers += torch.stack([(one - other).square().sum() for one, other in pairs])
        self._largest = max(self._largest, float((file - model).abs().max()))

    def summary(self) -> dict[str, Any]:
        """Return the measures as plain numbers.

        Returns:
            top1_agreement (share of images with the same first class), relative_error (norm of the difference of logits
            over norm of the model's), max_abs_error, error_ratio (norm of that difference over the norm of what
            quantization changed) and damage_ratio (what quantization and export changed together, over the same); both
            None for a float model.
        """
        error, quantization, damage, signal = self._powers.sqrt().tolist()
        return {
            "top1_agreement": self._same / max(self._images, 1),
            "relative_error": error / signal if signal else None,
            "max_abs_error": self._largest,
            "error_ratio": error / quantization if quantization else None,
            "damage_ratio": damage / quantization if quantization else None,
        }


def export_record(
    model: nn.Module,
    quantized: nn.Module | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    path: str | Path,
    targets: Iterable[str] = TARGETS,
    float_file: str | Path | None = None,
    *,
    input_dtype: str = "float32",
    dtype: str = "float32",
    artefact: Artefact | None = None,
) -> dict[str, Any]:
    """Export a model, run the files over images, and say how well they do, how fast, and which nodes run in int8.

    Args:
        model: the float model, in evaluation mode.
        quantized: what `quantize_static` made of it; None exports the float model.
        batches: (images (B, C, H, W), targets (B,)), such as timm's loaders give, on the model's device.
        path: of the first target's file, ending in .onnx; others are put beside it: name.onnxruntime.onnx, and
            name.scales.json with the scales.
        targets: see `export_onnx`; a float model has one file for all.
        float_file: the float model as an ONNX file, to compare with, where there is one already.
        input_dtype: what the files take, see `export_onnx`; uint8 pixels are got back from the images.
        dtype: of what stays float in the files, see `export_onnx`.
        artefact: what is known for the files to say, see `export_onnx`.

    Returns:
        scheme, artefact (what the files say of themselves, as JSON), images, top1 (of the PyTorch model that was
        exported, per cent), self_error_ratio (what an error_ratio without an error looks like: the PyTorch model's own
        on the first batch, with `JITTER`; None for a float model), scales (path or None), files: one dict for each
        target with path, size_mb, top1, the measures of `Agreement`, fault (see `fault_of`), nodes (see `node_census`),
        folded, kept and fused, and latency: what `measure_latency` finds at batch 1 and at that of `batches`, at most
        8, for the float32 model, its dynamic int8 form, and each target; empty for a float model, which has no rival.

    Raises:
        RuntimeError: without the extra, or if the model, or the float model it is compared with, cannot be exported.
        ValueError: without images, for another ending of `path`, or for schemes that cannot be exported.
    """
    require_export_extra()
    from tweo_timm.quant.latency import measure_latency, write_rivals
    from tweo_timm.quant.ort import node_census

    path, exported = Path(path), model if quantized is None else quantized
    if path.suffix != ".onnx":
        raise ValueError(f"the file to export to is {str(path)!r}; its name ends in .onnx")
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("an export is checked on at least one image")
    example, targets = first[0][:2], list(targets) if quantized is not None else ["qdq"]
    for target, refusal in [(target, refusal_of(exported, target, dtype)) for target in targets]:
        if refusal and len(targets) > 1:
            targets.remove(target)
            _logger.info("%s: left out: %s", path.name, refusal)
    said = artefact_of(exported, example, artefact, dtype)
    files: list[dict[str, Any]] = []
    for index, target in enumerate(targets):
        to = path if index == 0 else path.with_suffix(f".{target}.onnx")
        form: dict[str, Any] = {"target": target, "input_dtype": input_dtype, "dtype": dtype}
        files.append(export_onnx(exported, to, example, **form, artefact=said))
        _logger.info("Wrote %s", to)
    scales = path.with_suffix(".scales.json") if quantized is not None else None
    if quantized is not None and scales is not None:
        write_scales(quantized, scales, said)
    with tempfile.TemporaryDirectory() as folder:
        rivals = write_rivals(model, example, Path(folder), float_file) if quantized is not None else {}
        top1, images, self_error_ratio = _run_over(itertools.chain([first], batches), model, quantized, files)
        # not earlier: until its last batch is taken, a loader's processes go on reading
        contestants = rivals | {file["target"]: Path(file["path"]) for file in files}
        latency = measure_latency(contestants, first[0][:LATENCY_BATCH]) if rivals else []
    for file in files:
        size = Path(file["path"]).stat().st_size / 1e6
        file |= {"size_mb": round(size, 3), "nodes": node_census(file["path"])}
        file["fault"] = fault_of(file, self_error_ratio)
        _logger.info("%s: Top-1 %.2f, in PyTorch %.2f", Path(file["path"]).name, file["top1"], top1)
    return {
        "scheme": files[0]["scheme"],
        "artefact": said.to_json(),
        "images": images,
        "top1": top1,
        "self_error_ratio": self_error_ratio,
        "scales": str(scales) if scales else None,
        "files": files,
        "latency": latency,
    }


def fault_of(file: Mapping[str, Any], self_error_ratio: float | None) -> str | None:
    """Say what is wrong with a file that is too far from its model, and what to do; None for one that is not.

    Args:
        file: its path, dtype, error_ratio, damage_ratio and relative_error.
        self_error_ratio: of the quantized model, None for a float one.
    """
    ratio, relative = file["error_ratio"], file["relative_error"]
    off, here = f"{Path(file['path']).name} is off", _processor()
    if ratio is None:
        if relative is None or relative <= RELATIVE_ERROR_LIMIT:
            return None
        how_far = f"differ from the model's by {relative:.3g} of their norm (accepted: {RELATIVE_ERROR_LIMIT:g})"
        return f"{off}: its logits {how_far} on {here}; do not use it here: try another version of onnxruntime"
    if file.get("dtype") == "float16":
        damage = file["damage_ratio"]
        return (
            None
            if damage <= DAMAGE_LIMIT
            else (
                f"{off}: it is {damage:.3g} times as far from the float model as the quantized model is (accepted: "
                f"{DAMAGE_LIMIT:g}) on {here}; do not use it here: leave out --export-dtype float16"
            )
        )
    if ratio <= ERROR_RATIO_LIMIT:
        return None
    itself = "" if self_error_ratio is None else f"; the model from itself: {self_error_ratio:.3g}"
    return (
        f"{off}: its error ratio is {ratio:.3g} (accepted: {ERROR_RATIO_LIMIT:g}{itself}) on {here}; do not use it "
        "here: export weights of 7 bits (--quantize w7a8-tt), whose products saturate nowhere, and open files with the "
        "session options in their metadata (docs/export.md). A model that is as far from itself magnifies rounding: no "
        "file of it can be checked"
    )


def _processor() -> str:
    """The processor in a message, and whether int8 products are exact on it as they come."""
    found = machine.describe()
    instructions = f" ({', '.join(found['instructions'])})" if found["instructions"] else ""
    exact = "saturate unless a session is told otherwise" if machine.int8_saturates() else "are exact"
    return f"{found['processor']}{instructions}, where int8 products {exact}"


def self_error_ratio_of(quantized: nn.Module, images: Tensor, wanted: Tensor, original: Tensor) -> float | None:
    """How far the quantized model is from itself when every layer's input is multiplied by `JITTER`.

    `wanted` are its own logits of the images, `original` those of the float model.
    """
    itself = Agreement()
    with contextlib.ExitStack() as stack:
        for layer in quantized.modules():
            if isinstance(layer, QuantizedLayer):
                stack.callback(layer.register_forward_pre_hook(lambda _, args: (args[0] * JITTER, *args[1:])).remove)
        itself.update(wanted, quantized(images), original)
    ratio: float | None = itself.summary()["error_ratio"]
    return ratio


def _run_over(
    batches: Iterable[tuple[Tensor, Tensor]],
    model: nn.Module,
    quantized: nn.Module | None,
    files: list[dict[str, Any]],
) -> tuple[float, int, float | None]:
    """Put Top-1 and agreement over images into the files' dicts.

    Returns:
        Top-1 of the exported model, the number of images, and its self error ratio on the first batch.
    """
    runs = [OnnxModel(file["path"]) for file in files]
    agreements = [Agreement() for _ in files]
    correct, images, self_error_ratio = torch.zeros(1 + len(files)), 0, None
    with torch.inference_mode():
        for x, y in batches:
            original = model(x)
            reference = original if quantized is None else quantized(x)
            if quantized is not None and not images:
                self_error_ratio = self_error_ratio_of(quantized, x, reference, original)
            logits = [run(x) for run in runs]
            for agreement, got in zip(agreements, logits, strict=True):
                agreement.update(reference, got, original)
            correct += torch.tensor([float((z.argmax(-1) == y).sum()) for z in (reference, *logits)])
            images += len(x)
    top1 = (100 * correct / images).tolist()
    for file, agreement, percent in zip(files, agreements, top1[1:], strict=True):
        file |= {"top1": percent, **agreement.summary()}
    return top1[0], images, self_error_ratio
