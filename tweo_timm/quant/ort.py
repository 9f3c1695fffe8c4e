"""onnxruntime on the CPU: the operators that it computes int8 with, and what it makes of a file.

What decides the speed on x86, as measured with benchmarks/onnx_latency.py. Signed activations have no kernel: MLAS
multiplies uint8 by int8 with VNNI and takes ~90 times longer for int8 by int8, so activations have zero point 128 here
(the int8 pairs of a QDQ file are rewritten so by onnxruntime when it loads it). onnxruntime's optimizer turns a QDQ
MatMul into MatMulIntegerToFloat but leaves the bias outside, as an Add or a slow BiasGelu, although the operator takes
one. A packed query-key-value projection is cut up by a copying Split, which three projections do not need, and their
heads are moved in float32: with tokens before images, a move of int8 values, onnxruntime's products read the heads
where they lie. What was tried and gained nothing: QAttention, MultiHeadAttention, int8 attention products, rounding
before window partition.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tweo_timm import machine
from tweo_timm.extras import installation

try:
    import onnx
    import onnx_ir as ir
    import onnxruntime
    from onnxscript import rewriter
    from onnxscript.rewriter import pattern
except ImportError as error:
    raise ImportError(f"onnxruntime and its tools are missing ({error}): {installation('export')}") from error

_MICROSOFT = "com.microsoft"
_INT8 = {
    "ConvInteger",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QAttention",
    "QGemm",
    "QLinearAdd",
    "QLinearConv",
    "QLinearMatMul",
}
_BYTES = (ir.DataType.INT8, ir.DataType.UINT8)
_ROUNDING = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_PRODUCTS = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv", "Attention", "MultiHeadAttention"}
_MOVES = {
    "Cast",
    "Concat",
    "Constant",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "Pad",
    "ReorderInput",
    "ReorderOutput",
    "Reshape",
    "Shape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}


def fuse_for_onnxruntime(model: Any) -> dict[str, int]:
    """Replace QDQ patterns by the operators that onnxruntime's CPU provider computes them with, in place.

    Args:
        model: onnx_ir.Model with uint8 activations, such as `torch.onnx.export` gives in its `model`.

    Returns:
        operator -> how many were put in.
    """
    for rule in (_NoPad.rule(), _Linear.rule(), _Projections.rule()):
        rewriter.rewrite(model, [rule])
    found = Counter(node.op_type for node in model.graph if node.domain == _MICROSOFT)
    return dict(found)


def separate_integers(model: Any) -> None:
    """Give every node int8 and uint8 initializers of its own, and every reader of a weight a node of its own, in place.

    Told to compute exactly where products saturate, onnxruntime adds a uint8 form of each int8 initializer under a name
    made from the old one, node by node: a second reader of the same makes the file fail to load.

    Args:
        model: onnx_ir.Model; the exporter has merged initializers and nodes that are alike.
    """
    graph, taken = model.graph, set()
    for node in list(graph):
        if node.op_type == "DequantizeLinear" and node.inputs[0].name in graph.initializers:
            _one_reader(graph, node)
    for node in graph:
        for index, value in enumerate(node.inputs):
            if value is None or value.name not in graph.initializers or value.dtype not in _BYTES:
                continue
            if value in taken:
                node.replace_input_with(index, _copied(graph, value))
            taken.add(value)


def _one_reader(graph: Any, node: Any) -> None:
    """Copy a node with one output for each reader but the first."""
    (output,) = node.outputs
    for number, (reader, index) in enumerate(list(output.uses())[1:], 1):
        twin = ir.Node(node.domain, node.op_type, node.inputs, node.attributes.values(), name=f"{node.name}_{number}")
        value = twin.outputs[0]
        value.name, value.type, value.shape = f"{output.name}_{number}", output.type, output.shape
        graph.insert_after(node, twin)
        reader.replace_input_with(index, value)


def _copied(graph: Any, value: Any) -> Any:
    """Put a copy of an initializer into its graph, under a new name."""
    name = next(name for n in itertools.count(1) if (name := f"{value.name}_{n}") not in graph.initializers)
    copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=ir.tensor(_constant(value), name=name))
    graph.initializers[name] = copy
    return copy


class _Linear(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """MatMul of dequantized operands and a bias -> MatMulIntegerToFloat."""

    def pattern(self, op: Any, x: Any, x_scale: Any, x_zero: Any, w: Any, w_scale: Any, w_zero: Any, bias: Any) -> Any:
        left = op.DequantizeLinear(x, x_scale, x_zero)
        right = op.DequantizeLinear(w, w_scale, w_zero)
        return op.Add(op.MatMul(left, right), bias)

    def check(self, context: Any, w: Any, bias: Any, **_: Any) -> bool:
        return _constant(bias) is not None and _constant(bias).ndim == 1 and _constant(w) is not None

    def rewrite(self, op: Any, x: Any, x_scale: Any, x_zero: Any, w: Any, w_scale: Any, w_zero: Any, bias: Any) -> Any:
        return op.MatMulIntegerToFloat(x, w, x_scale, w_scale, x_zero, w_zero, bias, _domain=_MICROSOFT)


class _Projections(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """A packed query-key-value projection that is sliced apart -> one projection for each part, tokens first.

    onnxruntime takes the transposition from (N, B, heads, width) into its attention products, as transBatchA and
    transBatchB; that from (B, N, heads, width) it would carry out.
    """

    def pattern(
        self, op: Any, x: Any, w: Any, x_scale: Any, w_scale: Any, x_zero: Any, w_zero: Any, bias: Any, shape: Any
    ) -> Any:
        projected = op.MatMulIntegerToFloat(
            x, w, x_scale, w_scale, x_zero, w_zero, bias, _domain=_MICROSOFT, _outputs=["projected"]
        )
        heads = op.Transpose(op.Reshape(projected, shape), perm=[2, 0, 3, 1, 4])
        return tuple(_part(op, heads, index) for index in range(3))

    def check(self, context: Any, x: Any, shape: Any, **_: Any) -> bool:
        sizes = _constant(shape)
        if sizes is None or len(sizes) != 5 or sizes[2] != 3 or x.shape is None or len(x.shape) != 3:
            return False
        return bool(sizes[1] == x.shape[1])  # else it is not the tokens of (B, N, C) that go first

    def rewrite(
        self,
        op: Any,
        projected: Any,
        x: Any,
        w: Any,
        x_scale: Any,
        w_scale: Any,
        x_zero: Any,
        w_zero: Any,
        bias: Any,
        shape: Any,
    ) -> Any:
        sizes = np.delete(_constant(shape), 2)[[1, 0, 2, 3]]
        x = op.Transpose(x, perm=[1, 0, 2])
        parts = []
        for index in range(3):
            name = f"{projected.name}_{index}"  # of the node: layers may share initializers
            weight, scale, zero, shift = (
                _third(op, value, index, f"{name}_{role}")
                for role, value in (("w", w), ("scale", w_scale), ("zero", w_zero), ("bias", bias))
            )
            y = op.MatMulIntegerToFloat(x, weight, x_scale, scale, x_zero, zero, shift, _domain=_MICROSOFT)
            split = op.Reshape(y, op.initializer(ir.tensor(sizes), f"{name}_shape"))
            parts.append(op.Transpose(split, perm=[1, 2, 0, 3]))
        return tuple(parts)


class _NoPad(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """Padding by nothing, which onnxruntime would copy for."""

    def pattern(self, op: Any, x: Any, pads: Any) -> Any:
        return op.Pad(x, pads, _allow_other_inputs=True)

    def check(self, context: Any, pads: Any, **_: Any) -> bool:
        widths = _constant(pads)
        return widths is not None and not widths.any()

    def rewrite(self, op: Any, x: Any, **_: Any) -> Any:
        return op.Identity(x)


def _third(op: Any, value: Any, index: int, name: str) -> Any:
    """One of three equal parts of an initializer's last axis; scalars are shared."""
    array = _constant(value)
    if array.ndim == 0:
        return value
    return op.initializer(ir.tensor(np.ascontiguousarray(np.split(array, 3, -1)[index])), name)


def _part(op: Any, heads: Any, index: int) -> Any:
    return op.Squeeze(op.Slice(heads, [index], [index + 1], [0]), [0])


def _constant(value: Any) -> Any:
    """The array of an initializer, or None."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def session_settings(threads: int | None = None) -> Any:
    """Return the settings of every session that is opened here, those that this processor needs included.

    Args:
        threads: of one operator; None takes torch's number.

    Returns:
        An onnxruntime.SessionOptions.
    """
    options = onnxruntime.SessionOptions()
    for key, value in machine.session_options().items():
        options.add_session_config_entry(key, value)
    options.intra_op_num_threads = threads or torch.get_num_threads()
    # without it, waiting threads of one session keep the cores from the next: three times the time, now and then
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # planned reuse hands out cold buffers; the arena alone hands out the last freed: Swin-T at batch 8 takes 6 % less
    # time and 324 MB instead of 596
    options.enable_mem_reuse = False
    options.log_severity_level = 3
    return options


def open_session(path: str | Path, threads: int | None = None, optimized: str | Path | None = None) -> Any:
    """Open a file in onnxruntime's CPU provider.

    Args:
        path: an ONNX file.
        threads: see `session_settings`.
        optimized: where to write the graph that really runs.

    Returns:
        An onnxruntime.InferenceSession.
    """
    options = session_settings(threads)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_onnx(path: str | Path, batches: Tensor | Iterable[Tensor], threads: int | None = None) -> Tensor:
    """Run a file in onnxruntime.

    Args:
        path: an ONNX file with one input and one output.
        batches: images (B, C, H, W), or batches of them, float32.
        threads: see `session_settings`.

    Returns:
        The outputs of all images, (images, classes), float32.

    Raises:
        ValueError: without images.
    """
    session = open_session(path, threads)
    name = session.get_inputs()[0].name
    batches = [batches] if isinstance(batches, Tensor) else batches
    outputs = [session.run(None, {name: images.detach().float().cpu().numpy()})[0] for images in batches]
    if not outputs:
        raise ValueError("there are no images to run the file on")
    return torch.from_numpy(np.concatenate(outputs))


def node_census(path: str | Path) -> dict[str, Any]:
    """Say which nodes of a file run in int8, from the graph that onnxruntime makes of it.

    Args:
        path: an ONNX file.

    Returns:
        int8 (operator -> count: products and adds of integers), float_products (operator -> count: products that stay
        in float), float_other (operator -> count: other float arithmetic), rounding (QuantizeLinear and
        DequantizeLinear nodes left), moves (reshapes, transposes and the like) and float_islands: the connected parts
        of the graph that compute in float between integers.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, 1, optimized)
        nodes = list(onnx.load(optimized).graph.node)
    kinds = {
        "int8": _INT8,
        "float_products": _PRODUCTS,
    }
    census: dict[str, Any] = {
        name: dict(sorted(Counter(n.op_type for n in nodes if n.op_type in operators).items()))
        for name, operators in kinds.items()
    }
    others = Counter(n.op_type for n in nodes if n.op_type not in _INT8 | _PRODUCTS | _ROUNDING | _MOVES)
    return census | {
        "float_other": dict(sorted(others.items())),
        "rounding": sum(n.op_type in _ROUNDING for n in nodes),
        "moves": sum(n.op_type in _MOVES for n in nodes),
        "float_islands": _islands(nodes),
    }


def _islands(nodes: list[Any]) -> int:
    """Count the connected parts of the float computation: integer operators and roundings are the shores."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            name = parent[name]
        return name

    inland = [n for n in nodes if n.op_type not in _INT8 | _ROUNDING | {"Shape", "Constant"}]
    produced = {name for node in inland for name in node.output}
    for node in inland:
        for name in node.input:
            if name in produced:
                parent[root(name)] = root(node.output[0])
        for name in node.output[1:]:
            parent[root(name)] = root(node.output[0])
    return len({root(n.output[0]) for n in inland if n.op_type not in _MOVES})
