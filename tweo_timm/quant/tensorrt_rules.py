"""Rules that TensorRT has for a quantized ONNX file, checked in the graph: the model is not run, and no GPU is needed.

A file that breaks one is refused by the engine, or runs in float where it was to run in 8 bits. Whether an engine
follows them is not ours to say: TensorRT was not run by us. Files of target "qdq" keep them all.

Weights in 4 bits, in blocks, are TensorRT's too: nothing is said of their scales. Where a weight is moved between its
scales and its product in a way that mixes axes, nothing is said of its axis.

Source: NVIDIA's TensorRT documentation, "Working with Quantized Types" and "Q/DQ Layer-Placement Recommendations", the
pages of its operators Quantize and Dequantize, and what its ONNX parser asserts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tweo_timm.quant.export import require_export_extra
from tweo_timm.quant.onnx_graph import MOVING, Graph, attribute, data_type, read_graph

# The operators of domain "trt" are those that NVIDIA's own tools write.
_QUANTIZE = frozenset({"QuantizeLinear", "TRT_FP8QuantizeLinear", "TRT_INT4QuantizeLinear"})
_DEQUANTIZE = frozenset({"DequantizeLinear", "TRT_FP8DequantizeLinear", "TRT_INT4DequantizeLinear"})
_ROUNDING = _QUANTIZE | _DEQUANTIZE
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
_STANDARD = ("", "ai.onnx", "trt", "trt.plugins")
_INTEGER_OPERATORS = {"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"}
_AFTER = ("Add", "Sub", "Mul", "Div")
_EIGHT_BITS = {"INT8": "INT8", "UINT8": "UINT8", "FLOAT8E4M3FN": "FP8"}
_FOUR_BITS = {"INT4": "INT4", "FLOAT4E2M1": "FP4"}


@dataclass(frozen=True)
class Violation:
    """One place where a file breaks a rule.

    Attributes:
        rule: its name in `RULES`.
        node: the name of the node, or of its output, or of the input of the file.
        problem: what is wrong there, and what to do.
    """

    rule: str
    node: str
    problem: str


def check_tensorrt_rules(path: str | Path) -> list[Violation]:
    """Return every place of an ONNX file that breaks one of `RULES`; an empty list for a file that keeps them.

    Args:
        path: an ONNX file; of tensors in a file beside it only scales and zero points are read.

    Raises:
        RuntimeError: without the extra `export`.
        ValueError: if it is no ONNX file, or a scale or zero point cannot be read.
    """
    require_export_extra()
    graphs = list(read_graph(path).with_inner())
    return [
        Violation(name, node, problem)
        for name, rule in RULES.items()
        for graph in graphs
        for node, problem in rule(graph)
    ]


def _roundings(graph: Graph) -> Iterator[Any]:
    return (node for node in graph.nodes if node.op_type in _ROUNDING)


def _kind(graph: Graph, node: Any) -> str:
    """What a rounding node stores: INT8, FP8, UINT8, INT4, FP4, another type in ONNX's words, or "" where unknown."""
    stored = _stored(graph, node)
    return {**_EIGHT_BITS, **_FOUR_BITS}.get(stored, stored)


def _stored(graph: Graph, node: Any) -> str:
    if node.op_type.startswith("TRT_"):  # its name says what it stores
        return str(node.op_type.removeprefix("TRT_").removesuffix("DequantizeLinear").removesuffix("QuantizeLinear"))
    if _zero_point(node):
        return graph.type_of(_zero_point(node))
    if node.op_type in _QUANTIZE:
        return data_type(attribute(node, "output_dtype", 0)) or "UINT8"  # ONNX's default
    made = graph.made.get(graph.origin(node.input[0], MOVING))
    return graph.type_of(node.input[0]) if made is None or made.op_type not in _QUANTIZE else _stored(graph, made)


def _zero_point(node: Any) -> str:
    """Its name; "" for none."""
    return str(node.input[2]) if len(node.input) > 2 else ""


def _label(node: Any) -> str:
    return str(node.name or node.output[0])


def _symmetric(graph: Graph) -> Iterator[tuple[str, str]]:
    for node in _roundings(graph):
        kind, zero = _kind(graph, node), _zero_point(node)
        entries = graph.array(zero) if zero else None
        if kind == "UINT8":
            yield _label(node), "stores uint8: quantize to int8 with zero point 0"
        elif kind == "INT4" and not graph.is_constant(node.input[0]):
            yield _label(node), "stores an activation in int4, which is for weights alone: quantize to int8 or E4M3"
        elif kind == "INT32":
            yield _label(node), "stores int32: leave biases in float"
        elif kind not in (*_EIGHT_BITS.values(), *_FOUR_BITS.values()):
            yield _label(node), f"stores {kind.lower() or 'an unknown type'}, not int8 or E4M3: quantize to one of them"
        elif zero and entries is None:
            yield _label(node), "takes its zero point from other nodes: give it a constant one, 0"
        elif entries is not None and entries.astype("float32").any():
            yield _label(node), "has a zero point other than 0: quantize symmetrically (without +zero)"


def _per_tensor(graph: Graph) -> Iterator[tuple[str, str]]:
    for node in _roundings(graph):
        scale = graph.array(node.input[1])
        if scale is None:
            yield _label(node), "takes its scale from other nodes: give activations one static scale per tensor"
        elif scale.size != 1 and not graph.is_constant(node.input[0]) and _kind(graph, node) not in _FOUR_BITS.values():
            yield _label(node), f"gives an activation {scale.size} scales: give it one per tensor"


def _positive(graph: Graph) -> Iterator[tuple[str, str]]:
    for node in _roundings(graph):
        scale = graph.array(node.input[1])
        if scale is not None and not (scale.astype("float32") > 0).all():
            yield _label(node), "has a scale that is not above 0: calibrate with images that reach it"


def _weight_axis(graph: Graph) -> Iterator[tuple[str, str]]:
    for product in graph.nodes:
        for index, name in enumerate(product.input[:2] if product.op_type in _PRODUCTS else ()):
            axis = _channels(product, index, len(graph.shape_of(name) or (0, 0)))
            for node, wanted in _scales_of(graph, name, axis):
                yield from _off_axis(graph, node, wanted)


def _channels(product: Any, index: int, rank: int) -> int | None:
    """Which axis of an operand of a product holds the output channels; None where none does."""
    if product.op_type == "Gemm":
        turned = bool(attribute(product, "transB" if index else "transA", 0))
        return int(bool(index) != turned)
    if product.op_type == "MatMul":
        return (rank - 1 if index else rank - 2) if rank > 1 else None
    return int(product.op_type == "ConvTranspose") if index else None


def _scales_of(graph: Graph, name: str, axis: int | None) -> Iterator[tuple[Any, int | None]]:
    """What scales the weights of a value, and the axis there that is an axis of the value."""
    node = graph.made.get(name)
    if node is None or not graph.is_constant(name):
        return
    if node.op_type in _ROUNDING:
        yield node, axis
        yield from _scales_of(graph, node.input[0], axis)
    elif node.op_type in MOVING:
        for value in node.input if node.op_type == "Concat" else node.input[:1]:
            yield from _scales_of(graph, value, graph.axis_before(node, axis))


def _off_axis(graph: Graph, node: Any, wanted: int | None) -> Iterator[tuple[str, str]]:
    scale, shape = graph.array(node.input[1]), graph.shape_of(node.input[0])
    if scale is None or scale.size == 1 or _kind(graph, node) in _FOUR_BITS.values():
        return
    if scale.ndim > 1 or attribute(node, "block_size", 0):
        yield _label(node), "has a scale for each block of a weight in 8 bits: take one for each output channel"
    elif shape and wanted is not None and (axis := attribute(node, "axis", 1) % len(shape)) != wanted:
        yield _label(node), f"has a scale for each entry of axis {axis}: take the output channels, axis {wanted}"


def _residual(graph: Graph) -> Iterator[tuple[str, str]]:
    """An add is residual if one side takes part in the other, which a product ends."""
    for add in graph.nodes:
        if add.op_type not in ("Add", "Sum") or len(add.input) != 2 or any(map(graph.is_constant, add.input)):
            continue
        for skip, branch in itertools.permutations(add.input):
            if _is_rounded(graph, branch) and _is_product(graph, branch) and _is_before(graph, skip, branch):
                what = "both sides" if _is_rounded(graph, skip) else "its branch and not the skip side"
                yield _label(add), f"adds with {what} quantized: quantize the skip side alone, so that the add is fused"


def _is_rounded(graph: Graph, name: str) -> bool:
    made = graph.made.get(graph.origin(name, MOVING))
    return made is not None and made.op_type in _DEQUANTIZE


def _is_before(graph: Graph, name: str, end: str) -> bool:
    return graph.reaches(graph.origin(name, MOVING | _ROUNDING), end)


def _is_product(graph: Graph, name: str) -> bool:
    """Whether a value comes from a product, through moves, roundings, and constants added or multiplied."""
    while name in graph.made and (made := graph.made[name]).op_type not in _PRODUCTS:
        values = [value for value in made.input if value and not graph.is_constant(value)]
        moved = made.op_type in MOVING | _ROUNDING
        if not values or not (moved or (made.op_type in _AFTER and len(values) == 1)):
            return False
        name = values[0]
    return name in graph.made


def _one_kind(graph: Graph) -> Iterator[tuple[str, str]]:
    if graph.outer is None:
        every = [(inner, node) for inner in graph.with_inner() for node in _roundings(inner)]
        kinds = {_kind(inner, node): _label(node) for inner, node in every}
        if "FP8" in kinds and kinds.keys() & {"INT8", "UINT8"}:
            yield kinds["FP8"], "is FP8 in a file that has INT8 too: use one of them"


def _dynamic_batch(graph: Graph) -> Iterator[tuple[str, str]]:
    for value in graph.inputs if graph.outer is None else ():
        shape = graph.shape_of(value.name)
        if shape and shape[0] > 0:
            yield value.name, f"takes {shape[0]} images alone: export with a dynamic batch"


def _standard(graph: Graph) -> Iterator[tuple[str, str]]:
    for node in graph.nodes:
        if node.domain not in _STANDARD:
            yield _label(node), f"is {node.domain}::{node.op_type}, of another engine: export for target 'qdq'"
        elif node.op_type in _INTEGER_OPERATORS:
            yield (
                _label(node),
                f"is {node.op_type}: TensorRT takes QuantizeLinear and DequantizeLinear around a product",
            )


RULES: dict[str, Callable[[Graph], Iterator[tuple[str, str]]]] = {
    "symmetric": _symmetric,
    "per-tensor activations": _per_tensor,
    "positive scales": _positive,
    "weight axis": _weight_axis,
    "residual add": _residual,
    "one kind of 8 bits": _one_kind,
    "dynamic batch": _dynamic_batch,
    "standard operators": _standard,
}
"""Every rule by its name: node and problem of each violation in a graph."""
