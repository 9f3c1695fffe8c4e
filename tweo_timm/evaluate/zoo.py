"""A zoo of surveys that grows: rows from many machines in one table, each under the fingerprints of what it is about.

A row is one survey. Two are of the same thing if weights and images have the same fingerprints: the newer one stays.
Rows of different images stand beside each other and are not compared. The table names its checkpoints that nobody has
surveyed yet, with the command that would: whoever has the images can add them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tweo_timm.evaluate.answers import SurveyAnswer
from tweo_timm.evaluate.markdown import markdown_table
from tweo_timm.evaluate.stored import read_reports
from tweo_timm.evaluate.zoo_cli import ZooOptions
from tweo_timm.media import markdown
from tweo_timm.outputs import Outputs
from tweo_timm.records import Fields, plain
from tweo_timm.run.command import Call, printing
from tweo_timm.schema import Declared, entry, read, written

SCHEMA = 1
COMMAND = "tweo-validate --model {} --pretrained --data-dir IMAGENET --survey --report out"
NOT_RUN = (
    "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "deit_small_patch16_224.fb_in1k",
    "deit3_base_patch16_224.fb_in22k_ft_in1k",
    "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
    "beitv2_base_patch16_224.in1k_ft_in22k_in1k",
    "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k",
)
"""timm's checkpoints that people use most, of which no survey is here."""


@dataclass(kw_only=True)
class ZooRow(Declared):
    """One survey."""

    name: str = entry("of the checkpoint")
    arch: str = entry("timm's architecture")
    data: str = entry("fingerprint of the images")
    survey: SurveyAnswer = entry("what was found")

    @property
    def key(self) -> tuple[str, str]:
        """What it is about."""
        return self.survey.weights, self.data


def merge(options: ZooOptions, call: Call) -> int:
    """Merge reports into a zoo.

    Args:
        options: the settings.
        call: how the command was called.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: a file is no report, or holds no survey.
        OSError: the zoo cannot be written.
    """
    outputs = Outputs(options.output)
    outputs.check("--output")
    rows = {row.key: row for row in [*_kept(Path(options.output) / "zoo.json"), *_new(options.merge)]}
    ordered = sorted(rows.values(), key=lambda row: (row.arch, row.name))
    zoo = {"schema": SCHEMA, "models": [written(row) for row in ordered]}
    outputs.write("zoo.json", json.dumps(plain(zoo), indent=1))
    outputs.write("README.md", page(ordered))
    with printing():
        print(f"{len(ordered)} surveys: {Path(options.output) / 'README.md'}")
    return 0


def _new(paths: Sequence[str]) -> list[ZooRow]:
    rows = []
    for path in paths:
        for record in read_reports([path], "--merge"):
            found = record.answers.get("survey")
            if not isinstance(found, SurveyAnswer) or not found.weights:
                raise ValueError(f"--merge {path}: {record.name} has no survey; validate it with --survey --report DIR")
            rows.append(ZooRow(name=record.name, arch=record.arch, data=record.data.fingerprint, survey=found))
    return rows


def _kept(path: Path) -> list[ZooRow]:
    if not path.exists():
        return []
    try:
        content = Fields(json.loads(path.read_text(encoding="utf-8")), f"zoo {path}")
    except ValueError as error:
        raise ValueError(f"zoo {path} is no JSON: {error}; move it away, or give another --output") from error
    return [read(ZooRow, fields) for fields in content.each("models")]


def page(rows: Sequence[ZooRow]) -> str:
    """Return the zoo as Markdown: surveys, then checkpoints that wait for one."""
    parts = [
        "# What checkpoints survive",
        "Made by `tweo-survey --merge out/report.json`; [how to read it](../survey.md). Rows of different images are "
        "not comparable.",
        markdown_table([_cells(row) for row in rows]) if rows else "",
        *(f"- **{markdown(row.name)}**: {markdown(row.survey.verdict)}" for row in rows),
        "## Not run",
        "With ImageNet, run the command and merge its report.",
        markdown_table(
            [{"checkpoint": name, "survey": "not run", "command": COMMAND.format(name)} for name in NOT_RUN]
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _cells(row: ZooRow) -> dict[str, str]:
    found = row.survey
    cells = {"checkpoint": row.name, "architecture": row.arch, "images": f"{found.images} ({row.data})"}
    cells["float Top-1 %"] = "-" if found.float_top1 is None else f"{found.float_top1:.2f}"
    for measured in (measured for measured in found.rows if not measured.rotated):
        lost = "" if measured.drop is None else f", {-measured.drop:+.2f}"
        cells[measured.format] = measured.verdict + lost
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    return cells | {"weights": found.weights, "judged by": found.judged_by, "on": f"{found.processor}; {versions}"}
