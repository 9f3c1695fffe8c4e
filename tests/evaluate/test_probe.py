"""A probe is one class and one line of a table: measured, kept in the record and told in the report, by its name."""

import contextlib
import json
from dataclasses import dataclass

from tests.evaluate.conftest import run
from tweo_timm.evaluate.probe import PROBES
from tweo_timm.schema import Declared, entry
from tweo_timm.tables import Entry, register


@dataclass(kw_only=True)
class Mean(Declared):
    images: int = entry("scored images")
    mean: float = entry("over the first batch")


class MeanInput:
    """A toy: the mean of what enters the model, over the scored images and over the sample."""

    ANSWER = Mean

    def wanted(self, options):
        return options.seed != 13

    @contextlib.contextmanager
    def watching(self, case):
        self.seen = []
        handle = case.subject.model.register_forward_pre_hook(lambda model, args: self.seen.append(args[0].clone()))
        yield
        handle.remove()

    def measure(self, case):
        if case.options.seed == 14:
            raise ValueError("no mean\nof the 14th")
        count = sum(len(images) for images in self.seen)
        return {"images": count, "sample": len(case.samples.diagnosis), "mean": float(self.seen[0].mean())}

    def describe(self, found):
        return [f"### The mean over {found.images} images", f"It is {found.mean:.3f}."]


def reported(capsys, folder, *words):
    with register(PROBES, "mean_input", Entry(f"{__name__}:MeanInput")):
        status, _, err = run(capsys, *words, "--report", folder)
    assert status == 0, err
    return json.loads((folder / "report.json").read_text())["checkpoints"][0], (folder / "report.md").read_text()


def test_what_a_registered_probe_finds_is_in_the_record_and_in_the_report(capsys, checkpoints, common, tmp_path):
    record, report = reported(capsys, tmp_path, "--checkpoint", checkpoints[0], *common)
    found = record["mean_input"]
    assert (found["images"], found["sample"]) == (21, 21)
    assert f"### The mean over 21 images\n\nIt is {found['mean']:.3f}." in report


def test_a_probe_is_not_asked_unless_the_options_want_it(capsys, checkpoints, common, tmp_path):
    record, report = reported(capsys, tmp_path, "--checkpoint", checkpoints[0], *common, "--seed", 13)
    assert "mean_input" not in record
    assert "The mean" not in report


def test_a_probe_that_a_model_does_not_allow_says_why_and_loses_nothing(capsys, caplog, checkpoints, common, tmp_path):
    record, report = reported(capsys, tmp_path, "--checkpoint", checkpoints[0], *common, "--seed", 14)
    assert record["mean_input"] == {"refused": "no mean\nof the 14th"}
    assert record["top1"] >= 0
    assert "No mean input: no mean of the 14th" in report
    assert "no mean_input: no mean of the 14th" in caplog.text
