"""QwT-v2: after quantization, a gain and a shift for each channel win back part of what rounding lost.

y ~ gain_c * y_q + shift_c, fitted in closed form on the calibration images (arXiv:2505.20932). `qwt` puts one after
every quantized layer, where it costs nothing at run time: `fold_compensation` merges it into the layer's weight scales
and bias. `qwtblock` puts one after every block, whose output is a sum with the stream that enters and so cannot absorb
it; `qwtlinear` is the first QwT (arXiv:2411.13918), a linear layer from a block's input to its error, as a comparator.

Fits run in the order of execution, each on what the compensated layers before it deliver. Both models run once, in
step, with all calibration images as one batch. Every fourth image is held out, and a channel (a block, for qwtlinear)
keeps its fit only if that lowers the error there.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tweo_timm.quant.quantizer import ChannelAffine, QuantizedLayer
from tweo_timm.quant.stream import StreamQuantizer

_HELD_OUT = 4
"""Every fourth image decides whether a fit is kept, and takes no part in it."""

_CHUNK = 16
"""Images turned into float64 at a time."""


class LinearCompensation(nn.Module):
    """output + W input + b: the first QwT's layer beside a block.

    Args:
        weight: (channels out, channels in), float32.
        bias: (channels out,), float32.
        channel_axis: of the block's input and output.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, channel_axis: int) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())

    def forward(self, entered: Tensor, output: Tensor) -> Tensor:
        """Return the compensated output, in its dtype."""
        error = F.linear(entered.movedim(self.channel_axis, -1).float(), self.weight, self.bias)
        return output + error.movedim(-1, self.channel_axis).to(output.dtype)


def compensate(
    reference: nn.Module, quantized: nn.Module, batches: Sequence[Tensor], kind: str
) -> list[dict[str, Any]]:
    """Fit and install compensations in a quantized model, in place.

    Args:
        reference: the float model in evaluation mode, with every layer called as a module.
        quantized: its quantized copy; for the block kinds, one whose blocks have StreamQuantizers.
        batches: calibration images; at least two images, a few hundred are usual.
        kind: "qwt", "qwtblock" or "qwtlinear".

    Returns:
        One dict a layer or block, in the order of execution: name, explained (the share of the squared error on
        held-out images that the kept fit removes), channels_kept, channels, and skipped (a reason, or "").

    Raises:
        ValueError: for another kind, or with fewer than two images.
    """
    if kind not in _FITS:
        raise ValueError(f"compensation {kind!r} is not known; accepted are {', '.join(_FITS)}")
    device = next(reference.parameters()).device
    images = torch.cat([batch.to(device) for batch in batches])
    if len(images) < 2:
        raise ValueError("compensation needs at least 2 calibration images: some are held out")
    held = torch.arange(len(images), device=device) % _HELD_OUT == _HELD_OUT - 1
    held[-1] |= not held.any()
    modules = _places(quantized, QuantizedLayer if kind == "qwt" else StreamQuantizer)
    rows: dict[str, dict[str, Any]] = {}

    def place(name: str, module: Any) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction():  # a StreamQuantizer counts additions, and these are not the block's
                pair = _Pair(targets.next(name), output, _argument(module, args, kwargs), held)
                if name in rows:  # a layer that runs twice keeps its first fit, which its forward has applied
                    return output
                module.compensation, rows[name] = _FITS[kind](pair, module.channel_axis)
                return _apply(module.compensation, pair.entered, output)

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


@dataclass
class _Pair:
    """What a layer or block gives in both models for all images, and which images are held out."""

    target: Tensor
    got: Tensor
    entered: Tensor
    held: Tensor


def _places(model: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    """Return the layers, or the blocks (name -> its StreamQuantizer)."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    return {m.block_name if isinstance(m, StreamQuantizer) else name: m for name, m in found.items()}


def _argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    key = module.stream if isinstance(module, StreamQuantizer) else 0
    argument: Tensor = args[key] if isinstance(key, int) else kwargs[key]
    return argument


def _apply(compensation: nn.Module | None, entered: Tensor, output: Tensor) -> Tensor:
    if compensation is None:
        return output
    compensated: Tensor = (
        compensation(output) if isinstance(compensation, ChannelAffine) else compensation(entered, output)
    )
    return compensated


def fold_compensation(model: nn.Module) -> dict[str, list[str]]:
    """Merge every layer's compensation into its weight scales and bias, in place; logits stay within 1e-4.

    Returns:
        {"folded": layers, "kept": blocks whose compensation follows a sum and stays an operation of its own}.
    """
    folded = []
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer) and layer.compensation is not None:
            gain, shift = layer.compensation.gain, layer.compensation.shift
            layer.weight_scale = layer.weight_scale * gain
            layer.bias = shift if layer.bias is None else layer.bias * gain + shift
            layer.compensation = None
            folded.append(name)
    kept = [m.block_name for m in model.modules() if isinstance(m, StreamQuantizer) and m.compensation is not None]
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
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if self._stop.is_set():
                raise _Stopped
            self._ready.put((name, output))

        return hook


class _ChannelSums:
    """Per channel, what the least squares of y on y_q needs, in float64."""

    def __init__(self, pair: _Pair, chosen: Tensor, axis: int) -> None:
        self._sums = torch.zeros(5, pair.got.shape[axis], dtype=torch.float64, device=pair.got.device)
        self._count = 0
        for _, y, q in _chunks(pair, chosen, axis):
            self._sums += torch.stack([y.sum(0), q.sum(0), (y * q).sum(0), q.square().sum(0), y.square().sum(0)])
            self._count += len(y)

    def fit(self) -> tuple[Tensor, Tensor]:
        """Return gain and shift of the least squares; gain 1 where y_q does not vary."""
        y, q, yq, qq, _ = self._sums / self._count
        variance = qq - q * q
        varies = variance > 1e-12 * qq.clamp(min=1e-30)
        gain = torch.where(varies, (yq - y * q) / variance.clamp(min=1e-30), 1.0)
        return gain, y - gain * q

    def error(self, gain: Tensor, shift: Tensor) -> Tensor:
        """Return the summed squared error of each channel under this gain and shift."""
        y, q, yq, qq, yy = self._sums
        n = self._count
        squares = yy + gain**2 * qq + n * shift**2 - 2 * gain * yq - 2 * shift * y + 2 * gain * shift * q
        positive: Tensor = squares.clamp(min=0)
        return positive


def _fit_channels(pair: _Pair, axis: int) -> tuple[ChannelAffine | None, dict[str, Any]]:
    fitted, held = _ChannelSums(pair, ~pair.held, axis), _ChannelSums(pair, pair.held, axis)
    gain, shift = fitted.fit()
    one, zero = torch.ones_like(gain), torch.zeros_like(shift)
    before, after = held.error(one, zero), held.error(gain, shift)
    keep = (after < before) & (gain > 0)  # a scale must stay positive to fold
    gain, shift = torch.where(keep, gain, one), torch.where(keep, shift, zero)
    row = {
        "explained": _share(before.sum(), held.error(gain, shift).sum()),
        "channels_kept": int(keep.sum()),
        "channels": len(keep),
        "skipped": "" if keep.any() else "no channel gains on held-out images",
    }
    return ChannelAffine(gain, shift, axis) if keep.any() else None, row


def _fit_linear(pair: _Pair, axis: int) -> tuple[LinearCompensation | None, dict[str, Any]]:
    """Least squares of a block's error on its input, by the normal equations in float64."""
    channels = pair.got.shape[axis]
    if pair.entered.movedim(axis, -1).shape[:-1] != pair.got.movedim(axis, -1).shape[:-1]:
        return None, _unfitted(channels, "its input and output have different tokens")
    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    for x, y, y_q in _chunks(pair, ~pair.held, axis):
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        gram, cross = gram + x.T @ x, cross + x.T @ (y - y_q)
    solution = (torch.linalg.pinv(torch.as_tensor(gram), hermitian=True) @ cross).T
    weight, bias = solution[:, :-1], solution[:, -1]
    before = after = torch.zeros((), dtype=torch.float64, device=solution.device)
    for x, y, y_q in _chunks(pair, pair.held, axis):
        before = before + (y - y_q).square().sum()
        after = after + (y - y_q - x @ weight.T - bias).square().sum()
    if not after < before:
        return None, _unfitted(channels, "the fit does not lower the error on held-out images")
    row = {"explained": _share(before, after), "channels_kept": channels, "channels": channels, "skipped": ""}
    return LinearCompensation(weight, bias, axis), row


_FITS: dict[str, Callable[[_Pair, int], tuple[nn.Module | None, dict[str, Any]]]] = {
    "qwt": _fit_channels,
    "qwtblock": _fit_channels,
    "qwtlinear": _fit_linear,
}


def _chunks(pair: _Pair, chosen: Tensor, axis: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield entered, target and got of the chosen images as float64 (tokens, channels), a few images at a time."""
    for index in torch.split(chosen.nonzero().flatten(), _CHUNK):
        entered, target, got = (value[index].movedim(axis, -1) for value in (pair.entered, pair.target, pair.got))
        yield entered.flatten(0, -2).double(), target.flatten(0, -2).double(), got.flatten(0, -2).double()


def _unfitted(channels: int, reason: str) -> dict[str, Any]:
    return {"explained": 0.0, "channels_kept": 0, "channels": channels, "skipped": reason}


def _share(before: Tensor, after: Tensor) -> float:
    return float(1 - after / before) if before > 0 else 0.0
