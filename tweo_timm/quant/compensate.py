"""Fitting compensations in a quantized model: what `compensation` describes, layer after layer, block after block.

Fits run in the order of execution, each on what the compensated layers before it deliver. Both models run once, in
step, with all calibration images as one batch. `fold_compensation` merges into the layers what costs nothing there.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from tweo_timm.quant.compensation import Compensation, Pair
from tweo_timm.quant.quantizer import QuantizedLayer
from tweo_timm.quant.scheme import suffixes_of
from tweo_timm.quant.stream import StreamQuantizer
from tweo_timm.stream import stream_of, with_stream

_HELD_OUT = 4
"""Every fourth image decides whether a fit is kept, and takes no part in it."""


def compensate(
    reference: nn.Module, quantized: nn.Module, batches: Sequence[Tensor], kind: str
) -> list[dict[str, Any]]:
    """Fit and install compensations in a quantized model, in place.

    Args:
        reference: the float model in evaluation mode, with every layer called as a module.
        quantized: its quantized copy; for the block kinds, one whose blocks have StreamQuantizers.
        batches: calibration images; at least two images, a few hundred are usual.
        kind: a suffix that names one, "qwt" say.

    Returns:
        One dict a layer or block, in the order of execution: name, explained (the share of the squared error on
        held-out images that the kept fit removes), channels_kept, channels, and skipped (a reason, or "").

    Raises:
        ValueError: for another kind, or with fewer than two images.
    """
    compensation = compensation_named(kind)
    device = next(reference.parameters()).device
    images = torch.cat([batch.to(device) for batch in batches])
    if len(images) < 2:
        raise ValueError("compensation needs at least 2 calibration images: some are held out")
    held = torch.arange(len(images), device=device) % _HELD_OUT == _HELD_OUT - 1
    held[-1] |= not held.any()
    modules = _PLACES[compensation.place](quantized)
    rows: dict[str, dict[str, Any]] = {}

    def place(name: str, module: Any) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if name in rows:  # a layer that runs twice keeps its first fit, which its forward has applied
                targets.next(name)
                return output
            entered = kwargs[module.stream] if isinstance(module.stream, str) else args[module.stream]
            with torch._C.DisableTorchFunction():  # a StreamQuantizer counts additions, and these are not the block's
                got = stream_of(output, layer)
                pair = Pair(targets.next(name), got, entered, held, module.channel_axis)
                module.compensation, fit = compensation.fit(pair)
                rows[name] = asdict(fit)
                if module.compensation is None:
                    return output
                return with_stream(output, module.compensation(entered, got), layer)

        return hook

    handles = [
        quantized.get_submodule(name).register_forward_hook(place(name, module), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        with torch.no_grad(), _Targets(reference, modules, images) as targets:
            quantized(images)
    finally:
        for handle in handles:
            handle.remove()
    return [{"name": name, **row} for name, row in rows.items()]


def compensation_named(kind: str) -> type[Compensation]:
    """Return the class behind a suffix.

    Raises:
        ValueError: the suffix is none of a compensation.
    """
    known = suffixes_of("compensation")
    if kind not in known:
        raise ValueError(f"compensation {kind!r} is not known; accepted are {', '.join(known)}")
    found: type[Compensation] = known[kind].by.load()
    return found


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def _blocks(model: nn.Module) -> dict[str, Any]:
    """The blocks' names, and the StreamQuantizers that stand for them."""
    return {module.block_name: module for module in model.modules() if isinstance(module, StreamQuantizer)}


_PLACES = {"layer": _layers, "block": _blocks}


def fold_compensation(model: nn.Module) -> dict[str, list[str]]:
    """Merge every layer's compensation into its weight scales and bias, in place; logits stay within 1e-4.

    Returns:
        {"folded": layers, "kept": layers and blocks whose compensation stays an operation of its own: that of a block
        follows a sum}.
    """
    folded, kept = [], []
    for name, layer in _layers(model).items():
        if layer.compensation is not None and layer.compensation.fold(layer):
            layer.compensation = None
            folded.append(name)
        elif layer.compensation is not None:
            kept.append(name)
    kept += [name for name, block in _blocks(model).items() if block.compensation is not None]
    return {"folded": folded, "kept": kept}


class _Stopped(Exception):  # noqa: N818 - it ends a forward pass early, and is no error
    """Nobody waits for further outputs."""


class _Targets:
    """The outputs of the float model's layers, one by one as the quantized model asks for them.

    The two models run in step, the float one in a thread: it computes one layer ahead and waits. So each model runs
    once, and only one pair of outputs is alive, where a list of all outputs would not fit and a forward pass for each
    fit would take the square of the time.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], images: Tensor) -> None:
        self._model, self._names, self._images = model, list(names), images
        self._ready: queue.Queue[tuple[str, Tensor | BaseException]] = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Targets:
        self._handles = [self._model.get_submodule(n).register_forward_hook(self._hook(n)) for n in self._names]
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.01)
        for handle in self._handles:
            handle.remove()

    def next(self, name: str) -> Tensor:
        """Wait for the next output; it must be that of `name`."""
        reached, target = self._ready.get()
        if isinstance(target, BaseException):
            raise target
        if reached != name:
            raise RuntimeError(f"the quantized model runs {name!r} where the float model runs {reached!r}")
        return target

    def _run(self) -> None:
        try:
            with torch.no_grad():
                self._model(self._images)
            self._ready.put(("its end", RuntimeError("the float model ran fewer layers than the quantized one")))
        except _Stopped:
            pass
        except BaseException as error:
            self._ready.put(("", error))

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._stop.is_set():
                raise _Stopped
            self._ready.put((name, stream_of(output, module)))

        return hook
