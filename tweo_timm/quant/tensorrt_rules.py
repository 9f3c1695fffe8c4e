"""Rules that TensorRT has for a quantized ONNX file, checked in the graph: nothing is run, and no GPU is needed.

A file that breaks one is refused by the engine, or runs in float where it was to run in 8 bits. Whether an engine
follows them is not ours to say: TensorRT was not run by us. Files of target "qdq" keep them all.

Source: NVIDIA's TensorRT documentation, "Working with Quantized Types" and "Q/DQ Layer-Placement Recommendations".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tweo_timm.quant.export import require_export_extra

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_PRODUCTS = {"MatMul", "Gemm", "Conv"}
_PASSING = {"Reshape", "Transpose", "Slice", "Concat", "Squeeze", "Unsqueeze", "Pad", "Identity", "Flatten", "Cast"}
_STANDARD = ("", "ai.onnx")
_INTEGER_OPERATORS = {"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"}


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
        path: an ONNX file; weights in a file beside it are not read.

    Raises:
        RuntimeError: without the extra `export`.
        ValueError: if it is no ONNX file.
    """
    require_export_extra()
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # protobuf's, which is no public name
        raise ValueError(f"{path} is no ONNX file: {error}") from error
    graph = _Graph(model)
    return [Violation(name, node, problem) for name, rule in RULES.items() for node, problem in rule(graph)]


class _Graph:
    """Nodes, what made each value, and constants."""

    def __init__(self, model: Any) -> None:
        from onnx import TensorProto

        self.nodes = list(_nodes(model.graph))
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.made = {name: node for node in self.nodes for name in node.output}
        self.inputs = [value for value in model.graph.input if value.name not in self.constants]
        self._kinds = {TensorProto.FLOAT8E4M3FN: "FP8", TensorProto.INT8: "INT8", TensorProto.UINT8: "UINT8"}

    def roundings(self) -> Iterator[Any]:
        """Every QuantizeLinear and DequantizeLinear."""
        return (node for node in self.nodes if node.op_type in (_QUANTIZE, _DEQUANTIZE))

    def is_constant(self, name: str) -> bool:
        """Whether a value is a constant, or a constant that was quantized."""
        made = self.made.get(name)
        return name in self.constants or (
            made is not None and made.op_type == _QUANTIZE and self.is_constant(made.input[0])
        )

    def kind(self, node: Any) -> str | None:
        """The type that a rounding node stores in: INT8, FP8, UINT8; None for one that is not known.

        A node without a zero point takes its type from what it reads; QuantizeLinear has uint8 then.
        """
        of_type = node.input[2] if len(node.input) > 2 and node.input[2] else node.input[0]
        tensor = self.constants.get(of_type)
        if tensor is None and node.op_type == _DEQUANTIZE and node.input[0] in self.made:
            return self.kind(self.made[node.input[0]]) if self.made[node.input[0]].op_type == _QUANTIZE else None
        if tensor is None:
            return "UINT8" if node.op_type == _QUANTIZE else None
        return self._kinds.get(tensor.data_type)

    def elements(self, name: str) -> int | None:
        """How many numbers a constant has; None for what is none."""
        tensor = self.constants.get(name)
        return None if tensor is None else int(np.prod(tensor.dims, dtype=np.int64))

    def dequantized(self, name: str) -> Any:
        """The DequantizeLinear that made a value, through operators that move values alone; None if none did."""
        made = self.made.get(name)
        while made is not None and made.op_type in _PASSING:
            made = self.made.get(made.input[0])
        return made if made is not None and made.op_type == _DEQUANTIZE else None

    def is_branch(self, name: str) -> bool:
        """Whether a value comes from a product, through moves, roundings, and constants added or multiplied."""
        made = self.made.get(name)
        while made is not None and made.op_type not in _PRODUCTS:
            data = [value for value in made.input if value and not self.is_constant(value)]
            if made.op_type in (*_PASSING, _QUANTIZE, _DEQUANTIZE):
                data = data[:1]
            elif made.op_type not in ("Add", "Mul") or len(data) != 1:
                return False
            made = self.made.get(data[0]) if data else None
        return made is not None


def _nodes(graph: Any) -> Iterator[Any]:
    """The nodes of a graph and of the graphs inside them, such as the branches of an If."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _label(node: Any) -> str:
    return str(node.name or node.output[0])


def _symmetric(graph: _Graph) -> Iterator[tuple[str, str]]:
    from onnx import numpy_helper

    for node in graph.roundings():
        kind = graph.kind(node)
        if kind == "UINT8":
            yield _label(node), "stores uint8: quantize to int8 with zero point 0"
        elif kind is None and node.op_type == _QUANTIZE:
            yield _label(node), "stores neither int8 nor E4M3: quantize to one of them"
        elif len(node.input) > 2 and node.input[2] in graph.constants:
            zero = numpy_helper.to_array(graph.constants[node.input[2]]).astype(np.float32)
            if zero.any():
                yield _label(node), "has a zero point other than 0: quantize symmetrically (without +zero)"


def _per_tensor(graph: _Graph) -> Iterator[tuple[str, str]]:
    for node in graph.roundings():
        if graph.is_constant(node.input[0]):
            continue
        count = graph.elements(node.input[1])
        if count is None:
            yield _label(node), "takes its scale from other nodes: give activations one static scale per tensor"
        elif count != 1:
            yield _label(node), f"gives an activation {count} scales: give it one per tensor"


def _weight_axis(graph: _Graph) -> Iterator[tuple[str, str]]:
    for product in graph.nodes:
        if product.op_type not in _PRODUCTS:
            continue
        made: Any = graph.made.get(product.input[1])
        turned = made is not None and made.op_type == "Transpose"
        if made is not None and turned:
            made = graph.made.get(made.input[0])
        if made is None or made.op_type != _DEQUANTIZE or not graph.is_constant(made.input[0]):
            continue
        if graph.elements(made.input[1]) in (None, 1):
            continue
        axis = next((a.i for a in made.attribute if a.name == "axis"), 1)
        rows_first = product.op_type == "Conv" or turned or any(a.name == "transB" and a.i for a in product.attribute)
        tensor = graph.constants.get(made.input[0]) or graph.constants.get(graph.made[made.input[0]].input[0])
        wanted = 0 if rows_first else len(tensor.dims) - 1 if tensor is not None else 1
        if axis % max(len(tensor.dims) if tensor is not None else 2, 1) != wanted:
            yield _label(made), f"has a scale for each entry of axis {axis}: take the output channels, axis {wanted}"


def _residual(graph: _Graph) -> Iterator[tuple[str, str]]:
    for add in graph.nodes:
        if add.op_type != "Add" or any(graph.is_constant(name) for name in add.input):
            continue
        branches = [graph.is_branch(name) for name in add.input]
        if sum(branches) != 1:
            continue
        skip, branch = add.input[branches.index(False)], add.input[branches.index(True)]
        if graph.dequantized(branch) is None:
            continue
        what = "both sides" if graph.dequantized(skip) is not None else "its branch and not the skip side"
        yield _label(add), f"adds with {what} quantized: quantize the skip side alone, so that the add is fused"


def _one_kind(graph: _Graph) -> Iterator[tuple[str, str]]:
    kinds = {graph.kind(node): _label(node) for node in graph.roundings()}
    if "FP8" in kinds and kinds.keys() & {"INT8", "UINT8"}:
        yield kinds["FP8"], "is FP8 in a file that has INT8 too: use one of them"


def _dynamic_batch(graph: _Graph) -> Iterator[tuple[str, str]]:
    for value in graph.inputs:
        axes = value.type.tensor_type.shape.dim
        if axes and axes[0].HasField("dim_value"):
            yield value.name, f"takes {axes[0].dim_value} images alone: export with a dynamic batch"


def _standard(graph: _Graph) -> Iterator[tuple[str, str]]:
    for node in graph.nodes:
        if node.domain not in _STANDARD:
            yield _label(node), f"is {node.domain}::{node.op_type}, of another engine: export for target 'qdq'"
        elif node.op_type in _INTEGER_OPERATORS:
            yield _label(node), f"is {node.op_type}: TensorRT takes QuantizeLinear and DequantizeLinear around a product"


RULES: dict[str, Callable[[_Graph], Iterator[tuple[str, str]]]] = {
    "symmetric": _symmetric,
    "per-tensor activations": _per_tensor,
    "weight axis": _weight_axis,
    "residual add": _residual,
    "one kind of 8 bits": _one_kind,
    "dynamic batch": _dynamic_batch,
    "standard operators": _standard,
}
"""Every rule by its name: node and problem of each violation."""
