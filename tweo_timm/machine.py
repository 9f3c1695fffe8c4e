"""The only file that asks the processor what it is and what its arithmetic does.

What its arithmetic does is tried, not looked up: a list of processors is never complete, and an instruction says
nothing about the library that may use it. Each question is a function, tried once per process, that a test may replace.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

from tweo_timm.extras import installation

_CPUINFO = Path("/proc/cpuinfo")
_INSTRUCTIONS = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "avx512_bf16", "amx_bf16"),
    *("asimddp", "i8mm", "bf16"),  # ARM
)
"""Those that decide how fast, and how exactly, a processor multiplies int8 and bfloat16."""

EXACT_INT8 = {"session.x64quantprecision": "1"}
"""What a session needs for exact int8 products where they saturate; onnxruntime turns int8 weights into uint8 ones."""


class Speed(NamedTuple):
    """How fast a device multiplies matrices of a low precision.

    Attributes:
        fast: whether it is worth to compute in it.
        ratio: the time of its product over that of a float32 product; above 1 is slower.
    """

    fast: bool
    ratio: float


@functools.cache
def low_precision(dtype: str = "bfloat16", device: str = "cpu") -> Speed:
    """Say whether products of a low precision are fast on a device, by timing one against float32, in milliseconds.

    Processors without such instructions multiply 10 to 28 times slower than in float32; those that have them, 2 to 10
    times faster. So a ratio below 1.5 is called fast, and noise decides nothing.

    Args:
        dtype: 'bfloat16' or 'float16'.
        device: as torch names it.
    """
    import torch

    times = {}
    with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
        for name in ("float32", dtype):
            x = torch.ones(128, 256, dtype=getattr(torch, name), device=device)
            weight = torch.ones(256, 256, dtype=getattr(torch, name), device=device)
            times[name] = min(_seconds(lambda x=x, weight=weight: (x @ weight)[0, 0].item()) for _ in range(3))
    ratio = times[dtype] / times["float32"]
    return Speed(ratio < 1.5, ratio)


def _seconds(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@functools.cache
def int8_saturates() -> bool:
    """Say whether onnxruntime's uint8 by int8 products saturate on this processor.

    x86 without VNNI adds two of them in 16 bits, where 2 x 255 x 127 does not fit. Sums of the largest products are
    compared with what they are, for a vector and for a matrix, which have kernels of their own.

    Raises:
        RuntimeError: without the extra `export`.
    """
    try:
        import numpy as np
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        remedy = installation("export")
        raise RuntimeError(f"int8 products are tried in onnxruntime, which is missing ({error}): {remedy}") from error

    depth, width = 64, 32
    weight = numpy_helper.from_array(np.full((depth, width), 127, np.int8), "weight")
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, ["rows", depth])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, ["rows", width])
    product = helper.make_node("MatMulInteger", ["x", "weight"], ["y"])
    graph = helper.make_graph([product], "product", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    sums = [session.run(None, {"x": np.full((rows, depth), 255, np.uint8)})[0] for rows in (1, 16)]
    return any(bool((found != depth * 255 * 127).any()) for found in sums)


def session_options() -> dict[str, str]:
    """Return what an onnxruntime session needs on this processor to compute int8 files exactly.

    Where int8 products saturate: weights become uint8, whose products onnxruntime adds in 32 bits. Elsewhere nothing,
    because the option makes it do so there too, and those kernels are the slower ones.

    Returns:
        Key -> value, for `SessionOptions.add_session_config_entry`.

    Raises:
        RuntimeError: without the extra `export`.
    """
    return dict(EXACT_INT8) if int8_saturates() else {}


def describe() -> dict[str, Any]:
    """Return what the system says of its processor.

    Returns:
        processor (its name), cores (those of the machine), and instructions: those of interest that it has, by Linux's
        names; None where the system has no list.
    """
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    listed = entries.get("flags", entries.get("Features"))
    return {
        "processor": entries.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instructions": None if listed is None else [name for name in _INSTRUCTIONS if name in listed.split()],
    }
