"""The diagnoses that validate.py offers, as probes: what each is asked, and how the report says what it found."""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

import torch

from tweo_timm.diagnose.colinearity import colinearity
from tweo_timm.diagnose.readiness import fp8_readiness
from tweo_timm.diagnose.sites import SiteRecorder, record_sites
from tweo_timm.diagnose.stethoscope import stethoscope
from tweo_timm.evaluate.answers import ColinearityAnswer, ReadinessAnswer, Site, StethoscopeAnswer
from tweo_timm.evaluate.case import Case
from tweo_timm.evaluate.markdown import fields_table, number
from tweo_timm.evaluate.options import ValidateOptions
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
        counts = ", ".join(f"{count} blocks {markdown(verdict)}" for verdict, count in found.counts.items())
        degenerate = "The blocks of the randomly initialised model are identities: that arm says nothing. "
        return [
            "### Stethoscope: do outliers come from the data?",
            f"{degenerate if found.degenerate else ''}{counts}. {markdown(found.rule)}",
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
            f"{number(top.v_dot_x)} = {number(top.value)}; all of them {number(found.sum_of_terms)}, "
            f"with biases {number(found.with_biases)}, "
            f"with the activation function {number(found.with_activation)}.",
            f"The linear form is {'valid' if found.linear_valid else 'NOT valid'} here. "
            f"{markdown(found.rule)} {markdown(found.note)}",
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
            markdown(found.verdict),
            *(f"- {markdown(action)}" for action in found.actions),
        ]


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
