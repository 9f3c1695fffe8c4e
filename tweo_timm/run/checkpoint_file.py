"""A checkpoint as a stranger's file: read without running code from it, checked whole, and typed field by field.

timm's training checkpoints, plain files of weights and safetensors are read. Nothing is fetched from a network: an
architecture that a file names counts only if timm knows that plain name. Paths in a file are data, never followed.

Refused: files whose checksums do not hold (torch writes a zip file, which has one for every tensor; torch.load looks at
none; tweo-repair writes its own into safetensors), values that only code of the file could make, and weights that are
no numbers: of another type than the model's (torch would convert booleans, integers and complex numbers silently), NaN
or infinite.

Source: timm.utils.CheckpointSaver (the entries), torch.serialization (the file).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models import clean_state_dict, is_model, load_checkpoint
from torch import Tensor, nn

from tweo_timm.fingerprint import checksum
from tweo_timm.records import Fields, shown
from tweo_timm.settings import ANY, AT_LEAST_0
from tweo_timm.suggestion import suggest_path

_logger = logging.getLogger(__name__)

Want = Literal["metadata", "weights", "training"]
WeightsFilter = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]
"""Makes of the weights in a file those of a model."""
_PLAIN = ("state_dict", "model")  # what timm, and the code that came before it, call the weights
_AVERAGED = ("state_dict_ema", "model_ema")
_FOREIGN = (".npz", ".npy")  # only the architecture's own loader reads them
_OF_A_RUN = re.compile(r"(checkpoint-\d+|recovery-\d+-\d+|milestone-\d+|last|model_best)\.pth\.tar")
_DEEPEST = 8  # of settings in a file


def read(path: Path, want: Want = "training") -> CheckpointFile:
    """Read a checkpoint.

    Args:
        path: the file.
        want: `metadata` maps the tensors and looks at none, `weights` checks the whole file, `training` asks for a
            training's state too.

    Raises:
        ValueError: if the file is missing, damaged, or holds what is not asked for; the message says which.
    """
    if not path.is_file():
        raise ValueError(
            f"there is no checkpoint {path}: pass a file that timm or tweo-train saved{suggest_path(path)}"
        )
    if path.suffix == ".safetensors":
        return CheckpointFile(path, _record_of(path) if want == "metadata" else _read_safetensors(path), want)
    if path.suffix in _FOREIGN:
        return CheckpointFile(path, {}, want)
    if want != "metadata":
        _check_sums(path)
    content = _load(path, mapped=want != "training" and zipfile.is_zipfile(path) and _is_utf8(path))
    if want == "training" and not (isinstance(content, Mapping) and any(key in content for key in _PLAIN)):
        raise ValueError(f"checkpoint {path} holds no training state: weights alone go to --initial-checkpoint")
    if isinstance(content, Mapping):
        return CheckpointFile(path, content, want)
    raise ValueError(f"checkpoint {path} holds an object {shown(content)}; it must be a dictionary of tensors")


def _is_utf8(path: Path) -> bool:
    """Whether torch can map a file of this name: it takes names as UTF-8, which the locale C has not for an ö."""
    try:
        return bool(str(path).encode("utf-8"))
    except UnicodeEncodeError:
        return False


def _check_sums(path: Path) -> None:
    """Compare every part of the file with its checksum; files of torch before 1.6 have none."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as file:
            packed = [part.filename for part in file.infolist() if part.compress_type != zipfile.ZIP_STORED]
            damaged = None if packed else file.testzip()
    except Exception as error:  # whatever damaged headers lead to
        raise ValueError(_damaged(path, str(error))) from error
    if packed:
        raise ValueError(f"checkpoint {path} is compressed, which torch never does: save it again with torch.save")
    if damaged is not None:
        raise ValueError(_damaged(path, f"the checksum of {damaged} does not hold"))


def _load(path: Path, mapped: bool) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises whatever the content leads to
        raise ValueError(_why_unreadable(path, error)) from error


def _why_unreadable(path: Path, error: Exception) -> str:
    """Say what of a file torch does not read without running code, or that it is damaged."""
    needed: list[str] = []
    with contextlib.suppress(Exception):  # damaged pickles, and files of another format
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    needed = [name for name in needed if name != "argparse.Namespace"]
    if any(name.startswith(("torch.nn.modules.", "timm.models.", "timm.layers.")) for name in needed):
        return (
            f"checkpoint {path} is a pickled model, whose code is not run: save its weights, by "
            "torch.save(model.state_dict(), FILE)"
        )
    if needed:
        return (
            f"checkpoint {path} holds {', '.join(needed)}, which is not loaded because it can run code: save it again "
            "with tensors, numbers and strings only"
        )
    reason = str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0][:200]
    if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
        _check_sums(path)
        return f"checkpoint {path} is not loaded because that could run code: {reason}"
    return _damaged(path, f"{type(error).__name__}: {reason}")


def _damaged(path: Path, reason: str) -> str:
    other = "; an ONNX file is scored by validate.py --onnx" if path.suffix == ".onnx" else ""
    return f"checkpoint {path} is truncated, damaged or no checkpoint ({reason}){_before(path)}{other}"


def _before(path: Path) -> str:
    """Name the checkpoint of the same run that was written before this one, if there is one."""
    if not _OF_A_RUN.fullmatch(path.name):
        return ""
    with contextlib.suppress(OSError):
        written = path.stat().st_mtime_ns
        others = [other for other in path.parent.glob("*.pth.tar") if other != path and _OF_A_RUN.fullmatch(other.name)]
        files = {other: other.stat().st_mtime_ns for other in others}
        older = [other for other in files if files[other] <= written]
        if older:
            return f"; the one before it is {max(older, key=lambda other: (files[other], other.name))}"
    return ""


def _record_of(path: Path) -> dict[str, Any]:
    """What tweo-repair wrote into a file of weights about its model, as a training's checkpoint has it."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("tweo_timm", "{}"))
    except Exception as error:  # its own exceptions, those of the system, and of a damaged record
        raise ValueError(_damaged(path, str(error)[:200])) from error
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        return {}
    config, args = record["config"], record.get("args")
    built = {"num_classes": config.get("num_classes"), "model_kwargs": config.get("model_args")}
    known = {"args": {**(args if isinstance(args, dict) else {}), **built}, "arch": config.get("architecture")}
    return known | {"class_names": record.get("class_names")}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:  # its own exceptions, and those of the system
        raise ValueError(_damaged(path, str(error)[:200])) from error
    written = metadata.get("sha256")  # a stranger's file has none
    if "tweo_timm" in metadata and written and written != checksum(tensors, metadata["tweo_timm"]):
        raise ValueError(_damaged(path, "its checksum does not hold"))
    return tensors


class CheckpointFile:
    """The content of a checkpoint; what it holds is checked when it is asked for.

    Args:
        path: where it was read from.
        content: what stands in it.
        want: what it was read for.

    Attributes:
        fields: the entries, by type.
    """

    def __init__(self, path: Path, content: Mapping[str, Any], want: Want = "training") -> None:
        self.path = path
        fits = " does not fit this run" if want == "training" else ""
        self.fields = Fields(content, f"checkpoint {path}{fits}")

    @property
    def arch(self) -> str | None:
        """Timm's name of the architecture; None if the file names none that timm knows."""
        name = self.fields.mapping.get("arch")
        if name is None:
            return None
        if isinstance(name, str) and ":" not in name and "/" not in name and is_model(name):
            return name
        _logger.warning("%s names no architecture of timm (arch is %s): not believed", self.path, shown(name))
        return None

    @property
    def args(self) -> dict[str, Any]:
        """The settings of the training: plain values only, others are passed over with a warning."""
        args = self.fields.mapping.get("args")
        given = vars(args) if isinstance(args, argparse.Namespace) else args
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            _logger.warning("%s: args is %s, no settings: not believed", self.path, shown(given))
            return {}
        plain = {name: value for name, value in given.items() if isinstance(name, str) and _is_plain(value)}
        for name in given.keys() - plain.keys():
            _logger.warning("%s: args.%s is no plain value: passed over", self.path, name)
        return plain

    @property
    def next_epoch(self) -> int:
        """The epoch to go on with, by timm's rule: before version 2 `epoch` is that one, later it is the one done."""
        if not self.fields.has("epoch"):
            return 0
        version = self.fields.integer("version", ANY) if self.fields.has("version") else 1
        return self.fields.integer("epoch", AT_LEAST_0) + (1 if version > 1 else 0)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights, under the names of the model: prefixes of DDP and of torch.compile are taken off."""
        name = next((key for key in _PLAIN if key in self.fields.mapping), None)
        return self._weights(self.fields.mapping, "") if name is None else self._weights(self._entry(name), name)

    @property
    def ema(self) -> dict[str, Tensor] | None:
        """The averaged weights; None if there are none."""
        name = next((key for key in _AVERAGED if self.fields.has(key)), None)
        return None if name is None else self._weights(self._entry(name), name)

    def _entry(self, name: str) -> Mapping[str, Any]:
        return self.fields.fields(name).mapping

    def _weights(self, tensors: Mapping[str, Any], entry: str) -> dict[str, Tensor]:
        names = Fields(tensors, self.fields.where, entry)
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                names.refuse(str(name)[:100], tensor, "a dense tensor")
        cleaned: dict[str, Tensor] = clean_state_dict(dict(tensors))
        return cleaned

    def check(self, weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
        """Refuse weights that a model would take without a word and that are not its numbers.

        Args:
            weights: of this file.
            reference: the state of the model that they are for. What of it is infinite may be so.

        Raises:
            ValueError: naming the first tensor that is of another kind, or not finite.
        """
        for name, tensor in weights.items():
            like = reference.get(name)
            if like is None or not like.is_floating_point():
                continue
            if not tensor.is_floating_point():
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(f"{self.fields.where}: {name} is {dtype}; the model's are floating-point numbers")
            if tensor.shape == like.shape and not is_finite(tensor) and is_finite(like):
                raise ValueError(f"checkpoint {self.path}: {name} is not finite; take an earlier checkpoint")

    @contextlib.contextmanager
    def giving(self, name: str) -> Iterator[None]:
        """Say of an entry that whatever fails while it is taken over is because it does not fit this run."""
        try:
            yield
        except Exception as error:  # a stranger's values lead to anything
            text = str(error) or type(error).__name__
            if text.startswith(self.fields.where):
                raise
            raise ValueError(f"{self.fields.where}: {name}: {' '.join(text.split())[:400]}") from error


def check_finite(model: nn.Module, path: Path) -> None:
    """Refuse a model whose parameters are not finite, for files that timm loads by itself.

    Raises:
        ValueError: naming the first such parameter and the file.
    """
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach()):
            raise ValueError(f"checkpoint {path}: {name} is not finite; take an earlier checkpoint")


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite."""
    if tensor.element_size() == 1:  # float8
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


def _is_plain(value: Any, depth: int = 0) -> bool:
    if value is None or isinstance(value, (bool, int, float, str)):
        return True
    if depth == _DEEPEST or not isinstance(value, (list, tuple, Mapping)):
        return False
    items = [*value, *value.values()] if isinstance(value, Mapping) else value
    return all(_is_plain(item, depth + 1) for item in items)


def load_weights(
    model: nn.Module,
    path: Path,
    use_ema: bool = True,
    filter_fn: WeightsFilter | None = None,
) -> None:
    """Load the weights of a file into a model strictly, as timm's `load_checkpoint` does, after looking at them.

    Args:
        model: of the architecture.
        path: a checkpoint or a file of weights.
        use_ema: whether averaged weights are taken where there are any.
        filter_fn: makes of the file's weights those of the model.

    Raises:
        ValueError: if the file cannot be read, or its weights are no finite numbers.
        RuntimeError: if they do not fit the model.
    """
    if path.suffix in _FOREIGN:
        load_checkpoint(model, str(path))
        check_finite(model, path)
        return
    file = read(path, "weights")
    weights = (file.ema if use_ema else None) or file.weights
    weights = filter_fn(weights, model) if filter_fn is not None else weights
    file.check(weights, model.state_dict())
    model.load_state_dict(weights, strict=True)
