"""The residual stream and the attention products of a block: where they are, and how they are quantized.

The adds of a residual stream are expressions inside a block's forward (`x = x + self.drop_path(self.mlp(...))`), not
modules, so no hook can see them; a hook on the next norm sees the sum but cannot change what the next add reads. And
torch.fx does not trace every family (shapes decide control flow). What is exact everywhere is a TorchFunctionMode,
which sees every call of a torch function while it is active. It is active inside a block's forward only, pushed and
popped by hooks on that block, and works under torch.export and both ONNX exporters as it does in eager mode.

While calibrating, a SiteWatcher numbers the additions of two tensors that a block executes and follows its input: an
addition is a residual add if an operand is the stream, that is the block's input or an earlier residual add, reshaped
or not. Blocks that first project or pool their stream (Hiera's first of a stage, MaxViT's strided convolution) are read
backwards: the addition that a residual add or the block's output is made of is one too. Branch additions
(biases, position biases, parallel branches) are neither.

While running, a StreamQuantizer counts additions again and rounds those numbers. The count is checked at every call, so
a block whose control flow differs from the calibration's is an error, not a wrong result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tweo_timm.blocks import channel_axis
from tweo_timm.flow import Flow, HookedMode, name_of
from tweo_timm.layers import adds_channels_first
from tweo_timm.quant.quantizer import Quantizer
from tweo_timm.stream import stream_of, streams_in, with_stream

_ADDS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
_PRODUCTS = {"matmul", "__matmul__", "bmm"}
_UNSUPPORTED_PRODUCTS = {"einsum", "baddbmm", "scaled_dot_product_attention"}


class _Ordinals(TorchFunctionMode):
    """Numbers the additions and the products of two tensors, in the order of execution."""

    def __init__(self) -> None:
        super().__init__()
        self.num_adds = 0
        self.num_products = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if name in _ADDS or name in _PRODUCTS:
            operands = [*args, *kwargs.values()][:2]
            if all(isinstance(operand, Tensor) for operand in operands):
                if name in _ADDS:
                    self.num_adds += 1
                    return self.on_add(self.num_adds - 1, func, args, kwargs)
                if not any(isinstance(operand, nn.Parameter) for operand in operands):
                    self.num_products += 1
                    return self.on_product(self.num_products - 1, func, operands)
        return self.on_other(func, args, kwargs)

    def on_add(self, index: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        raise NotImplementedError

    def on_product(self, index: int, func: Callable[..., Any], operands: list[Tensor]) -> Any:
        raise NotImplementedError

    def on_other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return func(*args, **kwargs)


@dataclass
class BlockSites:
    """What one block does to its stream, and how large the tensors there became.

    Attributes:
        num_adds: additions of two tensors that the block executes.
        num_products: products of two activations.
        residual: number of a residual add -> the axis of its channels.
        stream: the argument (position or keyword) that brings the stream in.
        output: the block's output is not simply its last residual add.
        output_axis: axis of the channels of the block's output.
        hidden_products: functions that multiply activations where operands cannot be seen.
        amax: site -> max|X|: "add3", "output", "product1_left", "product1_right".
    """

    num_adds: int = 0
    num_products: int = 0
    residual: dict[int, int] = field(default_factory=dict)
    stream: int | str = 0
    output: bool = False
    output_axis: int = -1
    hidden_products: list[str] = field(default_factory=list)
    amax: dict[str, Tensor] = field(default_factory=dict)

    def raise_amax(self, site: str, x: Tensor) -> None:
        """Count the largest magnitude of x in."""
        peak = x.detach().abs().amax().float()
        self.amax[site] = torch.maximum(self.amax[site], peak) if site in self.amax else peak


class SiteWatcher(HookedMode, _Ordinals):
    """Finds a block's sites in one float forward, and their largest magnitudes; enter it around the block's forward.

    Args:
        block: the block that runs.
        arguments: its tensor arguments by position ("0") or keyword.
        sites: what to fill in.
    """

    _STREAM: ClassVar[str] = "stream"

    def __init__(self, block: nn.Module, arguments: dict[int | str, Tensor], sites: BlockSites) -> None:
        super().__init__()
        self._block, self._sites = block, sites
        self._arguments = {key: x for key, x in arguments.items() if x.is_floating_point() and x.ndim > 2}
        self._flow = Flow()
        self._adds: list[tuple[frozenset[str], int]] = []
        self._owners: list[nn.Module] = [block]
        for key, x in self._arguments.items():
            self._flow.label(x, {self._STREAM, f"input{key}"})

    def hooks(self) -> Iterator[Any]:
        """Of the modules inside the block: to know whose code an addition is."""
        for module in self._block.modules():
            if module is not self._block:
                yield module.register_forward_pre_hook(self._begin)
                yield module.register_forward_hook(self._end)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._owners.append(module)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._owners.pop()

    def on_add(self, index: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Note what was added, and how large the sum is."""
        labels = self._flow.of(args, kwargs)
        result = func(*args, **kwargs)
        self._sites.raise_amax(f"add{index}", result)
        self._adds.append((labels, self._channels(result)))
        stream = {self._STREAM} & labels
        self._flow.label(result, {f"add{index}", *stream})
        return result

    def on_product(self, index: int, func: Callable[..., Any], operands: list[Tensor]) -> Any:
        """Note how large the operands are."""
        for side, operand in zip(("left", "right"), operands, strict=True):
            self._sites.raise_amax(f"product{index}_{side}", operand)
        return func(*operands)

    def on_other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Follow the stream through a change of shape."""
        result = func(*args, **kwargs)
        if not self._flow.moves(func, args, kwargs, result) and name_of(func) in _UNSUPPORTED_PRODUCTS:
            self._sites.hidden_products.append(name_of(func))
        return result

    def finish(self, output: Any) -> None:
        """Decide which additions are residual; call it with the block's output, after leaving the context."""
        residual = {index for index, (labels, _) in enumerate(self._adds) if self._STREAM in labels}
        streams = streams_in(output, self._block)
        made_of = _adds_of(frozenset().union(*(self._flow.labels(stream) for stream in streams)))
        to_read = residual | made_of
        residual |= made_of
        while to_read:  # backwards, through blocks that project their stream before the first add
            labels, _ = self._adds[to_read.pop()]
            if self._STREAM not in labels:
                new = _adds_of(labels) - residual
                residual |= new
                to_read |= new
        used = frozenset().union(*(self._adds[index][0] for index in residual))
        stream_inputs = [key for key in self._arguments if f"input{key}" in used] or list(self._arguments)[:1]
        sites = self._sites
        sites.num_adds, sites.num_products = self.num_adds, self.num_products
        sites.residual = {index: self._adds[index][1] for index in sorted(residual)}
        sites.stream = stream_inputs[0]
        sites.output = not made_of
        sites.raise_amax("output", stream_of(output, self._block))
        sites.output_axis = channel_axis(self._block, streams[0])

    def _channels(self, x: Tensor) -> int:
        """The axis of channels: by the layers of the module whose code adds; only (B, C, H, W) has it first."""
        return 1 if x.ndim > 3 and adds_channels_first(self._owners[-1]) else -1


def _adds_of(labels: frozenset[str]) -> set[int]:
    return {int(label[3:]) for label in labels if label.startswith("add")}


class _Rounding(_Ordinals):
    """Rounds residual adds and product operands as they are computed."""

    def __init__(self, quantizers: nn.ModuleDict) -> None:
        super().__init__()
        self._quantizers = quantizers

    def on_add(self, index: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        result = func(*args, **kwargs)
        site = f"add{index}"
        if site not in self._quantizers:
            return result
        rounded = self._quantizers[site](result)
        return result.copy_(rounded) if name_of(func) in ("add_", "__iadd__") else rounded

    def on_product(self, index: int, func: Callable[..., Any], operands: list[Tensor]) -> Any:
        sites = [f"product{index}_{side}" for side in ("left", "right")]
        rounded = [self._quantizers[s](x) if s in self._quantizers else x for s, x in zip(sites, operands, strict=True)]
        return func(*rounded)


class StreamQuantizer(nn.Module):
    """Rounds one block's residual stream and attention operands; `attach(block)` puts it to work.

    It belongs to the model, not to the block, because a block may be a Sequential, which runs every child that it has.

    Args:
        name: the block's name in the model.
        sites: what calibration found there.
        quantizers: site -> Quantizer, for some or all of the sites.

    Attributes:
        stream: the block's argument (position or keyword) that brings the stream in.
        channel_axis: axis of the channels of the block's output.
        quantizers: site -> Quantizer; "add3" rounds a residual add, "output" the block's output,
            "product0_left" and "product0_right" the operands of an attention product.
        compensation: None or a `Compensation` applied to what entered and to the block's (rounded) output.
    """

    compensation: nn.Module | None

    def __init__(self, name: str, sites: BlockSites, quantizers: dict[str, Quantizer]) -> None:
        super().__init__()
        self.block_name = name
        self.stream, self.channel_axis = sites.stream, sites.output_axis
        self.num_adds, self.num_products = sites.num_adds, sites.num_products
        self.quantizers = nn.ModuleDict(quantizers)
        self.compensation = None
        self._running: list[tuple[_Rounding, Tensor]] = []

    def attach(self, block: nn.Module) -> None:
        """Put hooks on the block; deep copies of the model carry them, and their own quantizers, along."""
        block.register_forward_pre_hook(self._enter, with_kwargs=True)
        block.register_forward_hook(self._leave, with_kwargs=True, always_call=True)

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mode = _Rounding(self.quantizers)
        mode.__enter__()  # type: ignore[no-untyped-call]
        self._running.append((mode, kwargs[self.stream] if isinstance(self.stream, str) else args[self.stream]))

    def _leave(self, block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        mode, entered = self._running.pop()
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if output is None:  # the block raised
            return None
        if (mode.num_adds, mode.num_products) != (self.num_adds, self.num_products):
            raise RuntimeError(
                f"block {self.block_name!r} executed {mode.num_adds} additions and {mode.num_products} products, "
                f"{self.num_adds} and {self.num_products} while calibrating: its control flow depends on the input, or "
                "a hook inside it adds tensors. Calibrate with inputs of the kind (size, mask) that follows."
            )
        if "output" in self.quantizers:
            output = with_stream(output, self.quantizers["output"](stream_of(output, block)), block)
        if self.compensation is not None:
            output = with_stream(output, self.compensation(entered, stream_of(output, block)), block)
        return output

    def extra_repr(self) -> str:
        """Name the block."""
        return f"block {self.block_name!r}"
