"""A validation from its settings to the table and the report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from timm.utils import check_batch_size_retry, decay_batch_step, random_seed

from tweo_timm.evaluate.columns import formatted
from tweo_timm.evaluate.groups import read_groups
from tweo_timm.evaluate.measure import measure
from tweo_timm.evaluate.onnx_subject import find_files, load_file
from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.evaluate.record import Record
from tweo_timm.evaluate.report import failures, faults, make_report, print_table, print_verdict, write_report
from tweo_timm.evaluate.results import Results
from tweo_timm.evaluate.stored import read_reports
from tweo_timm.evaluate.subject import Source, Subject, find_sources, load_subject
from tweo_timm.outputs import Outputs
from tweo_timm.run.command import Call, printing
from tweo_timm.run.failure import Failure
from tweo_timm.run.precision import resolve_precision
from tweo_timm.run.world import World, joined

_logger = logging.getLogger(__name__)


def validate(options: ValidateOptions, call: Call) -> int:
    """Validate every checkpoint and report; what is finished is reported, whatever ends the rest.

    Args:
        options: the settings.
        call: how the command was called, for messages and the record.

    Returns:
        The exit status: 0, 1 if anything failed, 130 after Ctrl-C.

    Raises:
        ValueError: a setting or a file is wrong, and nothing was measured.
        OSError: the report cannot be written.
    """
    for flag, given in (("--checkpoint", options.checkpoint), ("--onnx", options.onnx)):
        if options.compare_reports and given:
            raise ValueError(f"--compare-reports validates nothing: leave out {flag}, and compare its --report")
    if options.compare_reports:
        _check_outputs(options)
        stored = read_reports(options.compare_reports)
        groups = read_groups(options.group, {record.name: record.checkpoint for record in stored})
        _report(stored, groups, options, call)
        return 0
    records: list[Record] = []
    groups = {}
    with joined(options.device) as world:
        status = _measured(options, world, records, groups, call)
    if records and world.primary:
        _report(records, groups, options, call)
    return status


def _measured(
    options: ValidateOptions, world: World, records: list[Record], groups: dict[str, list[str]], call: Call
) -> int:
    """Name the groups and append the record of each checkpoint, until all are done or an error ends it.

    Returns:
        The exit status.
    """
    try:
        world.refuse(_check_outputs, options)
        sources = find_files(options) if options.onnx else find_sources(options)
        groups |= read_groups(options.group, {source.name: str(source.path) for source in sources})
        return _measure_all(sources, resolve_precision(options, world), world, records, call)
    except KeyboardInterrupt:
        _logger.warning("Interrupted: reporting the %d checkpoints that are finished", len(records))
        return 130
    except (ValueError, OSError, Failure) as error:
        return call.fail(error)


def _check_outputs(options: ValidateOptions) -> None:
    """Refuse, before anything is measured, results that could not be written afterwards."""
    if options.results_file:
        path = Path(options.results_file)
        if not path.absolute().parent.is_dir():
            raise ValueError(f"--results-file {path}: there is no folder {path.parent}; make it first")
        Outputs(path.parent).check("--results-file", path.name)
    if options.report:
        Outputs(options.report).check("--report")


def _measure_all(
    sources: Sequence[Source], options: ValidateOptions, world: World, records: list[Record], call: Call
) -> int:
    """Append the record of each checkpoint as it is finished; one that fails does not stop the others.

    Returns:
        The exit status: 1 if a checkpoint or a scheme failed, or an exported file is wrong.
    """
    status, load = 0, load_file if options.onnx else load_subject
    for source in sources:
        random_seed(options.seed, 0)
        try:
            subject = load(source, options, world.device)
            record = _with_retry(subject, world) if options.retry else measure(subject, world)
        except (ValueError, OSError) as error:
            status = call.fail(error)
            continue
        except RuntimeError as error:
            if "should be of equal size" not in str(error):  # torch's words for lists of labels in a batch
                raise
            return call.fail("the images have lists of labels: give --task multilabel")
        records.append(record)
        for reason in [*failures(record), *faults(record)]:
            status = call.fail(reason)
        peak = f"  peak {record.peak_abs:.4g} in {record.peak_block}" if record.peak_abs is not None else ""
        value = formatted(record.headline_value, "{:.2f}")
        _logger.info("%s: %s %s%s", subject.name, record.title, value, peak)
    return status


def _with_retry(subject: Subject, world: World) -> Record:
    """Measure with ever smaller batches until one fits into memory, in timm's steps."""
    while True:
        try:
            return measure(subject, world)
        except RuntimeError as error:
            smaller = decay_batch_step(subject.options.batch_size)
            if not check_batch_size_retry(str(error)) or not smaller:
                raise
            _logger.warning("%s: out of memory, trying again with batches of %d", subject.name, smaller)
            subject.options = replace(subject.options, batch_size=smaller)


def _report(records: list[Record], groups: dict[str, list[str]], options: ValidateOptions, call: Call) -> None:
    """Write the files, then print: neither a full disk nor a closed pipe takes what the other would have kept."""
    results, report = Results(records, options), None
    try:
        if options.results_file:
            results.write(Path(options.results_file), options.results_format)
        if options.report or groups or all(record.data.same_as(records[0].data) for record in records):
            report = make_report(records, str(call), groups)
        if options.report and report is not None:
            write_report(report, Path(options.report))
            _logger.info("Report: %s", Path(options.report) / "report.md")
    finally:
        with printing():
            if report is not None:
                print_verdict(report)
            print_table(records)
            print(f"--result\n{results}")
