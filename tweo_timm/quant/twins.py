"""A float model and its quantized copy in one forward pass, unit by unit: half of the batch is one's, half the other's.

Whoever compares two models layer by layer needs what enters each of them there, for all images, and must not keep all
of it. So the float model runs once on all images twice over, and at each unit (a block, or a layer outside of the
blocks that differs in the copy) hooks put the results of both models in the place of its output: the float one's for
the first half, the quantized one's for the second. What stands between units is the same in both. Only what enters the
unit at hand is alive, and inside it images go through a few at a time.

A layer whose output has no axis of images, such as one that makes position embeddings, cannot serve both halves. The
module around it that repeats them for each image (XCiT's) is the unit then; where there is none, both halves get the
quantized output, because that is what the layers behind it will meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tweo_timm.flow import nested_tensors, with_tensors
from tweo_timm.quant.quantizer import QuantizedLayer
from tweo_timm.stream import stream_of

CHUNK = 16
"""Images that are inside a unit at a time."""


class Rows(NamedTuple):
    """Of each tensor that enters a unit and of each that leaves it: rows for an image; 0 without an axis of images."""

    entering: list[int]
    leaving: list[int]


class Unit:
    """A module of both models, and what entered it.

    Attributes:
        name: of the module.
        takes_images: whether its input has an axis of images.
    """

    def __init__(
        self, name: str, modules: tuple[nn.Module, nn.Module], arguments: Any, rows: Rows, num_images: int
    ) -> None:
        self.name, self.takes_images = name, any(rows.entering)
        self._modules, self._arguments, self._rows, self._num_images = modules, arguments, rows, num_images

    def run(self, quantized: bool, images: Tensor) -> Any:
        """Return the output of one of the two modules for some of the images, given by their numbers."""
        args, kwargs = self._given(images + quantized * self._num_images)
        return self._modules[quantized](*args, **kwargs)

    def passing(
        self, layer: nn.Module, place: int | str, quantized: bool, images: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Return what enters a layer of the unit and the stream that leaves it at its first call; None if it has none.

        Args:
            layer: in the unit of the same model, or the unit itself.
            place: position or keyword of the argument that is asked for.
            quantized: which of the models.
            images: their numbers.
        """
        seen: list[tuple[Tensor, Tensor]] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.append((kwargs[place] if isinstance(place, str) else args[place], stream_of(output, module)))
            raise _Seen

        handle = layer.register_forward_hook(hook, with_kwargs=True)
        try:
            self.run(quantized, images)
        except _Seen:
            return seen[0]
        finally:
            handle.remove()
        return None

    def order(self, names: dict[nn.Module, str]) -> list[str]:
        """Return the names of those layers that run in the quantized unit, in the order of their first calls."""
        called: dict[str, None] = {}
        handles = [
            layer.register_forward_hook(lambda module, args, output: called.setdefault(names[module]))
            for layer in names
        ]
        try:
            self.run(True, torch.tensor([0]))
        finally:
            for handle in handles:
                handle.remove()
        return list(called)

    def outputs(self) -> Any:
        """Return the outputs of both modules for all images, the float one's first."""
        numbers = torch.split(torch.arange(self._num_images), CHUNK if self.takes_images else self._num_images)
        parts = [self.run(quantized, images) for quantized in (False, True) for images in numbers]
        together = zip(*(nested_tensors(part) for part in parts), strict=True)
        joined = [self._joined(list(ts), each) for each, ts in zip(self._rows.leaving, together, strict=True)]
        return with_tensors(parts[0], iter(joined))

    def _joined(self, parts: list[Tensor], rows: int) -> Tensor:
        if not rows:
            return parts[-1]
        if self.takes_images:
            return torch.cat(parts)
        halves = [torch.chunk(part, 2)[half] for half, part in enumerate(parts)]  # each is whole, and one's own
        return torch.cat(halves)

    def first(self) -> Any:
        """Return the arguments for one image: the unit's own forward, whose output is replaced, then costs little."""
        return self._given(torch.tensor([0]))

    def _given(self, images: Tensor) -> Any:
        chosen = [
            tensor.reshape(-1, rows, *tensor.shape[1:])[images].flatten(0, 1) if rows else tensor
            for rows, tensor in zip(self._rows.entering, nested_tensors(self._arguments), strict=True)
        ]
        return with_tensors(self._arguments, iter(chosen))


class _Seen(Exception):  # noqa: N818 - it ends a forward pass early, and is no error
    """What was looked for has been seen."""


@torch.no_grad()
def visit_units(
    reference: nn.Module,
    quantized: nn.Module,
    blocks: Iterable[str],
    images: Tensor,
    visit: Callable[[Unit], None],
) -> None:
    """Run both models on the same images, and call `visit` at each unit, before the quantized one's output is computed.

    Args:
        reference: the float model in evaluation mode.
        quantized: its quantized copy.
        blocks: names of the blocks.
        images: (2 B, C, H, W), all images and then all of them again, on the models' device; B is two at least.
        visit: may change the quantized unit; what comes later sees the change.
    """
    hooks = _Hooks(reference, quantized, _units(reference, quantized, set(blocks), images), len(images) // 2, visit)
    try:
        reference(images)
    finally:
        hooks.remove()


def _units(reference: nn.Module, quantized: nn.Module, blocks: set[str], images: Tensor) -> dict[str, Rows]:
    """The blocks, and outside of them what quantization and smoothing have changed: layers and norms."""
    outside = [n for n, _ in reference.named_modules() if n and not any(n.startswith(f"{block}.") for block in blocks)]
    rows = _rows_per_image(reference, outside, images)
    around = {name for block in blocks for name in _lineage(block)}
    units = []
    for name in rows:
        module = reference.get_submodule(name)
        changed = isinstance(quantized.get_submodule(name), QuantizedLayer) or hasattr(module, "normalized_shape")
        if name in blocks or changed:
            outer = (o for o in _lineage(name) if o in rows and o not in around - blocks and any(rows[o].leaving))
            units.append(next(outer, name))
    outermost = [name for name in units if not any(outer in units for outer in _lineage(name)[1:])]
    return {name: rows[name] for name in outermost}


def _lineage(name: str) -> list[str]:
    """A module's name and those of the modules around it, innermost first, without the root."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _rows_per_image(reference: nn.Module, names: Iterable[str], images: Tensor) -> dict[str, Rows]:
    """Tell of the modules that run which tensors have an axis of images, by two passes of one image and of two."""
    seen = [_lengths(reference, names, images[:count]) for count in (1, 2)]
    both = {name: zip(seen[0][name], seen[1][name], strict=True) for name in seen[1] if name in seen[0]}
    return {name: Rows(*(_rows(one, two) for one, two in pairs)) for name, pairs in both.items()}


def _lengths(reference: nn.Module, names: Iterable[str], images: Tensor) -> dict[str, tuple[list[int], list[int]]]:
    """The first axes of all tensors that enter and leave each module at its first call."""
    lengths: dict[str, tuple[list[int], list[int]]] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            entering, leaving = ([len(t) if t.ndim else 0 for t in nested_tensors(v)] for v in ((args, kwargs), output))
            lengths.setdefault(name, (entering, leaving))

        return note

    handles = [reference.get_submodule(n).register_forward_hook(hook(n), with_kwargs=True) for n in names]
    try:
        reference(images)
    finally:
        for handle in handles:
            handle.remove()
    return lengths


def _rows(one: list[int], two: list[int]) -> list[int]:
    return [first if second == 2 * first else 0 for first, second in zip(one, two, strict=True)]


class _Hooks:
    """Puts the outputs of both models in the place of the float model's, at every unit."""

    def __init__(
        self,
        reference: nn.Module,
        quantized: nn.Module,
        rows: dict[str, Rows],
        num_images: int,
        visit: Callable[[Unit], None],
    ) -> None:
        self._quantized, self._rows, self._num_images, self._visit = quantized, rows, num_images, visit
        self._output: Any = None
        self._inside = False
        self._open: nn.Module | None = None  # the unit whose own forward runs, on one image: nothing in it is a unit
        self._handles: list[Any] = []
        for name in rows:
            module = reference.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if self._inside or self._open is not None:  # a layer that several blocks share, CoaT's, is named outside
                return None
            modules = module, self._quantized.get_submodule(name)
            unit = Unit(name, modules, (args, kwargs), self._rows[name], self._num_images)
            self._inside = True
            try:
                self._visit(unit)
                self._output = unit.outputs()
            finally:
                self._inside = False
            self._open = module
            return unit.first()

        return hook

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._inside or module is not self._open:
            return output
        self._open = None
        return self._output
