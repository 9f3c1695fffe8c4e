"""tweo-repair, or python -m tweo_timm.rewrite: from a checkpoint to the same model without outliers in its stream."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tweo_timm.repair.options import RepairOptions, parse_repair_options
from tweo_timm.run.log import held_messages, set_up_logging

_logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Repair as the command line says.

    Args:
        argv: the words after the program's name; None takes the process's own.

    Returns:
        The exit status: 0 if the output was written; 1 for an error, 130 after Ctrl-C, and no output then.
    """
    try:
        with held_messages():
            options = parse_repair_options(argv)
            set_up_logging()
        repair(options)
    except KeyboardInterrupt:
        print("tweo-repair: interrupted, nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"tweo-repair: {error}", file=sys.stderr)
        return 1
    return 0


def repair(options: RepairOptions) -> None:
    """Load, rotate, compare, write.

    Raises:
        ValueError: with the reason why there is no output.
        OSError: if a file cannot be read or written.
    """
    import torch

    from tweo_timm.repair.images import read_images
    from tweo_timm.repair.output import rotation_path, write_repaired
    from tweo_timm.repair.source import read_source
    from tweo_timm.rewrite.change import generated_images, run
    from tweo_timm.rewrite.head import add_feature_head
    from tweo_timm.rewrite.rotate import rotate

    output = Path(options.output)
    if output.exists() and output.samefile(options.checkpoint):
        raise ValueError(f"--output {output} is the checkpoint itself: name another file")
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
    before = max(site.before.peak_abs for site in report.sites)
    after = max(site.after.peak_abs for site in report.sites)
    _logger.info("largest activation of stream and norms: %.3g before, %.3g after", before, after)
    _logger.info("outputs of %d images differ by %.1e at most (relatively)", report.images, error)
    if report.rotated_features:
        _logger.info("features are in another basis: %s takes them back", rotation_path(output))
    _logger.info("written: %s", output)


def _checked_device(name: str) -> str:
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not to be had here: {str(error).splitlines()[0]}; use cpu") from error
    return name


def _say_what_is_taken(taken: str, dropped: Sequence[str]) -> None:
    if taken:
        _logger.info("repairing %s of the file, as timm's loader takes it", taken)
    if dropped:
        _logger.info("the output is weights alone: dropped are %s", " and ".join(dropped))
