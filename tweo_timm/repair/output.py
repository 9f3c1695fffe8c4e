"""The repaired checkpoint: written, loaded again with plain timm, compared, and only then given its name.

Beside the weights stand config.json, with which `timm.create_model("local-dir:FOLDER", pretrained=True)` builds the
model, and a card that says what was done in ten lines. The weights carry the same in their metadata.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models import filter_pretrained_cfg
from torch import Tensor

from tweo_timm.fingerprint import checksum
from tweo_timm.outputs import Outputs
from tweo_timm.records import plain
from tweo_timm.repair.source import Source, timm_version
from tweo_timm.rewrite.change import RotationReport, output_error, run, tolerance
from tweo_timm.rewrite.features import RotatedFeatures
from tweo_timm.version import __version__

_logger = logging.getLogger(__name__)


def write_repaired(
    output: Path, source: Source, report: RotationReport, batches: Sequence[Tensor], reference: Tensor
) -> float:
    """Write the source's rotated model, with what describes it, if plain timm loads it and it computes the same.

    Args:
        output: the file.
        source: its model has been rotated.
        report: what `rotate` returned.
        batches: images to compare on.
        reference: the original's outputs for them, (images, ...) float64.

    Returns:
        The largest relative change of an image's output, between the original and the file.

    Raises:
        ValueError: if the file does not compute the same; nothing is left behind.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in source.model.state_dict().items()}
    record = {**_record(source, report), "config": _config(source, source.model)}
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.safetensors"
        text = json.dumps(record)
        save_file(tensors, part, {"tweo_timm": text, "sha256": checksum(tensors, text)})
        error = _compare(part, source, report, batches, reference)
        content = part.read_bytes()
    outputs = Outputs(output.parent)
    if report.rotated_features:
        RotatedFeatures(report.rotations, report.norms).save(rotation_path(output))
    outputs.write(output.name, content)
    _write_config(outputs, record["config"])
    outputs.write(output.with_suffix(".md").name, _card(output, source, report, error))
    return error


def rotation_path(output: Path) -> Path:
    """Where the matrices of rotated features go: OUT.rotation.safetensors."""
    return output.with_name(f"{output.stem}.rotation.safetensors")


def _compare(part: Path, source: Source, report: RotationReport, batches: Sequence[Tensor], reference: Tensor) -> float:
    """Load the file as any user of timm would, and compare its outputs with the original's."""
    loaded = source.build(part).to(next(source.model.parameters()))
    outputs = [output.double() for output in run(loaded, batches)]
    features = RotatedFeatures(report.rotations, report.norms)
    if report.rotated_features:
        outputs = [features.unrotate(output, normed=bool(report.norms)) for output in outputs]
    flat = [value for output in outputs for value in output.flatten(1)]
    error = max(output_error(one[None], other[None]) for one, other in zip(reference, flat, strict=True))
    limit = tolerance(source.model)
    if not error <= limit:
        raise ValueError(
            f"the output would differ by {error:.2g} (relatively; rounding explains {limit:.0e}) when plain timm loads "
            "it: nothing was written"
        )
    return error


def _record(source: Source, report: RotationReport) -> dict[str, Any]:
    return {
        "tweo_timm": __version__,
        "timm": timm_version(),
        "source": {"file": source.path.name, "sha256": source.digest, "weights": source.taken or "as they are"},
        "method": report.method,
        "seed": report.seed,
        "rotations": report.digests,
        "unrotated": report.left,
        "output_error": report.output_error,
        "args": plain(
            {k: v for k, v in source.settings.items() if isinstance(v, str | int | float | bool | list | dict)}
        ),
        "class_names": plain(source.class_names) if source.class_names is not None else None,
    }


def _config(source: Source, model: Any) -> dict[str, Any]:
    """config.json as timm reads it from a folder."""
    pretrained = filter_pretrained_cfg(dict(model.pretrained_cfg), remove_source=True, remove_null=True)
    settings = {name: source.settings.get(name) for name in ("mean", "std", "crop_pct", "interpolation")}
    pretrained |= {name: value for name, value in settings.items() if value}
    pretrained |= {"num_classes": model.num_classes, "custom_load": False}
    own = ("num_classes", "global_pool", "pretrained_cfg", "pretrained_cfg_overlay")  # config.json has them elsewhere
    kept = {name: value for name, value in source.arguments.items() if name not in own}
    names = {"label_names": plain(source.class_names)} if source.class_names is not None else {}
    return {
        "architecture": source.arch,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": plain(pretrained),
        "model_args": plain(kept),
        **({"global_pool": source.arguments["global_pool"]} if source.arguments.get("global_pool") else {}),
        **names,
    }


def _write_config(outputs: Outputs, config: dict[str, Any]) -> None:
    """Write config.json, unless there is one that describes another model; that is said."""
    path = outputs.folder / "config.json"
    if path.exists():
        try:
            described = json.loads(path.read_text()).get("architecture")
        except (ValueError, AttributeError):
            described = "something else"
        if described != config["architecture"]:
            _logger.warning("%s describes %s and stays: a folder of its own is needed for local-dir:", path, described)
            return
    outputs.write(path.name, json.dumps(config, indent=1))


def _card(output: Path, source: Source, report: RotationReport, error: float) -> str:
    shown = {name: value for name, value in source.arguments.items() if not name.startswith("pretrained_cfg")}
    build = "".join(f", {name}={value!r}" for name, value in shown.items())
    lines = [
        f"# {output.stem}",
        "",
        f"{source.arch}, made from {source.path.name} (SHA-256 {source.digest[:16]}) by tweo_timm {__version__}:",
        f"residual stream rotated exactly, method {report.method}, seed {report.seed}; no training.",
        f"Outputs differ from the original's by {error:.1e} (relatively, the largest of {report.images} images).",
        peaks_line(report),
        f"Not rotated: {', '.join(report.left) or 'nothing'}.",
        f"Load: `timm.create_model({source.arch!r}{build}, checkpoint_path={output.name!r})`.",
        _features_line(output, report),
    ]
    return "\n".join(lines) + "\n"


def peaks_line(report: RotationReport) -> str:
    """Say in a sentence how large activations were before and after: those of the stream, and those of its norms."""
    norms = [site for site in report.sites if "norm" in site.name.rsplit(".", 1)[-1]]
    stream = [site for site in report.sites if site not in norms]
    parts = []
    for what, sites in (("the residual stream", stream), ("the norms that read it", norms)):
        if sites:
            worst = max(sites, key=lambda site: site.before.peak_abs)
            after = max(site.after.peak_abs for site in sites)
            parts.append(f"of {what} {worst.before.peak_abs:.3g} ({worst.name}) before and {after:.3g} after")
    return f"Largest activation {', '.join(parts)}."


def _features_line(output: Path, report: RotationReport) -> str:
    if report.rotated_features:
        return f"Its features are in another basis: {rotation_path(output).name} takes them back (RotatedFeatures)."
    return "The stream inside (forward_intermediates, features_only) is in another basis; the outputs are not."
