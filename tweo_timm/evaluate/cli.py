"""validate.py and tweo-validate: from checkpoints to a table and a report."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tweo_timm.evaluate.options import ValidateOptions, read_validate_options
from tweo_timm.run.log import held_messages, set_up_logging

_logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Validate as the command line says.

    Args:
        argv: the words after the program's name; None takes the process's own.

    Returns:
        The exit status: 0, 1 for an error, 130 after Ctrl-C; what was finished by then is reported all the same.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with held_messages():
            options, given = read_validate_options(words)
            if not options.print_config:
                set_up_logging()
    except ValueError as error:
        return _fail(error)
    if options.print_config:
        from tweo_timm.run.recipe import dump_options

        print(dump_options(options), end="")
        return 0
    return validate(options, "validate.py " + shlex.join(words), given)


def validate(options: ValidateOptions, command: str, given: Collection[str] = ()) -> int:
    """Validate every checkpoint and report; errors of the user's making become one line on stderr.

    Args:
        options: the settings.
        command: what was run, for the record.
        given: names of the settings that no checkpoint changes, though they are the defaults.

    Returns:
        The exit status, as `main`.
    """
    from tweo_timm.evaluate.compare import read_reports
    from tweo_timm.run.dataset import UnreadableImage
    from tweo_timm.run.world import join_world

    set_up_logging()
    records: list[dict[str, Any]] = []
    status = 0
    try:
        if options.compare_reports and options.checkpoint:
            raise ValueError("--compare-reports validates nothing: leave out --checkpoint, and compare its --report")
        if options.compare_reports:
            records = read_reports(options.compare_reports)
            _report(records, options, command)
            return 0
        world = join_world(options.device)
    except ValueError as error:
        return _fail(error)
    if not world.primary:
        logging.getLogger().setLevel(logging.WARNING)
    try:
        _check_outputs(options)
        status = _measure_all(options, world, records, given)
    except KeyboardInterrupt:
        _logger.warning("Interrupted: reporting the %d checkpoints that are finished", len(records))
        status = 130
    except UnreadableImage as error:
        status = _fail(str(error).strip().splitlines()[-1].split("UnreadableImage: ")[-1])
    except (ValueError, OSError) as error:
        status = _fail(error)
    finally:
        world.close()
    if records and world.primary:
        try:
            _report(records, options, command)
        except (ValueError, OSError) as error:
            return _fail(error)
    return status


def _check_outputs(options: ValidateOptions) -> None:
    """Refuse, before anything is measured, results that could not be written afterwards."""
    if options.results_file and not Path(options.results_file).absolute().parent.is_dir():
        folder = Path(options.results_file).parent
        raise ValueError(f"--results-file {options.results_file}: there is no folder {folder}; make it first")
    if options.report and Path(options.report).exists() and not Path(options.report).is_dir():
        raise ValueError(f"--report {options.report} is a file: name a folder, which need not exist")


def _measure_all(options: ValidateOptions, world: Any, records: list[dict[str, Any]], given: Collection[str]) -> int:
    """Append the record of each checkpoint as it is finished; one that fails does not stop the others.

    Returns:
        The exit status: 1 if a checkpoint or a scheme failed.
    """
    from timm.utils import random_seed

    from tweo_timm.evaluate.compare import headline
    from tweo_timm.evaluate.measure import measure
    from tweo_timm.evaluate.report import failures
    from tweo_timm.evaluate.subject import find_sources, load_subject

    status = 0
    for source in find_sources(options):
        random_seed(options.seed, 0)
        try:
            subject = load_subject(source, options, world.device, given)
            record = _with_retry(subject, world, measure) if options.retry else measure(subject, world)
        except (ValueError, OSError) as error:
            status = _fail(error)
            continue
        except RuntimeError as error:
            if "should be of equal size" not in str(error):  # torch's words for lists of labels in a batch
                raise
            return _fail("the images have lists of labels: give --task multilabel")
        records.append(record)
        for reason in failures(record):
            status = _fail(reason)
        peak = f"  peak {record['peak_abs']:.4g} in {record['peak_block']}" if record["peak_abs"] is not None else ""
        field, metric = headline(record)
        value = "-" if record[field] is None else f"{record[field]:.2f}"
        _logger.info("%s: %s %s%s", subject.name, metric, value, peak)
    return status


def _with_retry(subject: Any, world: Any, measure: Any) -> dict[str, Any]:
    """Measure with ever smaller batches until one fits into memory, in timm's steps."""
    from dataclasses import replace

    from timm.utils import check_batch_size_retry, decay_batch_step

    while True:
        try:
            return measure(subject, world)  # type: ignore[no-any-return]
        except RuntimeError as error:
            smaller = decay_batch_step(subject.options.batch_size)
            if not check_batch_size_retry(str(error)) or not smaller:
                raise
            _logger.warning("%s: out of memory, trying again with batches of %d", subject.name, smaller)
            subject.options = replace(subject.options, batch_size=smaller)


def _report(records: list[dict[str, Any]], options: ValidateOptions, command: str) -> None:
    from tweo_timm.evaluate.report import print_table, write_report
    from tweo_timm.evaluate.results import write_results

    print_table(records)
    if options.report:
        write_report(records, Path(options.report), command)
        _logger.info("Report: %s", Path(options.report) / "report.md")
    write_results(records, options)


def _fail(error: Exception | str) -> int:
    print(f"validate.py: error: {error}", file=sys.stderr)
    return 1
