"""A device without float64, imitated: tensors that say they are on the meta device and compute on the CPU.

Float64 on it, and a product of tensors on both, are errors, as they are on Apple's GPU.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NARROW = torch.device("meta")


class Narrow(torch.Tensor):
    """A tensor on the device, around one on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=NARROW,
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class NarrowDevice(TorchDispatchMode):
    """What is made on the device, or brought there, is `Narrow`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args, kwargs):
    """Compute on the CPU, and wrap what belongs on the device."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    there = any(isinstance(tensor, Narrow) for tensor in tensors)
    asked = kwargs.get("device")
    moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if there and not moves and any(tensor.ndim and not isinstance(tensor, Narrow) for tensor in tensors):
        indexing = "index" in str(func)
        assert indexing, f"{func} takes tensors of two devices"
    if asked is not None:
        there = torch.device(asked).type == NARROW.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(lambda v: v.inner if isinstance(v, Narrow) else v, (args, kwargs))
    made = func(*inner_args, **inner_kwargs)
    if func is torch.ops.aten.copy_.default:
        return args[0]
    return tree_map(lambda value: wrapped(value, func) if there and isinstance(value, torch.Tensor) else value, made)


def wrapped(inner, func):
    if inner.dtype == torch.float64:
        raise TypeError(f"{func} made a float64 tensor on a device that has none")
    return Narrow(inner)
