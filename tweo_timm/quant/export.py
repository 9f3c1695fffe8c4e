"""ONNX files of float and of statically quantized models, checked in onnxruntime.

Fake quantization shows what int8 costs; a file that an engine runs in int8 is what a user deploys. Two targets:

    qdq           standard ONNX operators only. Every quantized operand passes QuantizeLinear and DequantizeLinear with
                  its frozen scale, int8 and zero point 0: what TensorRT, OpenVINO and onnxruntime look for.
    onnxruntime   the same integers with the operators that onnxruntime's CPU provider computes them with, bias
                  included: its own optimizer leaves the bias, and with it half of the speed, outside.

Every node reads integers of its own, and a file says in its metadata how it is used (`tweo_timm.artefact`): how images
are prepared, what its classes are, and what a session needs to be exact where int8 products saturate (docs/export.md).

Opset 20, the first with a Gelu operator. The batch is dynamic, height and width are those of the example.
Needs the extra `export`. Refused: schemes with steps computed at run time, and models that torch.export cannot trace.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tweo_timm.artefact import FLOAT, Artefact, Preprocessing
from tweo_timm.extras import installation
from tweo_timm.flow import name_of
from tweo_timm.machine import EXACT_INT8
from tweo_timm.quant.compensate import fold_compensation
from tweo_timm.quant.float8 import Float8Quantizer
from tweo_timm.quant.float16_file import Float16Inside, in_precision
from tweo_timm.quant.pixels import FromPixels
from tweo_timm.quant.qdq import stand_in
from tweo_timm.quant.quantizer import QuantizedLayer, Quantizer
from tweo_timm.quant.scheme import INTEGERS, Scheme, refuse_not_exportable
from tweo_timm.quant.stream import StreamQuantizer

OPSET = 20
TARGETS = ("qdq", "onnxruntime")
INPUTS = ("float32", "uint8")
DTYPES = ("float32", "float16")
INPUT, OUTPUT = "images", "logits"
_EXTRA = ("onnx", "onnxruntime", "onnxscript")


def require_export_extra() -> None:
    """Check that the extra is installed; call it before a long run that ends in an export.

    Raises:
        RuntimeError: naming what is missing and the command that installs it.
    """
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"ONNX export needs {', '.join(missing)}: {installation('export')}")


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example: Tensor,
    *,
    target: str = "qdq",
    dynamic_batch: bool = True,
    input_dtype: str = "float32",
    dtype: str = "float32",
    artefact: Artefact | None = None,
) -> dict[str, Any]:
    """Write a model as an ONNX file with input `images` and output `logits` (batch, classes), float32.

    Args:
        model: a float model, or what `quantize_static` returned; it is not changed.
        path: the file to write; one file holds all (2 GB at most).
        example: images (B, C, H, W) of the size that the file is for; their values do not matter.
        target: "qdq" or "onnxruntime", see the module's docstring; a float model is the same for both.
        dynamic_batch: any number of images; False fixes it to the example's.
        input_dtype: "float32": normalized images (batch, C, H, W); "uint8": pixels (batch, H, W, C), which the graph
            normalizes.
        dtype: "float32" or "float16": of what stays float inside, scales and biases included.
        artefact: what is known of preprocessing, class names and calibration, for the file to say; None: the
            preprocessing that timm knows of the model. Scheme and session options are the model's in either case.

    Returns:
        path, target, opset, scheme (None for a float model), folded and kept (layers whose compensation went into
        scales and bias, and blocks whose compensation stays a node), fused (operators that
        "onnxruntime" brought in: name -> count), input_dtype, dtype.

    Raises:
        RuntimeError: without the extra, or if torch.export cannot trace the model, with its reason.
        ValueError: for another target, input or precision, a scheme that no such file can have (steps computed at run
            time, half precision, zero points for "qdq", E4M3 or float16 for "onnxruntime"), numbers that float16 cannot
            hold, or uint8 input without a known preprocessing.

    Source: ONNX operators QuantizeLinear and DequantizeLinear, opset 19; the scheme is arXiv:2511.23225's.
    """
    require_export_extra()
    from tweo_timm.quant.ort import fuse_for_onnxruntime, separate_integers

    form = (("target", target, TARGETS), ("input_dtype", input_dtype, INPUTS), ("dtype", dtype, DTYPES))
    for name, value, accepted in form:
        if value not in accepted:
            raise ValueError(f"{name} is {value!r}; accepted are {', '.join(accepted)}")
    if refusal := refusal_of(model, target, dtype):
        raise ValueError(refusal)
    scheme = getattr(unwrap_model(model), "quantization", {}).get("scheme")
    refuse_not_exportable(scheme, dtype)
    said = artefact_of(model, example, artefact, dtype)
    working = _working_copy(model)
    folds = fold_compensation(working) if scheme else {"folded": [], "kept": []}
    if any(isinstance(module, QuantizedLayer) for module in working.modules()):
        stand_in(working, unsigned=target == "onnxruntime")
    if dtype == "float16":
        working = Float16Inside(working).eval()
    example = example.detach().float().cpu()
    if input_dtype == "uint8":
        working, example = _from_pixels(working, said.preprocessing), example.permute(0, 2, 3, 1).to(torch.uint8)
    fused: dict[str, int] = {}
    with _quiet():
        program = _traced(working, example, dynamic_batch)
        if target == "onnxruntime":
            fused = fuse_for_onnxruntime(program.model)
        separate_integers(program.model)
        program.model.metadata_props.update(said.to_metadata())
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        program.save(str(path))
    found = {"path": str(path), "target": target, "opset": OPSET, "scheme": scheme, **folds, "fused": fused}
    return found | {"input_dtype": input_dtype, "dtype": dtype}


def artefact_of(
    model: nn.Module, example: Tensor, artefact: Artefact | None = None, dtype: str = "float32"
) -> Artefact:
    """Complete what is known of a model by what it says itself: scheme, session options, and else timm's preprocessing.

    Args:
        model: a float model, or what `quantize_static` returned.
        example: images (B, C, H, W) of the size that it is for.
        artefact: what is known; None for nothing.
        dtype: of what stays float; a float model in float16 has the scheme fp16.
    """
    report: Any = getattr(unwrap_model(model), "quantization", {})
    scheme = report.get("scheme")
    parsed = Scheme.parse(scheme) if scheme else None
    saturable = parsed is not None and parsed.base == INTEGERS and parsed.weight_bits == 8
    said = artefact or Artefact(preprocessing=_of_timm(model, example), arch=_architecture(model))
    if scheme is None:
        return replace(said, scheme=FLOAT if dtype == "float32" else "fp16", session_options={}, calibration=None)
    calibration = {"images": report.get("calibration_images"), "method": report.get("calibration")}
    calibration |= said.calibration or {}
    return replace(said, scheme=scheme, session_options=EXACT_INT8 if saturable else {}, calibration=calibration)


def _of_timm(model: nn.Module, example: Tensor) -> Preprocessing | None:
    """What timm knows of a model's images; None where it knows nothing."""
    if not getattr(unwrap_model(model), "pretrained_cfg", None):
        return None
    return Preprocessing.of(resolve_model_data_config(unwrap_model(model), {"input_size": tuple(example.shape[1:])}))


def _architecture(model: nn.Module) -> str | None:
    config: Any = getattr(unwrap_model(model), "pretrained_cfg", None) or {}
    name = config.get("architecture")
    return name if isinstance(name, str) else None


def _from_pixels(model: nn.Module, preprocessing: Preprocessing | None) -> nn.Module:
    if preprocessing is None:
        raise ValueError(
            "input_dtype 'uint8' puts the normalization into the file, which nobody knows: pass an artefact"
        )
    return FromPixels(model, preprocessing).eval()


def refusal_of(model: nn.Module, target: str, dtype: str = "float32") -> str:
    """Return why a model has no file for a target in a precision; "" where it has one.

    Args:
        model: a float model, or what `quantize_static` returned.
        target: "qdq" or "onnxruntime".
        dtype: of what stays float.
    """
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    if target == "qdq" and any(quantizer.zero_point for quantizer in quantizers):
        return (
            "target 'qdq' takes no zero points (+zero): TensorRT, one of its readers, multiplies symmetric integers "
            "alone; export for target 'onnxruntime', or quantize without +zero"
        )
    if target == "onnxruntime" and any(isinstance(quantizer, Float8Quantizer) for quantizer in quantizers):
        return "target 'onnxruntime' multiplies integers, not E4M3: export for target 'qdq'"
    if target == "onnxruntime" and quantizers and dtype == "float16":
        return "target 'onnxruntime' has operators that return float32: export float16 for target 'qdq'"
    return ""


def _working_copy(model: nn.Module) -> nn.Module:
    """Copy a model to the CPU in float32, its attention written out as two products, which engines fuse best.

    A quantized stream counts a block's additions and products, so there attention stays as it was in calibration.
    """
    working: nn.Module = in_precision(copy.deepcopy(unwrap_model(model)).cpu(), torch.float32).eval()
    if any(isinstance(module, StreamQuantizer) for module in working.modules()):
        return working
    attention: Any
    for attention in working.modules():
        if hasattr(attention, "fused_attn"):
            attention.fused_attn = False
    return working


def _traced(model: nn.Module, example: Tensor, dynamic_batch: bool) -> Any:
    """Trace with torch.onnx; two images at least, because torch.export takes a batch of one for a constant."""
    if dynamic_batch and len(example) < 2:
        example = torch.cat([example, example])
    shapes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    try:
        with torch.no_grad(), _FourAxes():
            return torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except Exception as error:  # torch.export raises many kinds; all of them mean the same to a user
        reason = _root(error)
        hint = "; a fixed batch may work: export_onnx(..., dynamic_batch=False)" if dynamic_batch else ""
        raise RuntimeError(f"{type(model).__name__} cannot be exported to ONNX: {reason}{hint}") from error


class _FourAxes(TorchFunctionMode):
    """Fused attention over four axes, for which alone torch.onnx has a translation.

    Windows are an axis more in Hiera, NesT and Twins; heads and images are one axis in SAM.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if name_of(func) != "scaled_dot_product_attention" or len(args) != 3 or args[0].ndim == 4:
            return func(*args, **kwargs)
        query, key, _ = args
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.ndim == query.ndim:
            kwargs["attn_mask"] = _over_four_axes(mask.expand(*query.shape[:-1], key.shape[-2]))
        attended = func(*map(_over_four_axes, args), **kwargs)
        return attended.squeeze(1) if query.ndim == 3 else attended.unflatten(0, query.shape[:-3])


def _over_four_axes(x: Tensor) -> Tensor:
    return x.unsqueeze(1) if x.ndim == 3 else x.flatten(0, x.ndim - 4)


def _root(error: BaseException) -> str:
    """The first line that says something of the innermost error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter and its tools say about their own internals, which no user can act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
