"""What can be done about a format that does not survive, the cheapest first: a line of `FIXES` each.

A fix offers trials; each is measured, and the first that holds is the smallest fix. Those of the norms and of the
logits are settings of an engine, which nothing here can measure: they hold because what overflowed is no longer in
float16.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tweo_timm.diagnose.float16 import LARGEST, LOGITS, SQUARES, SUMS, VALUES, WHOLE, Float16Readings
from tweo_timm.layers import projections_called
from tweo_timm.quant.scheme import INTEGERS, Scheme
from tweo_timm.rewrite.scale import linear_pairs, scale_pairs, scale_stream, stages_of
from tweo_timm.survey.bench import Bench, Variant
from tweo_timm.survey.findings import SurveyFix
from tweo_timm.survey.sensitivity import Sensitivity

_MARGIN = 2.0
"""What is scaled down is to be this far below float16's limit."""
_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""How many sites are kept in float, one try after the other."""
_NAMED = 3
"""So many of them a sentence names; the record has all."""


@dataclass
class Problem:
    """A format that a model does not survive.

    Attributes:
        reading: one of the rows: a scheme, or "fp16-squares" and the like.
        variant: the model as it is, in that scheme.
        bench: what trials are measured with.
        readings: of float16, of the model as it is.
        sites: of integers and FP8: layers and sites, the most sensitive first.
    """

    reading: str
    variant: Variant
    bench: Bench
    readings: Float16Readings
    sites: Sequence[Sensitivity] = ()

    @property
    def scheme(self) -> Scheme:
        """The scheme, parsed."""
        return Scheme.parse(self.variant.scheme)

    @property
    def integers(self) -> bool:
        """Whether it is about integers."""
        return self.scheme.base == INTEGERS

    @property
    def float16(self) -> bool:
        """Whether it is about values that float16 cannot hold."""
        return self.reading == VALUES


@dataclass
class Trial:
    """One way to carry out a fix.

    Attributes:
        words: what to do.
        variant: what to measure; None where nothing can be.
        sites: what it is about.
    """

    words: str
    variant: Variant | None = None
    sites: list[str] = field(default_factory=list)


def _norm_whole(problem: Problem) -> Iterator[Trial]:
    if problem.reading in (SQUARES, SUMS):
        names = [site.name for site in problem.readings.overflowing(problem.reading)]
        words = "keep LayerNormalization one operator (opset 17 or newer, as our export does), or compute it in float32"
        yield Trial(words, None, names)


def _logits_in_float32(problem: Problem) -> Iterator[Trial]:
    names = [site.name for site in problem.readings.overflowing(LOGITS)]
    if problem.reading == LOGITS:
        yield Trial("fused attention, or its logits and softmax in float32", None, names)
    elif problem.float16 and names:  # where attention is not fused, the model in half precision stores them too
        yield Trial(f"fused attention, or {named(names)} in float32", problem.variant.but(keep=tuple(names)), names)


def _scaled(problem: Problem) -> Iterator[Trial]:
    if problem.scheme.base == "fp8-unit":
        scheme = problem.variant.scheme.replace("fp8-unit", "fp8")
        yield Trial("a scale for each tensor (scheme fp8)", problem.variant.but(scheme=scheme))


def _per_channel(problem: Problem) -> Iterator[Trial]:
    if problem.integers and not problem.scheme.per_channel:
        yield Trial("weights per channel", _with_letters(problem.variant, "c", "t"))


def _per_token(problem: Problem) -> Iterator[Trial]:
    if problem.integers and not problem.scheme.per_token:
        weights = "c" if problem.scheme.per_channel else "t"
        yield Trial("activations per token", _with_letters(problem.variant, weights, "k"))
    if problem.integers and not (problem.scheme.per_channel or problem.scheme.per_token):
        yield Trial("weights per channel and activations per token", _with_letters(problem.variant, "c", "k"))


def _with_letters(variant: Variant, weights: str, activations: str) -> Variant:
    body, *suffixes = variant.scheme.split("+")
    return variant.but(scheme="+".join([f"{body[:-2]}{weights}{activations}", *suffixes]))


def _stream_scaled(problem: Problem) -> Iterator[Trial]:
    exponents = stream_exponents(problem.variant.model, problem.readings) if problem.float16 else {}
    if exponents:
        yield Trial(_stream_words(exponents), problem.variant.but(model=_rescaled(problem, exponents, {})))


def _pairs_scaled(problem: Problem) -> Iterator[Trial]:
    model = problem.variant.model
    if problem.float16:
        pairs = pair_exponents(model, problem.bench.samples)
        stream = stream_exponents(model, problem.readings)
    else:
        pairs, stream = weight_exponents(model) if problem.integers else {}, {}
    if pairs:
        words = f"a power of two between {named(sorted(pairs))} and what writes to it (2^{max(pairs.values())} at most)"
        yield Trial(words, problem.variant.but(model=_rescaled(problem, {}, pairs)), sorted(pairs))
        if stream:
            both = problem.variant.but(model=_rescaled(problem, stream, pairs))
            yield Trial(f"{_stream_words(stream)}, and {words}", both, sorted(pairs))


def _rotation(problem: Problem) -> Iterator[Trial]:
    if problem.reading in (LOGITS, SQUARES, SUMS):
        return
    for method in ("random", "learned"):
        turned = problem.variant.but(model=problem.bench.rotated(method))
        command = f"tweo-repair --method {method}{' --as-head' * problem.bench.features}"
        yield Trial(f"rotate the stream ({command})", turned)
        if problem.integers and not problem.scheme.per_channel:
            words = f"rotate the stream ({command}), and weights per channel"
            yield Trial(words, _with_letters(turned, "c", "k" if problem.scheme.per_token else "t"))


def _sites_in_float(problem: Problem) -> Iterator[Trial]:
    if problem.float16:
        names = enclosing(problem.variant.model, problem.readings)
        if names:
            yield Trial(f"{named(names)} in float32", problem.variant.but(keep=tuple(names)), names)
        return
    names = [site.name for site in problem.sites]
    for count in (count for count in _COUNTS if count <= len(names) // 2):
        yield Trial(f"{named(names[:count])} in float", problem.variant.but(keep=tuple(names[:count])), names[:count])


def _training(problem: Problem) -> Iterator[Trial]:
    yield Trial(
        "train it on with the penalty (tweo-train --initial-checkpoint ... --tweo-weight 0.01); not measured here"
    )


Tries = Callable[[Problem], Iterator[Trial]]
FIXES: dict[str, Tries] = {
    "norm": _norm_whole,
    "logits": _logits_in_float32,
    "scales": _scaled,
    "channel": _per_channel,
    "token": _per_token,
    "stream": _stream_scaled,
    "pairs": _pairs_scaled,
    "rotation": _rotation,
    "sites": _sites_in_float,
    "training": _training,
}
"""Every fix, the cheapest first: what yields its trials for a problem, none where it does not apply."""


def smallest_fix(problem: Problem) -> tuple[SurveyFix, Variant | None]:
    """Try the fixes in their order until one holds.

    Returns:
        The first that holds, and what was measured of it; None where nothing can be.
    """
    tried = 0
    for name, tries in FIXES.items():
        for trial in _possible(tries(problem)):
            found = SurveyFix(format=problem.reading, fix=name, words=trial.words, sites=trial.sites, tried=tried)
            if trial.variant is None:
                return found, None
            if problem.float16 and not _holds_in_float16(problem, trial.variant):
                continue
            tried += 1
            try:
                decision = problem.bench.decide(trial.variant)
            except (ValueError, RuntimeError, TypeError):  # a scheme that this model does not allow fixes nothing
                continue
            if decision.survives:
                scheme = trial.variant.scheme
                found = replace(found, scheme=scheme, top1=decision.top1, verdict=decision.verdict)
                return found, trial.variant
    raise AssertionError("training is always a fix")


def _possible(trials: Iterator[Trial]) -> Iterator[Trial]:
    """The trials, until the model does not allow the fix."""
    try:
        yield from trials
    except ValueError:
        return


def _holds_in_float16(problem: Problem, variant: Variant) -> bool:
    """Whether nothing overflows any more, but inside what is kept in float32."""
    same = variant.model is problem.variant.model  # a pass over all images is not made again
    readings = problem.readings if same else problem.bench.readings(variant.model)
    overflowing = readings.overflowing(VALUES)
    return all(site.name in variant.keep or _inside(site.name, variant.keep) for site in overflowing)


def named(names: Sequence[str]) -> str:
    """Name a few layers or sites, and count the others."""
    first, others = list(names[:_NAMED]), len(names) - _NAMED
    return listing([*first, f"{others} more"] if others > 0 else first)


def listing(names: Sequence[str]) -> str:
    """Join names in the way of a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _rescaled(problem: Problem, stream: dict[str, int], pairs: dict[str, int]) -> nn.Module:
    changed = copy.deepcopy(problem.variant.model)
    scale_stream(changed, stream)
    scale_pairs(changed, pairs)
    return changed


def _stream_words(exponents: dict[str, int]) -> str:
    largest = max(exponents.values())
    return f"the residual stream times 2^-{largest}" + (" and less in other stages" if len(exponents) > 1 else "")


def stream_exponents(model: nn.Module, readings: Float16Readings) -> dict[str, int]:
    """By how many powers of two each stage's stream has to be smaller for float16; stages that need nothing left out.

    Raises:
        ValueError: for a model that `describe_stream` refuses.
    """
    peaks = {site.name: site.peak_abs for site in readings.sites[VALUES]}
    exponents = {}
    for stage in stages_of(model):
        names = {*stage.blocks, *(port.module or WHOLE for port in stage.writers)}
        exponents[stage.name] = _exponent(max((peaks.get(name, 0.0) for name in names), default=0.0))
    return {name: exponent for name, exponent in exponents.items() if exponent}


def _exponent(peak: float) -> int:
    if peak <= LARGEST or not math.isfinite(peak):
        return 0
    return math.ceil(math.log2(peak * _MARGIN / LARGEST))


@torch.no_grad()
def pair_exponents(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, int]:
    """By how many powers of two what is between two linear maps has to be smaller for float16.

    Raises:
        ValueError: for a model that `linear_pairs` refuses.
    """
    pairs = linear_pairs(model)
    peaks = dict.fromkeys(pairs, 0.0)
    handles = []
    for name, pair in pairs.items():

        def read(module: nn.Module, args: Any, name: str = name) -> None:
            peaks[name] = max(peaks[name], float(args[0].abs().amax()))

        def written(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            peaks[name] = max(peaks[name], float(output[..., slice(*pairs[name].rows)].abs().amax()))

        handles.append(model.get_submodule(name).register_forward_pre_hook(read))
        handles.append(model.get_submodule(pair.writer).register_forward_hook(written))
    try:
        with projections_called(model):
            for images in batches:
                model(images.to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: exponent for name, peak in peaks.items() if (exponent := _exponent(peak))}


def weight_exponents(model: nn.Module) -> dict[str, int]:
    """By how many powers of two rows of one tensor stand above its other rows, where they share a scale.

    Raises:
        ValueError: for a model that `linear_pairs` refuses.
    """
    exponents = {}
    for name, pair in linear_pairs(model).items():
        weight: Any = model.get_submodule(pair.writer).weight
        inside = torch.zeros(len(weight), dtype=torch.bool)
        inside[slice(*pair.rows)] = True
        if not bool(inside.all()):
            large, rest = (float(weight.detach()[rows].abs().max()) for rows in (inside, ~inside))
            exponents[name] = round(math.log2(large / rest)) if large and rest else 0
    return {name: exponent for name, exponent in exponents.items() if exponent > 1}


def enclosing(model: nn.Module, readings: Float16Readings) -> list[str]:
    """The smallest modules around what overflows in float16 that return what float16 holds; [] where there are none."""
    found: list[str] = []
    for name in (site.name for site in readings.overflowing(VALUES)):
        while name and (name == WHOLE or not readings.outputs.get(name, math.inf) <= LARGEST):
            name = name.rpartition(".")[0]
        if not name or not hasattr(model.get_submodule(name), "forward") or _is_container(model.get_submodule(name)):
            return []
        found.append(name)
    names = sorted(set(found))
    return [name for name in names if not _inside(name, names)]


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
