"""Where an outlier comes from: the MLP behind it, written as a sum of aligned directions.

For y = B A x (A = fc1.weight, B = fc2.weight) and channel k with w = row k of B, the singular value decomposition
A = sum_i s_i u_i v_i^T gives y_k = sum_i s_i (w . u_i)(v_i . x): an outlier appears where w aligns with a left singular
vector and x with the matching right one, whatever the image (arXiv:2511.23225). Published example, ViT-B:
18.189 * -9.1847 * -5.6165 = 938.28, with GELU 884.29, measured 880.

LayerScale is folded into w. A gated MLP (SwiGLU, GluMlp) is a product of two linear maps, not one: it is decomposed
with its gate held at the value it has for the token in question, which is exact for that token and says nothing about
others. Whether the linear form may be trusted is a question of its own, answered by a rule that the record repeats.

Refused: MLPs that mix tokens or run as convolutions, and blocks whose attention and MLP share one projection.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from tweo_timm.blocks import channel_axis, find_blocks
from tweo_timm.diagnose.samples import as_batches
from tweo_timm.layers import find_mlps, layer_scale_of
from tweo_timm.modes import evaluating
from tweo_timm.records import plain
from tweo_timm.tap import BlockTap

NUM_TERMS = 10
"""Terms listed in a record, the largest first; all of them are in the spectrum."""

VALIDITY_RULE = (
    "The linear form is valid where the linear value with biases has the sign of the MLP's real contribution and "
    "between half and twice its size."
)


@dataclass
class _Peak:
    """The element that is explained."""

    block: str
    image: int
    token: int
    channel: int
    value: float


def colinearity(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    block: str | None = None,
    channel: int | None = None,
    blocks: str | None = None,
) -> dict[str, Any]:
    """Decompose the contribution of an MLP to the largest activation of a block's output.

    Args:
        model: a timm model; it is run in evaluation mode, and every module keeps its own.
        images: preprocessed images (B, C, H, W), or batches of them.
        block: name of a block, such as "blocks.5"; None takes the one with the largest peak that an MLP can explain.
        channel: channel of its output; None takes that of the peak.
        blocks: regular expression naming the transformer blocks by hand; None finds them by structure.

    Returns:
        block, mlp (module name), kind ("plain" or "gated"), image, token, channel;
        terms (the largest by size, each with index, singular_value, w_dot_u, v_dot_x, value), top_term, sum_of_terms
        (which is w^T A x), with_biases (the linear form with fc1's and fc2's), with_activation (the real MLP, from the
        same weights), mlp_measured (what the MLP contributed in the forward pass, LayerScale included), measured (the
        block's output there), layer_scale (its factor, 1 where there is none); singular_values, w_dot_u and v_dot_x
        (the whole spectrum, for a plot); alignment (share of sum_i |term_i| in the top term); linear_valid,
        linear_ratio (with_biases / mlp_measured), rule; note ("" or what to keep in mind).

    Raises:
        ValueError: for an unknown block or channel, no images, or a block whose MLP cannot be read this way.
    """
    model = unwrap_model(model)
    found = find_blocks(model, blocks)
    if block is not None and block not in found:
        raise ValueError(f"block {block!r} is not one of this model's: {', '.join(found)}")
    if block is not None:
        _mlp_of(found[block])  # refuses before anything runs
    batches = as_batches(images)
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        candidates = [block] if block is not None else _readable(model, found, batches[0][:1].to(device))
        peak = _find_peak(model, {name: found[name] for name in candidates}, batches, channel)
        image = torch.cat(batches)[peak.image : peak.image + 1].to(device)
        return _explain(model, found[peak.block], peak, image)


def terms_of(w: Tensor, a: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Decompose w^T A x by the singular value decomposition of A, in float64.

    Args:
        w: (hidden,), a row of fc2, LayerScale folded in.
        a: (hidden, inputs), fc1's weight.
        x: (inputs,), what the MLP reads.

    Returns:
        singular_values, w_dot_u, v_dot_x, values: (rank,) each, values = their product, in the order of singular
        values.
    """
    u, s, vh = torch.linalg.svd(a.double(), full_matrices=False)
    w_dot_u, v_dot_x = w.double() @ u, vh @ x.double()
    return {"singular_values": s, "w_dot_u": w_dot_u, "v_dot_x": v_dot_x, "values": s * w_dot_u * v_dot_x}


def _readable(model: nn.Module, found: dict[str, nn.Module], image: Tensor) -> list[str]:
    """The blocks whose last MLP produces every token of the block's output."""
    readable, reasons = [], []
    tokens: dict[str, int] = {}
    with BlockTap(found, lambda name, module, out: tokens.__setitem__(name, _tokens(module, out, 1).shape[1])):
        model(image)
    for name, module in found.items():
        try:
            mlp = _mlp_of(module)[1]
            inputs: list[Tensor] = []
            handle = mlp.register_forward_pre_hook(lambda m, args, seen=inputs: seen.append(args[0]))
            model(image)
            handle.remove()
            if inputs and inputs[-1].flatten(0, -2).shape[0] == tokens.get(name):
                readable.append(name)
            else:
                reasons.append(f"{name}: its MLP does not see every token")
        except ValueError as error:
            reasons.append(f"{name}: {error}")
    if not readable:
        raise ValueError(f"no block has an MLP that can be decomposed; the first: {reasons[0]}")
    return readable


def _find_peak(model: nn.Module, blocks: dict[str, nn.Module], batches: list[Tensor], channel: int | None) -> _Peak:
    best: list[_Peak] = []
    offset = 0

    def observe(name: str, module: nn.Module, output: Tensor) -> None:
        x = _tokens(module, output, len(images))
        if channel is not None and not 0 <= channel < x.shape[-1]:
            raise ValueError(f"channel {channel} is not one of block {name!r}: it has {x.shape[-1]}")
        magnitude = x.abs() if channel is None else x.abs()[..., channel : channel + 1]
        index = int(magnitude.argmax())
        image, token, position = (int(i) for i in torch.unravel_index(torch.tensor(index), magnitude.shape))
        at = position if channel is None else channel
        value = float(x[image, token, at])
        if not best or abs(value) > abs(best[0].value):
            best[:] = [_Peak(name, offset + image, token, at, value)]

    device = next(model.parameters()).device
    with BlockTap(blocks, observe):
        for images in batches:
            model(images.to(device))
            offset += len(images)
    return best[0]


def _tokens(block: nn.Module, output: Tensor, num_images: int) -> Tensor:
    """A block's output as (images, tokens, channels); MobileViT has an image's patches in consecutive rows."""
    x = output.movedim(channel_axis(block, output), -1)
    return x.reshape(num_images, -1, x.shape[-1])


def _mlp_of(block: nn.Module) -> tuple[str, nn.Module, nn.Module]:
    """Return name within the block, the last MLP, and the module that owns it."""
    mlps = find_mlps(block)
    if not mlps:
        raise ValueError("has no module with fc1, act and fc2: attention and MLP may share one projection")
    name, mlp = list(mlps.items())[-1]
    layers = [getattr(mlp, part) for part in ("fc1", "fc1_g", "fc1_x", "fc2") if hasattr(mlp, part)]
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        raise ValueError("its MLP is made of convolutions, whose singular vectors are images")
    return name, mlp, block.get_submodule(name.rpartition(".")[0])


def _explain(model: nn.Module, block: nn.Module, peak: _Peak, image: Tensor) -> dict[str, Any]:
    name, mlp, owner = _mlp_of(block)
    seen: dict[str, Tensor] = {}
    first: Any = mlp.fc1_x if hasattr(mlp, "fc1_x") else mlp.fc1
    handles = [
        first.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].clone())),
        mlp.register_forward_hook(lambda m, args, out: seen.update(out=out.clone())),
    ]
    with BlockTap({peak.block: block}, lambda n, module, out: seen.update(block=_tokens(module, out, 1))):
        model(image)
    for handle in handles:
        handle.remove()
    inputs, outputs = seen["x"].flatten(0, -2), seen["out"].flatten(0, -2)
    if len(inputs) != seen["block"].shape[1]:
        raise ValueError(
            f"block {peak.block!r}: its MLP sees {len(inputs)} tokens of {seen['block'].shape[1]}, so the token of the "
            "peak cannot be traced to it; name another block"
        )
    scale, note = _layer_scale(owner, peak.channel)
    form = _linear_form(mlp, inputs[peak.token], peak.channel, scale)
    parts = terms_of(form["w"], form["a"], inputs[peak.token])
    measured_mlp = scale * float(outputs[peak.token, peak.channel])
    rounding = 1e-3 * abs(scale) * float(outputs.abs().mean()) + 1e-5 * float(parts["values"].abs().sum())
    if abs(form["real"] - measured_mlp) > 1e-3 * abs(measured_mlp) + rounding:
        raise ValueError(
            f"block {peak.block!r}: its MLP computes {measured_mlp:.6g} where its layers give {form['real']:.6g}: it "
            "does more than fc2(act(fc1(x))), such as a convolution over tokens; name another block"
        )
    linear = float(parts["values"].sum()) + float(form["constant"])
    order = parts["values"].abs().argsort(descending=True)
    terms = [
        {"index": int(i), **{_TERM[key]: float(parts[key][i]) for key in _TERM}} for i in order[:NUM_TERMS].tolist()
    ]
    ratio = linear / measured_mlp if measured_mlp else float("nan")
    record: dict[str, Any] = plain(
        {
            "block": peak.block,
            "mlp": ".".join(part for part in (peak.block, name) if part),
            "kind": "gated" if form["gated"] else "plain",
            "image": peak.image,
            "token": peak.token,
            "channel": peak.channel,
            "terms": terms,
            "top_term": terms[0]["value"],
            "sum_of_terms": parts["values"].sum(),
            "with_biases": linear,
            "with_activation": form["real"],
            "mlp_measured": measured_mlp,
            "measured": peak.value,
            "layer_scale": scale,
            "singular_values": parts["singular_values"],
            "w_dot_u": parts["w_dot_u"],
            "v_dot_x": parts["v_dot_x"],
            "alignment": parts["values"].abs().max() / parts["values"].abs().sum().clamp(min=1e-300),
            "linear_valid": bool(0.5 <= ratio <= 2.0),
            "linear_ratio": ratio,
            "rule": VALIDITY_RULE,
            "note": " ".join(part for part in (note, _GATED_NOTE if form["gated"] else "") if part),
        }
    )
    return record


_TERM = {"singular_values": "singular_value", "w_dot_u": "w_dot_u", "v_dot_x": "v_dot_x", "values": "value"}
_GATED_NOTE = "A gated MLP is decomposed with the gate held at this token's value."


def _linear_form(mlp: Any, x: Tensor, channel: int, scale: float) -> dict[str, Any]:
    """Return w and A of w^T A x in float64, the constant that biases add, and the real MLP's value with activation."""
    mlp = copy.deepcopy(mlp).double()
    x = x.double()
    row = mlp.fc2.weight[channel] * scale
    offset = 0.0 if mlp.fc2.bias is None else float(mlp.fc2.bias[channel]) * scale
    gate: Tensor | None = None
    if hasattr(mlp, "fc1_g"):  # SwiGLU: act(fc1_g x) * fc1_x x
        gate = mlp.act(mlp.fc1_g(x))
        weight, bias = mlp.fc1_x.weight, mlp.fc1_x.bias
    elif mlp.fc1.out_features == 2 * mlp.fc2.in_features:  # GluMlp: the two halves of fc1
        halves = list(torch.chunk(mlp.fc1.weight, 2))
        biases: list[Any] = [None, None] if mlp.fc1.bias is None else list(torch.chunk(mlp.fc1.bias, 2))
        at = 1 if mlp.gate_last else 0
        gate = mlp.act(nn.functional.linear(x, halves[at], biases[at]))
        weight, bias = halves[1 - at], biases[1 - at]
    else:
        weight, bias = mlp.fc1.weight, mlp.fc1.bias
    hidden = nn.functional.linear(x, weight, bias)
    linear_gate = torch.ones_like(hidden) if gate is None else gate
    real = mlp.act(hidden) if gate is None else gate * hidden
    norm: Any = getattr(mlp, "norm", None)
    if tuple(getattr(norm, "normalized_shape", ())) == tuple(real.shape):  # else it stands before fc1
        real = norm(real)
    return {
        "w": row,
        "a": linear_gate[:, None] * weight,
        "constant": offset + (0.0 if bias is None else float(row @ (linear_gate * bias))),
        "real": float(row @ real) + offset,
        "gated": gate is not None,
    }


def _layer_scale(owner: nn.Module, channel: int) -> tuple[float, str]:
    """Return the factor that the block puts on this channel of its MLP, and a note where a norm follows instead."""
    gamma = layer_scale_of(owner)
    if gamma is not None:
        return float(gamma[channel]), ""
    if any(word in type(owner).__name__ for word in ("PostNorm", "ResPost", "SwinTransformerV2")):
        return 1.0, "A norm follows the MLP before the residual add: mlp_measured is what that norm reads."
    return 1.0, ""
