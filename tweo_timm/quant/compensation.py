"""What can win back part of what rounding lost: one class per kind of compensation.

A compensation is fitted on what a layer or a block gives in the float and in the quantized model, and stays in the
quantized one. Every fourth image is held out, and a fit (of a channel, or of a whole block) is kept only if it lowers
the error there. `compensate` fits them in the order of execution.

    y ~ gain_c * y_q + shift_c      QwT-v2 (arXiv:2505.20932), after a layer or after a block
    y ~ y_q + W x + b               the first QwT (arXiv:2411.13918), beside a block
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tweo_timm.quant.quantizer import QuantizedLayer, along
from tweo_timm.quant.twins import CHUNK


@dataclass
class Pair:
    """What a layer or block gives in both models, and which images are held out.

    Attributes:
        read: takes numbers of images; returns what entered it in the quantized model, the output of the float model,
            and the output of the quantized model, in the same shape. Each call computes them.
        held: (images,), which ones take no part in a fit.
        axis: of the channels.
    """

    read: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    held: Tensor
    axis: int

    def first(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return entered, target and got of one image, channels last."""
        entered, target, got = (x.movedim(self.axis, -1) for x in self.read(torch.tensor([0])))
        return entered, target, got

    def chunks(self, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield entered, target and got of the chosen images as float64 (tokens, channels), a few images at a time."""
        for index in torch.split(chosen.nonzero().flatten(), CHUNK):
            entered, target, got = (x.movedim(self.axis, -1).flatten(0, -2).double() for x in self.read(index))
            yield entered, target, got


@dataclass
class Fit:
    """How much a fit wins.

    Attributes:
        explained: the share of the squared error on held-out images that the kept fit removes.
        channels_kept: how many channels keep their fit.
        channels: how many there are.
        skipped: why there is none, or "".
    """

    explained: float
    channels_kept: int
    channels: int
    skipped: str = ""


class Compensation(Protocol):
    """One kind of compensation: a module that is applied to the output of a layer or block.

    Attributes:
        place: what it follows.
    """

    place: ClassVar[Literal["layer", "block"]]

    @classmethod
    def fit(cls, pair: Pair) -> tuple[nn.Module | None, Fit]:
        """Return the fitted module, or None with the reason why there is none."""

    def forward(self, entered: Tensor, output: Tensor) -> Tensor:
        """Return the compensated output, in its shape and dtype."""

    def fold(self, layer: QuantizedLayer) -> bool:
        """Merge it into the layer that it follows, if it can be, and say whether it was."""


class ChannelAffine(nn.Module):
    """y -> gain_c * y + shift_c for each channel, after a layer: it costs nothing at run time once it is folded.

    Args:
        gain: (channels,).
        shift: (channels,).
        channel_axis: the axis of y that holds channels.
    """

    place: ClassVar[Literal["layer", "block"]] = "layer"
    gain: Tensor
    shift: Tensor

    def __init__(self, gain: Tensor, shift: Tensor, channel_axis: int = -1) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.register_buffer("gain", gain.to(torch.float32))
        self.register_buffer("shift", shift.to(torch.float32))

    @classmethod
    def fit(cls, pair: Pair) -> tuple[nn.Module | None, Fit]:
        """Least squares of each channel; one that gains nothing on held-out images stays as it is."""
        fitted, held = _ChannelSums(pair, ~pair.held), _ChannelSums(pair, pair.held)
        gain, shift = fitted.fit()
        one, zero = torch.ones_like(gain), torch.zeros_like(shift)
        before, after = held.error(one, zero), held.error(gain, shift)
        keep = (after < before) & (gain > 0)  # a scale must stay positive to fold
        if not keep.any():
            return None, Fit(0.0, 0, len(keep), "no channel gains on held-out images")
        gain, shift = torch.where(keep, gain, one), torch.where(keep, shift, zero)
        explained = _share(before.sum(), held.error(gain, shift).sum())
        return cls(gain, shift, pair.axis), Fit(explained, int(keep.sum()), len(keep))

    def forward(self, entered: Tensor, output: Tensor) -> Tensor:
        """Return gain * output + shift in the output's dtype."""
        dtype, axis = output.dtype, self.channel_axis
        gain, shift = (along(value, output.ndim, axis).to(dtype) for value in (self.gain, self.shift))
        return torch.addcmul(shift, output, gain)

    def fold(self, layer: QuantizedLayer) -> bool:
        """Merge it into the layer's weight scales and bias."""
        layer.weight_scale = layer.weight_scale * self.gain
        layer.bias = self.shift if layer.bias is None else layer.bias * self.gain + self.shift
        return True


class BlockAffine(ChannelAffine):
    """The same after a block, whose output is a sum with the stream that enters and so cannot absorb it."""

    place = "block"


class LinearCompensation(nn.Module):
    """output + W input + b: the first QwT's layer beside a block.

    Args:
        weight: (channels out, channels in), float32.
        bias: (channels out,), float32.
        channel_axis: of the block's input and output.
    """

    place: ClassVar[Literal["layer", "block"]] = "block"
    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, channel_axis: int) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())

    @classmethod
    def fit(cls, pair: Pair) -> tuple[nn.Module | None, Fit]:
        """Least squares of a block's error on its input, by the normal equations in float64."""
        entered, _, got = pair.first()
        channels = got.shape[-1]
        if entered.shape[:-1] != got.shape[:-1]:
            return None, Fit(0.0, 0, channels, "its input and output have different tokens")
        gram: Tensor | float = 0.0
        cross: Tensor | float = 0.0
        for x, y, y_q in pair.chunks(~pair.held):
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            gram, cross = gram + x.T @ x, cross + x.T @ (y - y_q)
        solution = (torch.linalg.pinv(torch.as_tensor(gram), hermitian=True) @ cross).T
        weight, bias = solution[:, :-1], solution[:, -1]
        before = after = torch.zeros((), dtype=torch.float64, device=solution.device)
        for x, y, y_q in pair.chunks(pair.held):
            before = before + (y - y_q).square().sum()
            after = after + (y - y_q - x @ weight.T - bias).square().sum()
        if not after < before:
            return None, Fit(0.0, 0, channels, "the fit does not lower the error on held-out images")
        return cls(weight, bias, pair.axis), Fit(_share(before, after), channels, channels)

    def forward(self, entered: Tensor, output: Tensor) -> Tensor:
        """Return the compensated output, in its dtype."""
        error = F.linear(entered.movedim(self.channel_axis, -1).float(), self.weight, self.bias)
        return output + error.movedim(-1, self.channel_axis).to(output.dtype)

    def fold(self, layer: QuantizedLayer) -> bool:
        """It reads another tensor than the layer gives."""
        return False


def added_parameters(model: nn.Module) -> tuple[int, int]:
    """Count the numbers that compensations of a quantized model hold, and those of them that cannot be folded away."""
    found = [module for module in model.modules() if isinstance(module, (ChannelAffine, LinearCompensation))]
    sizes = [(sum(values.numel() for values in module.buffers()), module.place) for module in found]
    return sum(size for size, _ in sizes), sum(size for size, place in sizes if place == "block")


class _ChannelSums:
    """Per channel, what the least squares of y on y_q needs, in float64."""

    def __init__(self, pair: Pair, chosen: Tensor) -> None:
        self._sums: Tensor = torch.zeros(())
        self._count = 0
        for _, y, q in pair.chunks(chosen):
            sums = torch.stack([y.sum(0), q.sum(0), (y * q).sum(0), q.square().sum(0), y.square().sum(0)])
            self._sums, self._count = sums if self._count == 0 else self._sums + sums, self._count + len(y)

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


def _share(before: Tensor, after: Tensor) -> float:
    return float(1 - after / before) if before > 0 else 0.0
