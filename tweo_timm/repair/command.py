"""A repair from its first step to its last: load, rotate, compare, write."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from tweo_timm.outputs import Outputs
from tweo_timm.repair.images import read_images
from tweo_timm.repair.options import RepairOptions
from tweo_timm.repair.output import peaks_line, rotation_path, write_repaired
from tweo_timm.repair.source import read_source
from tweo_timm.rewrite.change import generated_images, run
from tweo_timm.rewrite.head import add_feature_head
from tweo_timm.rewrite.rotate import rotate
from tweo_timm.run.command import Call

_logger = logging.getLogger(__name__)


def repair(options: RepairOptions, call: Call) -> int:
    """Load, rotate, compare, write.

    Returns:
        0.

    Raises:
        ValueError: with the reason why there is no output.
        OSError: if a file cannot be read or written.
    """
    output = Path(options.output)
    if output.exists() and output.samefile(options.checkpoint):
        raise ValueError(f"--output {output} is the checkpoint itself: name another file")
    Outputs(output.parent).check("--output", output.name)
    if not output.parent.exists():
        _logger.info("The folder of --output %s is not there, and will be made", output)
    source = read_source(options)
    _say_what_is_taken(source.taken, source.dropped)
    source.model.to(_checked_device(options.device))
    batches = read_images(options, source) or [generated_images(source.model)]
    reference = torch.cat([outputs.flatten(1).double() for outputs in run(source.model, batches)])
    if options.as_head:
        source.arguments["num_classes"] = add_feature_head(source.model)
    report = rotate(
        source.model,
        options.method,
        batches,
        options.seed,
        allow_rotated_features=options.allow_rotated_features,
        progress=_logger.info,
    )
    for stage, reason in report.left.items():
        _logger.info("%s is not rotated: %s", stage, reason)
    error = write_repaired(output, source, report, batches, reference)
    _logger.info(peaks_line(report))
    _logger.info("outputs of %d images differ by %.1e at most (relatively)", report.images, error)
    if report.rotated_features:
        _logger.info("features are in another basis: %s takes them back", rotation_path(output))
    _logger.info("written: %s", output)
    return 0


def _checked_device(name: str) -> str:
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not to be had here: {str(error).splitlines()[0]}; use cpu") from error
    return name


def _say_what_is_taken(taken: str, dropped: Sequence[str]) -> None:
    if taken:
        _logger.info("repairing the weights %s of the file, those that timm's loader takes", taken)
    if dropped:
        _logger.info("the output holds weights alone; not taken over: %s", " and ".join(dropped))
