"""The diagnoses that validate.py offers, as probes: what each is asked, and how the report says what it found."""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

import torch

from tweo_timm.diagnose.colinearity import colinearity
from tweo_timm.diagnose.readiness import fp8_readiness
from tweo_timm.diagnose.sites import SiteRecorder, record_sites
from tweo_timm.diagnose.stethoscope import stethoscope
from tweo_timm.diagnose.zeroing import zeroed
from tweo_timm.evaluate.answers import ColinearityAnswer, ReadinessAnswer, Site, StethoscopeAnswer, Zeroed
from tweo_timm.evaluate.case import Case
from tweo_timm.evaluate.columns import formatted
from tweo_timm.evaluate.markdown import fields_table, markdown_table, number, sentence
from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.evaluate.record import METRICS
from tweo_timm.evaluate.scoring import Score, score
from tweo_timm.media import code, markdown


class Stethoscope:
    """Do outliers come from the data?"""

    ANSWER: ClassVar = StethoscopeAnswer

    def wanted(self, options: ValidateOptions) -> bool:
        """With --stethoscope."""
        return options.stethoscope

    def watching(self, case: Case) -> contextlib.AbstractContextManager[Any]:
        """It makes its own passes."""
        return contextlib.nullcontext()

    def measure(self, case: Case) -> dict[str, Any]:
        """Compare real images and trained weights with random ones; see `stethoscope`."""
        return stethoscope(
            case.subject.model,
            case.samples.diagnosis,
            mean=case.subject.data_config["mean"],
            std=case.subject.data_config["std"],
            seed=case.options.seed,
            blocks=case.options.tweo_blocks,
        )

    def describe(self, found: StethoscopeAnswer) -> list[str]:
        """Count verdicts, and list the blocks."""
        keys = ("name", "verdict", "random_pixel_ratio", "random_weight_ratio", "shuffled_ratio", "constant_ratio")
        counts = ", ".join(f"{count} {markdown(verdict)}" for verdict, count in found.counts.items())
        counted = f"Of {len(found.verdicts)} blocks are {counts}."
        degenerate = "The blocks of the randomly initialised model are identities: that arm says nothing. "
        return [
            "### Stethoscope: do outliers come from the data?",
            f"{degenerate if found.degenerate else ''}{counted} {sentence(found.rule)}",
            fields_table(found.verdicts, keys),
        ]


class Colinearity:
    """Where does the largest activation come from?"""

    ANSWER: ClassVar = ColinearityAnswer

    def wanted(self, options: ValidateOptions) -> bool:
        """With --colinearity."""
        return options.colinearity

    def watching(self, case: Case) -> contextlib.AbstractContextManager[Any]:
        """It makes its own passes."""
        return contextlib.nullcontext()

    def measure(self, case: Case) -> dict[str, Any]:
        """Decompose the MLP behind the peak; see `colinearity`."""
        return colinearity(
            case.subject.model,
            case.samples.diagnosis,
            block=case.options.colinearity_block,
            channel=case.options.colinearity_channel,
            blocks=case.options.tweo_blocks,
        )

    def describe(self, found: ColinearityAnswer) -> list[str]:
        """Tell the sum term by term."""
        top = found.terms[0]
        return [
            "### Colinearity: where does the largest activation come from?",
            f"{code(found.mlp)}, channel {found.channel}, token {found.token}: the MLP contributed "
            f"{number(found.mlp_measured)} to an output of {number(found.measured)}. Singular direction "
            f"{top.index} alone gives s (w.u) (v.x) = {number(top.singular_value)} x {number(top.w_dot_u)} x "
            f"{number(top.v_dot_x)} = {number(top.value)}. All directions together give {number(found.sum_of_terms)}, "
            f"with the biases {number(found.with_biases)}, and with the activation function too "
            f"{number(found.with_activation)}.",
            f"The linear form is {'valid' if found.linear_valid else 'NOT valid'} here. "
            f"{sentence(found.rule)} {sentence(found.note)}".strip(),
        ]


class Readiness:
    """What would each Linear layer meet in FP8?"""

    ANSWER: ClassVar = ReadinessAnswer

    def wanted(self, options: ValidateOptions) -> bool:
        """With --fp8-readiness."""
        return options.fp8_readiness

    def watching(self, case: Case) -> contextlib.AbstractContextManager[Any]:
        """It makes its own passes."""
        return contextlib.nullcontext()

    def measure(self, case: Case) -> dict[str, Any]:
        """Look at the inputs of the layers; see `fp8_readiness`."""
        return fp8_readiness(case.subject.model, torch.split(case.samples.diagnosis, 16))

    def describe(self, found: ReadinessAnswer) -> list[str]:
        """The verdict, and what to do."""
        return [
            "### FP8 readiness",
            sentence(found.verdict),
            *(f"- {sentence(action)}" for action in found.actions),
        ]


class ZeroOutliers:
    """What are the largest activations worth?"""

    ANSWER: ClassVar = list[Zeroed]

    def wanted(self, options: ValidateOptions) -> bool:
        """With --zero-outliers."""
        return bool(options.zero_outliers)

    def watching(self, case: Case) -> contextlib.AbstractContextManager[Any]:
        """It makes its own passes."""
        return contextlib.nullcontext()

    def measure(self, case: Case) -> list[dict[str, Any]]:
        """Score the split without the K largest elements, and without any K, for each K; and as it is."""
        rows = []
        for k in (0.0, *sorted(set(case.options.zero_outliers))):
            largest, control = self._pass(case, k, False), self._pass(case, k, True) if k else None
            rows.append({"k": k, **self._numbers(case, largest), **self._numbers(case, control or largest, "random_")})
        return rows

    def _pass(self, case: Case, k: float, at_random: bool) -> Score:
        options, model = case.options, case.subject.model
        label = f"{case.subject.name} without {'any' if at_random else 'the'} {k:g}"
        with zeroed(model, k, at_random=at_random, blocks=options.tweo_blocks, seed=options.seed):
            return score(model, case.images, options, case.world, label)

    def _numbers(self, case: Case, found: Score, prefix: str = "") -> dict[str, float | None]:
        metric = METRICS[case.options.task][0]
        return {f"{prefix}score": found.metrics[metric], f"{prefix}loss": found.metrics["loss"]}

    def describe(self, found: list[Zeroed]) -> list[str]:
        """One row per K."""
        whole = next((row.loss for row in found if row.k == 0), None)
        rows = [
            {
                "K": "none" if row.k == 0 else f"{row.k:,.0f}" if row.k >= 1 else f"{100 * row.k:g} %",
                "score %, largest zeroed": formatted(row.score, "{:.2f}"),
                "loss": _grown(row.loss, whole),
                "score %, any K zeroed": formatted(row.random_score, "{:.2f}"),
                "its loss": _grown(row.random_loss, whole),
            }
            for row in found
        ]
        return [
            "### What the largest activations are worth",
            "In every block's output the K largest elements of each image are zeroed, and any K as a control. A model "
            "that loses much more by the first than by the second leans on its outliers.",
            markdown_table(rows),
        ]


def _grown(loss: float | None, whole: float | None) -> str:
    """A loss, and by how much it grew."""
    growth = f" ({100 * (loss / whole - 1):+.0f} %)" if loss is not None and whole else ""
    return formatted(loss, "{:.4g}") + growth


class Sites:
    """Where, besides block outputs, are activations large?"""

    ANSWER: ClassVar = list[Site]
    _recorder: SiteRecorder

    def wanted(self, options: ValidateOptions) -> bool:
        """With --sites all."""
        return options.sites == "all"

    @contextlib.contextmanager
    def watching(self, case: Case) -> Any:
        """Count every image of the split at every site."""
        with record_sites(case.subject.model, case.options.tweo_blocks) as self._recorder:
            yield

    def measure(self, case: Case) -> list[dict[str, Any]]:
        """Return the rows of all sites, over all processes."""
        self._recorder.gather()
        rows: list[dict[str, Any]] = self._recorder.summary()["sites"]
        return rows

    def describe(self, found: list[Site]) -> list[str]:
        """The ten largest."""
        keys = ("name", "kind", "peak_abs", "mean_abs", "kurtosis", "max_to_median", "peak_token", "peak_channel")
        largest = sorted(found, key=lambda site: -(site.peak_abs or 0))[:10]
        return ["### The ten sites with the largest activations", fields_table(largest, keys)]
