"""What the probes find, as report.json holds it: the fields that the report and the pictures read; others are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tweo_timm.evaluate.record import Statistics
from tweo_timm.records import Fields
from tweo_timm.schema import LONG, PERCENT, SIZE, Declared, entry
from tweo_timm.settings import AT_LEAST_0
from tweo_timm.survey.findings import SurveyFindings


@dataclass(kw_only=True)
class Site(Statistics):
    """With `--sites all`: the statistics of one place, like a block's."""

    kind: str = entry("LayerNorm output, Linear input or output, attention input, block output")


@dataclass(kw_only=True)
class BlockVerdict(Declared):
    """Whether one block's peak comes from the data; each ratio is a mean image peak over that on real images."""

    name: str = entry("the block")
    verdict: str = entry("`data-independent`, `data-dependent` or `inconclusive`")
    random_pixel_ratio: float | None = entry("trained weights on random pixels", default=None)
    random_weight_ratio: float | None = entry("random weights on real images", default=None)
    shuffled_ratio: float | None = entry("weights shuffled within each layer", default=None)
    constant_ratio: float | None = entry("images of one colour", default=None)


@dataclass(kw_only=True)
class ArmBlock(Declared):
    """One block in one arm of the stethoscope; means are over images."""

    name: str = entry("the block")
    avg_max: float | None = entry("mean of the largest value", default=None)
    avg_min: float | None = entry("mean of the smallest value", default=None)
    mean_abs: float | None = entry("mean \\|A\\|", default=None)
    mean_peak: float | None = entry("mean of the largest magnitude", default=None)
    peak_abs: float | None = entry("the largest magnitude of any image", default=None)


@dataclass(kw_only=True)
class StethoscopeAnswer(Declared):
    """Do outliers come from the data?"""

    arms: dict[str, list[ArmBlock]] = entry(
        "trained and random weights on real, random and constant images: a row per block", default={}
    )
    verdicts: list[BlockVerdict] = entry("a row per block", some=True)
    counts: dict[str, int] = entry("verdict -> number of blocks", SIZE)
    rule: str = entry("how verdicts are found", LONG)
    degenerate: bool = entry("blocks of the randomly initialised model are identities")


@dataclass(kw_only=True)
class Term(Declared):
    """One singular direction's share of an activation."""

    index: int = entry("of the direction", AT_LEAST_0)
    singular_value: float | None = entry("s")
    w_dot_u: float | None = entry("w.u")
    v_dot_x: float | None = entry("v.x")
    value: float | None = entry("their product")


@dataclass(kw_only=True)
class ColinearityAnswer(Declared):
    """The largest activation as a sum over singular directions of its MLP."""

    block: str = entry("whose output it is in")
    mlp: str = entry("the module")
    channel: int = entry("where it is", AT_LEAST_0)
    token: int = entry("where it is", AT_LEAST_0)
    measured: float | None = entry("the block's output there")
    mlp_measured: float | None = entry("what the MLP contributed to it")
    sum_of_terms: float | None = entry("w^T A x")
    with_biases: float | None = entry("the same with the biases")
    with_activation: float | None = entry("the same with the activation function")
    terms: list[Term] = entry("the largest ones", some=True)
    singular_values: list[float] = entry("of the whole MLP")
    w_dot_u: list[float] = entry("how the output channel aligns with each direction")
    v_dot_x: list[float] = entry("how the input does")
    linear_valid: bool = entry("whether the sum explains the activation")
    rule: str = entry("when it does", LONG)
    note: str = entry("what else to keep in mind", LONG)

    def check(self, source: Fields) -> None:
        """Refuse spectra of two lengths."""
        length = len(self.singular_values)
        for name in ("w_dot_u", "v_dot_x"):
            if len(getattr(self, name)) != length:
                source.refuse(name, getattr(self, name), f"as long as singular_values, {length}")


@dataclass(kw_only=True)
class Zeroed(Declared):
    """The model without K elements of each block's output: the K largest, and any K as a control."""

    k: float = entry("elements per image; below 1 a share of them; 0 is the model as it is", AT_LEAST_0)
    score: float | None = entry("Top-1 (or mAP) without the largest, percent", PERCENT)
    loss: float | None = entry("loss without the largest", SIZE)
    random_score: float | None = entry("Top-1 (or mAP) without as many at random, percent", PERCENT)
    random_loss: float | None = entry("loss without as many at random", SIZE)


@dataclass(kw_only=True)
class ReadinessAnswer(Declared):
    """What each Linear layer would meet in FP8; `layers` has shapes, amax, share above 448, cost of a jump."""

    verdict: str = entry("in one sentence", LONG)
    actions: list[str] = entry("what to do", LONG)


@dataclass(kw_only=True)
class SideAnswer(Declared):
    """What a side network costs, beside its frozen backbone."""

    side: str = entry("which kind")
    settings: dict[str, int] = entry("size, by name", SIZE)
    backbone: dict[str, Any] = entry("what it was trained beside: arch, fingerprint of the weights, precision")
    trained_parameters: int = entry("of side network and classifier", AT_LEAST_0)
    backbone_values: int = entry("parameters and buffers of the backbone", AT_LEAST_0)
    seconds: float = entry("of the pass over the split, data included", SIZE)
    peak_memory_mib: float = entry("the largest of the process, of the GPU where there is one", SIZE)
    message_bytes: dict[str, int] = entry("of an image's message to MIET's edge, by bits; none for LAST", SIZE)


@dataclass(kw_only=True)
class SurveyAnswer(SurveyFindings):
    """What the model survives, where it breaks, and the smallest fix ([survey.md](survey.md))."""

    weights: str = entry("fingerprint of the float model's weights", default="")
    versions: dict[str, str] = entry("of tweo_timm, timm and torch", default={})
    processor: str = entry("that it was measured on", default="")
    judged_by: str = entry("`logits`, or `nearest neighbour` for a model without a head", default="logits")
    exported: dict[str, str] = entry("format -> the file of the fixed model, with `--export onnx`", LONG, default={})
    not_exported: dict[str, str] = entry("format -> why there is none", LONG, default={})
