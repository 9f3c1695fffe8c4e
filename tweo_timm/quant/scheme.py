"""What is quantized, and how finely: the strings that name a scheme, such as ``w8a8-tt+res``.

A scheme is short enough to be a column of a table and a command-line argument, and exact enough to be reproduced:

    w8a8-tt        8-bit weights and activations, both with one scale a tensor; activation scales are static
    w8a8-ck        weights with a scale a channel, activations with a scale a token, computed as they come
    w7a8-tt        weights within +-63: exact int8 products on every processor (docs/export.md)
    w6a6-tt+res    as the first at 6 bits, and the residual stream is quantized too
    w8a8-tt+res+rot    the residual stream is rotated first, exactly, so that no channel stands out (docs/repair.md)
    fp16, bf16     the whole model in that precision, as `model.half()` has it: infinities stay infinities
    fp8            weights and inputs of layers in E4M3, per tensor, by static scales max|X| / 448; attention's products
                   stay float, but with +attn
    fp8-unit       the same with every scale 1; larger than 448 saturates

The letters are those of arXiv:2511.23225: T per tensor, C per channel, K per token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from tweo_timm.tables import Entry

WEIGHT_BITS = (8, 7, 6, 4)
"""7: int8 of half the range, whose products with uint8 cannot saturate on a processor that adds two in 16 bits."""
ACTIVATION_BITS = (8, 6, 4)


@dataclass(frozen=True)
class Suffix:
    """What one suffix of a scheme says; two that say something of the same field exclude each other.

    Attributes:
        field: the field of `Scheme` that it sets.
        value: to what.
        by: what carries it out: the method of a rotation, the `Compensation` class of a compensation.
    """

    field: str
    value: Any = True
    by: Any = None


SUFFIXES = {
    "res": Suffix("residual"),
    "attn": Suffix("attention"),
    "zero": Suffix("zero_point"),
    "rot": Suffix("rotation", "rot", "learned"),
    "rotr": Suffix("rotation", "rotr", "random"),
    "smooth": Suffix("smooth"),
    "qwt": Suffix("compensation", "qwt", Entry("tweo_timm.quant.compensation:ChannelAffine")),
    "qwtblock": Suffix("compensation", "qwtblock", Entry("tweo_timm.quant.compensation:BlockAffine")),
    "qwtlinear": Suffix("compensation", "qwtlinear", Entry("tweo_timm.quant.compensation:LinearCompensation")),
}
"""Every suffix, in the order in which a scheme is written."""


@dataclass(frozen=True)
class Base:
    """The numbers that a scheme computes with: what stands in front of its suffixes.

    Attributes:
        by: ``convert(model, blocks, observation, scheme, keep_float)``, which changes a float model in place.
        takes: the fields of `Scheme` that its suffixes may set; None: all of them.
        calibrated: whether `by` needs to know what calibration saw.
        not_exportable: why there is no ONNX file of such a model; "" where there is one.
    """

    by: Entry
    takes: tuple[str, ...] | None = None
    calibrated: bool = True
    not_exportable: str = ""


_HALF = Entry("tweo_timm.quant.half:convert")
_FLOAT8 = Entry("tweo_timm.quant.float8:convert")
_FLOAT8_TAKES = ("residual", "attention", "rotation", "smooth")
_NO_HALF_FILE = "a float16 file is that of the float model, with --export-dtype float16 and without --quantize"
INTEGERS = "integers"
BASES = {
    INTEGERS: Base(Entry("tweo_timm.quant.convert:convert")),
    "fp16": Base(_HALF, ("rotation",), calibrated=False, not_exportable=_NO_HALF_FILE),
    "bf16": Base(_HALF, ("rotation",), calibrated=False, not_exportable=_NO_HALF_FILE),
    "fp8": Base(_FLOAT8, _FLOAT8_TAKES),
    "fp8-unit": Base(_FLOAT8, _FLOAT8_TAKES),
}
"""Every base. Integers are written w8a8-tt and the like, the others by their names."""
_INTEGERS = re.compile(r"w(?P<w>\d+)a(?P<a>\d+)-(?P<weights>[a-z])(?P<activations>[a-z])")


@dataclass(frozen=True)
class Scheme:
    """One way to quantize a model; `Scheme.parse("w8a8-tt+res")` reads it, `str(scheme)` writes it.

    Attributes:
        weight_bits: 8, 7, 6 or 4.
        activation_bits: 8, 6 or 4; also those of the residual stream and the attention operands.
        per_channel: weights have a scale for each output channel, not one for the tensor.
        per_token: activations have a scale for each token, computed at run time, not one static scale for the tensor.
        residual: the residual stream is quantized: after each residual add, and at block outputs.
        attention: the operands of both attention products are quantized.
        smooth: SmoothQuant first moves activation peaks into the weights.
        compensation: "" for none, "qwt" (a gain and a shift for each channel after each layer, QwT-v2), "qwtblock" (the
            same after each block) or "qwtlinear" (a linear layer beside each block, the first QwT).
        rotation: "" for none, "rot" (learned from the calibration images) or "rotr" (random): the residual stream is
            rotated before anything else, which changes nothing but its basis.
        zero_point: inputs that lie on one side of 0, as after GELU, cover their range with a zero point.
        base: the name of its numbers in `BASES`; the first four fields are about integers alone.

    Raises:
        ValueError: if a field has another value.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    per_channel: bool = False
    per_token: bool = False
    residual: bool = False
    attention: bool = False
    smooth: bool = False
    compensation: str = ""
    rotation: str = ""
    zero_point: bool = False
    base: str = INTEGERS

    def __post_init__(self) -> None:
        if self.base not in BASES:
            raise ValueError(f"base is {self.base!r}; accepted are {', '.join(BASES)}")
        self._refuse_fields_of_others()
        for name, bits, accepted in (
            ("weight_bits", self.weight_bits, WEIGHT_BITS),
            ("activation_bits", self.activation_bits, ACTIVATION_BITS),
        ):
            if bits not in accepted:
                words = ", ".join(map(str, accepted))
                raise ValueError(f"{name} is {bits!r}; accepted are {words} (a scheme is {grammar()})")
        for field in ("compensation", "rotation"):
            known, value = suffixes_of(field), getattr(self, field)
            if value not in ("", *known):
                raise ValueError(f"{field} is {value!r}; accepted are '', {', '.join(known)}")
        if self.zero_point and self.per_token:
            raise ValueError("+zero needs static activation scales: use a scheme such as w8a8-tt+zero")

    def _refuse_fields_of_others(self) -> None:
        takes = BASES[self.base].takes
        if takes is None:
            return
        default = {field.name: field.default for field in fields(self)}
        for name, value in vars(self).items():
            if name not in ("base", *takes) and value != default[name]:
                suffixes = [suffix for suffix, said in SUFFIXES.items() if said.field == name and said.value == value]
                accepted = ", ".join(f"+{suffix}" for suffix, said in SUFFIXES.items() if said.field in takes)
                what = f"+{suffixes[0]}" if suffixes else f"{name} {value!r}"
                raise ValueError(f"{self.base} does not take {what}: it takes {accepted} (a scheme is {grammar()})")

    @property
    def rotation_method(self) -> str:
        """How the rotation is found, as `rotate` calls it: "learned" or "random"."""
        method: str = SUFFIXES[self.rotation].by
        return method

    @classmethod
    def parse(cls, text: str | Scheme) -> Scheme:
        """Read a scheme from its string; a Scheme is returned as it is.

        Raises:
            ValueError: naming the part that is wrong, and the grammar.
        """
        if isinstance(text, Scheme):
            return text
        body, *suffixes = text.strip().lower().split("+")
        numbers = {"base": body} if body in BASES and body != INTEGERS else _integers(text, body)
        said: dict[str, list[str]] = {}
        for suffix in suffixes:
            if suffix not in SUFFIXES or suffixes.count(suffix) > 1:
                raise _error(text, "+" + suffix)
            said.setdefault(SUFFIXES[suffix].field, []).append(suffix)
        for names in said.values():
            if len(names) > 1:
                raise _error(text, "+" + "+".join(names))
        return cls(**numbers, **{field: SUFFIXES[name].value for field, (name,) in said.items()})

    def __str__(self) -> str:
        suffixes = [name for name, suffix in SUFFIXES.items() if getattr(self, suffix.field) == suffix.value]
        letters = ("c" if self.per_channel else "t") + ("k" if self.per_token else "t")
        integers = f"w{self.weight_bits}a{self.activation_bits}-{letters}"
        return "+".join([integers if self.base == INTEGERS else self.base, *suffixes])


def _integers(text: str, body: str) -> dict[str, Any]:
    """The fields that ``w8a8-tt`` and the like set."""
    match = _INTEGERS.fullmatch(body)
    if match is None:
        raise _error(text, body)
    for key, accepted in (("w", WEIGHT_BITS), ("a", ACTIVATION_BITS)):
        if int(match[key]) not in accepted:
            raise _error(text, key + match[key])
    for key, letters in (("weights", "tc"), ("activations", "tk")):
        if match[key] not in letters:
            raise _error(text, f"{key} {match[key]}")
    return {
        "weight_bits": int(match["w"]),
        "activation_bits": int(match["a"]),
        "per_channel": match["weights"] == "c",
        "per_token": match["activations"] == "k",
    }


def suffixes_of(field: str) -> dict[str, Suffix]:
    """Return the suffixes that set a field of `Scheme`, by name."""
    return {name: suffix for name, suffix in SUFFIXES.items() if suffix.field == field}


def refuse_not_exportable(scheme: str | None, dtype: str = "float32") -> None:
    """Refuse a scheme of which there is no ONNX file.

    Args:
        scheme: None stands for a float model.
        dtype: of what stays float in the file.

    Raises:
        ValueError: with the reason.
    """
    parsed = Scheme.parse(scheme) if scheme else Scheme()
    reason = BASES[parsed.base].not_exportable
    if parsed.per_token:
        reason = "its steps are computed at run time, one a token, which ONNX cannot express; use static ones, w8a8-ct"
    if parsed.zero_point and dtype == "float16":
        reason = "its file (+zero) is for onnxruntime, whose operators return float32; leave out +zero or float16"
    if reason and scheme:
        raise ValueError(f"{scheme} cannot be exported: {reason}")


def grammar() -> str:
    """Say in a line how a scheme is written."""
    said = dict.fromkeys(suffix.field for suffix in SUFFIXES.values())
    choices = "".join(f"[{'|'.join(f'+{name}' for name in suffixes_of(field))}]" for field in said)
    others = ", ".join(name for name in BASES if name != INTEGERS)
    weights, activations = (",".join(map(str, bits)) for bits in (WEIGHT_BITS, ACTIVATION_BITS))
    return (
        f"w{{{weights}}}a{{{activations}}}-{{t,c}}{{t,k}}{choices}: bits of weights and activations; weights per "
        f"tensor (t) or channel (c); activations per tensor, static (t) or per token, dynamic (k); or one of {others}"
    )


def _error(text: str, part: str) -> ValueError:
    return ValueError(f"quantization scheme {text!r}: {part!r} is not understood; a scheme is {grammar()}")
