"""Static scales beside the weights: a JSON file, named by module, that any engine's importer can read.

An engine with a calibration cache of its own needs the numbers, not our graph. One file holds the steps of all layers
and sites; a value is its integer, less the zero point (0 but with +zero), times the step; integers are within
+-(2^(bits-1) - 1).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from timm.utils import unwrap_model
from torch import nn

from tweo_timm.artefact import Artefact
from tweo_timm.outputs import Outputs
from tweo_timm.quant.compensate import fold_compensation
from tweo_timm.quant.quantizer import QuantizedLayer
from tweo_timm.quant.static import quantization_scales

SCHEMA = 1


def write_scales(model: nn.Module, path: str | Path, artefact: Artefact | None = None) -> dict[str, Any]:
    """Write every scale of a quantized model as JSON; docs/export.md describes the fields.

    Compensations are folded first, as in an exported file; a layer whose bias changed by that has it in its entry.

    Args:
        model: what `quantize_static` returned; it is not changed.
        path: the file to write.
        artefact: what the exported file says of itself, which this one then says too.

    Returns:
        What was written: schema, scheme, calibration_images, unused_layers, scales (by module name), and the fields of
        the artefact.

    Raises:
        ValueError: if the model has no quantized layer.
    """
    working = copy.deepcopy(unwrap_model(model))
    folded = fold_compensation(working)["folded"]
    scales = quantization_scales(working)
    for name in folded:
        layer = working.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        assert layer.bias is not None
        scales[name]["bias"] = layer.bias.tolist()
    report: Any = getattr(working, "quantization", {})
    content = {
        "schema": SCHEMA,
        **({} if artefact is None else artefact.to_json()),
        "scheme": report.get("scheme"),
        "calibration_images": report.get("calibration_images"),
        "unused_layers": report.get("unused_layers", []),
        "scales": scales,
    }
    Outputs(Path(path).parent).write(Path(path).name, json.dumps(content, indent=1) + "\n")
    return content


def read_scales(path: str | Path) -> dict[str, Any]:
    """Read what `write_scales` wrote.

    Raises:
        ValueError: if the file is not such a file, or of another schema.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or "scales" not in content:
        raise ValueError(f"{path} is no file of scales with schema {SCHEMA}: write it with write_scales")
    return content
