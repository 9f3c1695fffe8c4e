"""validate.py --survey: what the checkpoint survives, as a probe, and as the report shows it."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from torch import Tensor, nn

from tweo_timm import machine
from tweo_timm.artefact import Artefact
from tweo_timm.evaluate.answers import SurveyAnswer
from tweo_timm.evaluate.case import Case
from tweo_timm.evaluate.markdown import markdown_table, number
from tweo_timm.evaluate.neighbours import NearestNeighbours
from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.evaluate.scoring import score
from tweo_timm.fingerprint import fingerprint
from tweo_timm.media import code, markdown
from tweo_timm.quant.export import export_onnx
from tweo_timm.run.dataset import place
from tweo_timm.run.passes import batches
from tweo_timm.schema import written
from tweo_timm.survey.bench import Bench, Outcome
from tweo_timm.survey.findings import SurveyRow
from tweo_timm.survey.survey import Survey, survey
from tweo_timm.version import __version__

_logger = logging.getLogger(__name__)

_SAMPLES = 16
"""Images in a batch of those that are looked at more closely."""


class Surveyed:
    """What will this checkpoint survive, where does it break, what is the smallest fix?"""

    ANSWER: ClassVar = SurveyAnswer

    def wanted(self, options: ValidateOptions) -> bool:
        """With --survey."""
        return options.survey

    def watching(self, case: Case) -> contextlib.AbstractContextManager[Any]:
        """It makes its own passes."""
        return contextlib.nullcontext()

    def measure(self, case: Case) -> dict[str, Any]:
        """Put the model in every format; see `survey`."""
        if case.world.distributed:
            raise ValueError("--survey runs in one process: validate without torchrun")
        bench = _bench(case)
        found = survey(bench)
        _logger.info("%s: %s", case.subject.name, found.verdict)
        judged_by = "nearest neighbour" if not case.images.classes else "logits"
        return {**written(found), **_origin(case), "judged_by": judged_by, **_exported(case, bench, found)}

    def describe(self, found: SurveyAnswer) -> list[str]:
        """The sentence, the table, where it breaks, and the fixes."""
        parts = ["### Survey: what it survives", f"**{markdown(found.verdict)}**", markdown_table(survey_rows(found))]
        if found.judged_by != "logits":
            parts.append("Top-1: the class of the nearest of the other images, by the float model's features.")
        parts += [f"Not rotated: {markdown(found.not_rotated)}"] if found.not_rotated else []
        parts += [f"- {markdown(name)} is not possible: {markdown(why)}" for name, why in found.not_possible.items()]
        parts += [_where(row) for row in found.rows if not row.survives and not row.rotated and row.sites]
        parts += [f"- file of the fixed {markdown(name)}: {code(path)}" for name, path in found.exported.items()]
        parts += [f"- no file of the fixed {markdown(n)}: {markdown(why)}" for n, why in found.not_exported.items()]
        return parts

    @staticmethod
    def table(found: SurveyAnswer) -> tuple[str, list[dict[str, str]]]:
        """The sentence and the table, for the terminal."""
        return found.verdict, survey_rows(found)


def survey_rows(found: SurveyAnswer) -> list[dict[str, str]]:
    """The table of a survey: a row per format, the model as it is beside the rotated one, and the smallest fix."""
    turned = {row.format: row for row in found.rows if row.rotated}
    fixes = {fix.format: fix for fix in found.fix}
    rows = []
    for row in (row for row in found.rows if not row.rotated):
        fix = fixes.get(row.format)
        rows.append(
            {
                "format": row.format,
                "Top-1 %": "-" if row.top1 is None else f"{row.top1:.2f}",
                "lost (95 %)": _lost(row),
                "headroom": number(row.headroom),
                "verdict": row.verdict,
                "rotated": turned[row.format].verdict if row.format in turned else "-",
                "breaks at": row.sites[0].name if row.sites and not row.survives else "-",
                "smallest fix": "-" if fix is None else fix.words + _then(fix.top1),
            }
        )
    return rows


def _lost(row: SurveyRow) -> str:
    if row.drop is None or row.interval is None:
        return "-"
    return f"{row.drop:.2f} ({row.interval[0]:.2f} to {row.interval[1]:.2f})"


def _then(top1: float | None) -> str:
    return "" if top1 is None else f": {top1:.2f} %"


def _where(row: SurveyRow) -> str:
    """The sites of a row that does not survive."""
    said = [
        f"{code(site.name)} ({number(site.peak_abs)}, factor {number(site.factor)})"
        if site.factor is not None
        else f"{code(site.name)} ({number(site.peak_abs)}, {100 * (site.share or 0):.0f} % of the damage)"
        for site in row.sites
        if site.factor is None or site.factor < 1
    ]
    return f"- {markdown(row.format)} breaks at {', '.join(said)}" if said else ""


def _origin(case: Case) -> dict[str, Any]:
    """What a row of a zoo is known by: the weights, the versions and the processor."""
    versions = {"tweo_timm": __version__, "timm": timm.__version__, "torch": torch.__version__}
    weights = fingerprint(case.subject.model.state_dict())
    return {"weights": weights, "versions": versions, "processor": machine.describe()["processor"]}


def _bench(case: Case) -> Bench:
    subject, options = case.subject, case.options
    model = copy.deepcopy(subject.model).eval()
    samples = list(torch.split(case.samples.diagnosis, _SAMPLES))

    def scored() -> Iterator[Tensor]:
        passed = batches(case.images.loader, lambda batch: place(batch, options, case.world.device))
        return (batch for batch, _, real in passed if real)

    neighbours = NearestNeighbours(case.images, options, case.world)

    def judge(model: nn.Module, label: str) -> Outcome:
        if not case.images.classes:
            return neighbours(model)
        return score(model, case.images, options, case.world, f"{subject.name} {label}")

    return Bench(
        model=model,
        judge=judge,
        calibration=case.samples.calibration,
        samples=samples,
        scored=scored,
        others=_at_other_sizes(model, samples, options.survey_sizes),
        max_drop=options.max_drop,
        blocks=options.tweo_blocks,
        features=not case.images.classes,
        seed=options.seed,
        say=lambda line: _logger.info("%s: %s", subject.name, line),
    )


def _at_other_sizes(model: nn.Module, samples: Sequence[Tensor], sizes: Sequence[int]) -> list[tuple[int, Tensor]]:
    """The first samples at other sizes, with the size."""
    return [
        (size, nn.functional.interpolate(samples[0].float(), (size, size), mode="bicubic", antialias=True))
        for size in sizes
    ]


def _exported(case: Case, bench: Bench, found: Survey) -> dict[str, Any]:
    """Write the fixed models of which there are files; each says how its images are prepared."""
    subject, options = case.subject, case.options
    calibration = {"split": options.calibration_split, "seed": options.seed}
    exported: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, variant in found.variants.items() if options.export else ():
        folder = Path(options.report) if options.report else (subject.path or Path()).parent
        path = folder / f"{subject.name.replace('/', '-')}.survey.{name}.onnx"
        said = Artefact(variant.scheme, subject.preprocessing, case.class_names, calibration, subject.arch)
        form: dict[str, Any] = {"input_dtype": options.export_input, "dtype": options.export_dtype}
        try:
            export_onnx(bench.build(variant), path, case.samples.diagnosis[:2], artefact=said, **form)
            exported[name] = str(path)
        except (RuntimeError, ValueError, OSError) as error:
            refused[name] = str(error)
    return {"exported": exported, "not_exported": refused}
