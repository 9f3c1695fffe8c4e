"""An ONNX file as a checker reads it: what made each value, what is constant, types and shapes.

Files of other people say the same thing in many ways: a scale is an initializer, a Constant node of any spelling, or
the end of a Cast and a Reshape; a model is a graph, graphs within it, and functions. Constants are computed by onnx's
own reference, types and shapes are its inference, functions are put in place by its inliner. Nothing else is run.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterator, Sequence
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SAME_AXES = frozenset({"Cast", "Concat", "Dropout", "Identity", "Pad", "Slice", "Split"})
MOVING = _SAME_AXES | {"Expand", "Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators that move values alone; the values are their first input, or all of Concat's."""


def read_graph(path: str | Path) -> Graph:
    """Return the outermost graph of a file.

    Raises:
        ValueError: if it is no ONNX file, or its nodes wait for each other.
    """
    import onnx
    from onnx import inliner, shape_inference

    try:
        model = onnx.load(path, load_external_data=False)
        if model.functions:
            model = inliner.inline_local_functions(model)
        _import_all(model)
        model = shape_inference.infer_shapes(model, data_prop=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # protobuf's, which is no public name
        raise ValueError(f"{path} is no ONNX file: {error}") from error
    return Graph(model.graph, model.opset_import, Path(path).parent)


class Graph:
    """A graph, and the graphs inside it.

    Attributes:
        nodes: its own, in an order in which they can run.
        outer: the graph around it; None for the outermost.
        made: name of a value -> the node that made it, here or in the graphs around.
        inputs: what it is given at run time: initializers that stand there too are not.

    Args:
        graph: its GraphProto, after shape inference.
        opsets: of the model.
        folder: where the file lies, for tensors beside it.
        outer: the graph around it.
    """

    def __init__(self, graph: Any, opsets: Any, folder: Path, outer: Graph | None = None) -> None:
        self.nodes, self.outer = _in_order(graph.node), outer
        self._opsets, self._folder = opsets, folder
        self._start: int = 0 if outer is None else outer._start + len(outer.nodes)
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = [value for value in graph.input if value.name not in tensors]
        made = {name: node for node in self.nodes for name in node.output if name}
        places = {name: self._start + i for i, node in enumerate(self.nodes) for name in node.output}
        typed = {v.name: v.type.tensor_type for v in (*graph.input, *graph.output, *graph.value_info)}
        # A name of an inner graph may stand for something else in another one beside it, but not in one around it.
        around = [outer] if outer is not None else []
        self.made: ChainMap[str, Any] = ChainMap(made, *(graph.made for graph in around))
        self._places: ChainMap[str, int] = ChainMap(places, *(graph._places for graph in around))
        self._tensors: ChainMap[str, Any] = ChainMap(tensors, *(graph._tensors for graph in around))
        self._typed: ChainMap[str, Any] = ChainMap(typed, *(graph._typed for graph in around))
        self._arrays: dict[str, NDArray[Any]] = {}

    def with_inner(self) -> Iterator[Graph]:
        """This graph and all graphs inside it, such as the branches of an If."""
        yield self
        for node in self.nodes:
            for graph in _graphs_of(node):
                yield from Graph(graph, self._opsets, self._folder, self).with_inner()

    def is_constant(self, name: str) -> bool:
        """Whether a value is the same for all inputs."""
        return name in self._tensors or name in self._computed

    @cached_property
    def _computed(self) -> set[str]:
        """What nodes make of constants alone."""
        found: set[str] = set() if self.outer is None else set(self.outer._computed)
        for node in self.nodes:
            given = [name for name in node.input if name]
            alone = not given and not node.op_type.startswith("Constant")
            if not alone and not _graphs_of(node) and all(n in found or n in self._tensors for n in given):
                found.update(node.output)
        return found

    def array(self, name: str) -> NDArray[Any] | None:
        """The entries of a constant; None for what is none.

        Raises:
            ValueError: they lie in a file that cannot be read, or no one knows the operator that makes them.
        """
        if not self.is_constant(name):
            return None
        if name not in self._arrays:
            self._arrays[name] = self._read(name) if name in self._tensors else self._compute(name)
        return self._arrays[name]

    def _read(self, name: str) -> NDArray[Any]:
        from onnx import numpy_helper

        try:
            return np.asarray(numpy_helper.to_array(self._tensors[name], str(self._folder)))
        except Exception as error:  # what a missing file raises differs between versions of onnx
            raise ValueError(f"{name} cannot be read: {error}; keep the file with the weights beside it") from error

    def _compute(self, name: str) -> NDArray[Any]:
        """By onnx's reference implementation."""
        from onnx import TypeProto, helper
        from onnx.reference import ReferenceEvaluator

        node = self.made[name]
        given = {n: self.array(n) for n in node.input if n}
        inputs, outputs = ([helper.make_value_info(n, TypeProto()) for n in names] for names in (given, node.output))
        model = helper.make_model(helper.make_graph([node], "constant", inputs, outputs), opset_imports=self._opsets)
        try:
            with np.errstate(all="ignore"):
                return np.asarray(ReferenceEvaluator(model).run([name], given)[0])
        except Exception as error:  # of any kind: it runs what strangers wrote
            raise ValueError(f"{name} is made by {node.op_type}, which onnx cannot compute: {error}") from error

    def type_of(self, name: str) -> str:
        """The type of a value in ONNX's words, such as INT8; "" where the file does not say it."""
        tensor, typed = self._tensors.get(name), self._typed.get(name)
        return data_type(tensor.data_type if tensor is not None else typed.elem_type if typed is not None else 0)

    def shape_of(self, name: str) -> list[int] | None:
        """The sizes of a value, -1 where one is open; None where not even their number is known."""
        tensor, typed = self._tensors.get(name), self._typed.get(name)
        if tensor is not None:
            return list(tensor.dims)
        if typed is None or not typed.HasField("shape"):
            return None
        return [dim.dim_value if dim.HasField("dim_value") else -1 for dim in typed.shape.dim]

    def origin(self, name: str, through: frozenset[str]) -> str:
        """The value that a value was before the last operators of some kinds moved it."""
        while name in self.made and self.made[name].op_type in through:
            name = self.made[name].input[0]
        return name

    def reaches(self, name: str, end: str) -> bool:
        """Whether a value takes part in another one."""
        first, seen, left = self._places.get(name, -1), {end}, [end]
        while left:
            value = left.pop()
            if value == name:
                return True
            if self._places.get(value, -1) > first:  # what was made earlier cannot depend on it
                left += [before for before in self.made[value].input if before and before not in seen]
                seen.update(left)
        return False

    def axis_before(self, node: Any, axis: int | None) -> int | None:
        """Where an axis of what a moving operator puts out was in what it takes; None where that cannot be known."""
        if axis is None or node.op_type in _SAME_AXES:
            return axis
        before, after = self.shape_of(node.input[0]), self.shape_of(node.output[0])
        if node.op_type == "Transpose":
            given = attribute(node, "perm")
            perm = given if given is not None else list(range(len(before or ())))[::-1]
            return int(perm[axis]) if axis < len(perm) else None
        if before is None or after is None or min(*before, *after, 0) < 0 or axis >= len(after):
            return None
        same = [i for i, n in enumerate(before) if (math.prod(before[:i]), n) == (math.prod(after[:axis]), after[axis])]
        return same[0] if same else None


def _import_all(model: Any) -> None:
    """Add the operator sets that a file uses and does not import, without which nothing is inferred."""
    from onnx import helper

    imported, graphs = {opset.domain for opset in model.opset_import}, [model.graph]
    for graph in graphs:
        graphs += [inner for node in graph.node for inner in _graphs_of(node)]
    for domain in {node.domain for graph in graphs for node in graph.node} - imported:
        model.opset_import.append(helper.make_opsetid(domain, 1))


def data_type(number: int) -> str:
    """ONNX's word for a type; "" for its 0, which is none."""
    from onnx import TensorProto

    return str(TensorProto.DataType.Name(number)) if number else ""


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """The value of a node's attribute."""
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _in_order(nodes: Sequence[Any]) -> list[Any]:
    """The nodes in an order in which they can run, which ONNX asks of a file and engines do not."""
    made = {name: place for place, node in enumerate(nodes) for name in node.output if name}
    needs = {place: {made[name] for name in node.input if name in made} for place, node in enumerate(nodes)}
    try:
        return [nodes[place] for place in TopologicalSorter(needs).static_order()]
    except CycleError as error:
        circle = ", ".join(str(nodes[place].name or nodes[place].op_type) for place in error.args[1])
        raise ValueError(f"the nodes {circle} wait for each other: no engine can run the file") from error


def _graphs_of(node: Any) -> list[Any]:
    from onnx import AttributeProto

    return [
        graph
        for a in node.attribute
        for graph in ([a.g] if a.type == AttributeProto.GRAPH else a.graphs if a.type == AttributeProto.GRAPHS else ())
    ]
