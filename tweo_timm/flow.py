"""Following values through a forward pass, function by function.

Which layers read a norm's output, and which additions continue the residual stream, are questions about data flow that
neither module hooks (they see modules only) nor torch.fx (it does not trace every family) can answer. A
TorchFunctionMode sees every call; a Flow remembers, by label, where a tensor's values come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions whose result holds the values of their tensor argument, in another shape or order.
_LAYOUT = {
    *(
        "reshape",
        "view",
        "view_as",
        "reshape_as",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "expand",
        "__getitem__",
    ),
    *(
        "permute",
        "transpose",
        "movedim",
        "moveaxis",
        "swapaxes",
        "swapdims",
        "contiguous",
        "clone",
        "detach",
        "to",
        "float",
    ),
    *("roll", "pad", "cat", "concat", "chunk", "split", "unbind", "narrow", "select", "index_select", "type_as"),
    *("dropout", "__get__"),
}


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a torch function or method, or "" for one without."""
    return str(getattr(function, "__name__", ""))


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of an argument or result: itself, or those directly in a tuple or list."""
    if isinstance(value, Tensor):
        return [value]
    return [item for item in value if isinstance(item, Tensor)] if isinstance(value, (tuple, list)) else []


def nested_tensors(value: Any) -> list[Tensor]:
    """Return the tensors of nested tuples, lists and dicts, in their order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in items for tensor in nested_tensors(item)]


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return the same nesting with other tensors, in the order of `nested_tensors`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [with_tensors(item, tensors) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


Mode = TypeVar("Mode", bound="HookedMode")


class HookedMode(TorchFunctionMode):
    """A TorchFunctionMode with hooks on modules, which are there while it is entered."""

    def hooks(self) -> Iterator[Any]:
        """Register the hooks, and yield the handle of each."""
        raise NotImplementedError

    def __enter__(self: Mode) -> Mode:
        self._handles = list(self.hooks())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()


class Flow:
    """Follows values through a forward pass by label; functions that only move values pass the labels on.

    Labelled tensors are kept alive, so that an id is never that of another tensor.
    """

    def __init__(self) -> None:
        self._labels: dict[int, tuple[Tensor, frozenset[str]]] = {}

    def label(self, tensor: Tensor, labels: Iterable[str]) -> None:
        """Give a tensor these labels, and no others."""
        self._labels[id(tensor)] = (tensor, frozenset(labels))

    def labels(self, tensor: Any) -> frozenset[str]:
        """Return the labels of a tensor."""
        return self._labels[id(tensor)][1] if id(tensor) in self._labels else frozenset()

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> frozenset[str]:
        """Return the labels of all tensor arguments."""
        found = [self.labels(tensor) for value in (*args, *kwargs.values()) for tensor in tensors_in(value)]
        return frozenset().union(*found)

    def moves(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> bool:
        """Pass labels on if this function only moves values; say whether it does."""
        if name_of(function) not in _LAYOUT:
            return False
        carried = self.of(args, kwargs)
        for tensor in tensors_in(result) if carried else ():
            self.label(tensor, carried | self.labels(tensor))
        return True
