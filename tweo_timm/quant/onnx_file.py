"""An ONNX file as a model that can be scored: ours by what it says of itself, a stranger's by what its input shows.

A file takes images as float32, float16 or uint8, channels first or last; which, its input says. Everything else that
decides a number (normalization, crop, classes) is in the metadata of our files, and unknown of others. Refused: a file
with several inputs, or without one output of the form (batch, classes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tweo_timm.artefact import Artefact, Preprocessing
from tweo_timm.quant.export import require_export_extra
from tweo_timm.quant.pixels import to_pixels

_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}
_CHANNELS = (1, 3, 4)
"""What tells the axis of channels from height and width."""


@dataclass(frozen=True)
class FileInput:
    """What a file takes.

    Attributes:
        name: of the input.
        dtype: "float32", "float16" or "uint8".
        channels_last: (B, H, W, C) rather than (B, C, H, W).
        size: channels, height and width; None for one that may be any.
        batch: how many images it takes at a time; None for any number.
    """

    name: str
    dtype: str
    channels_last: bool
    size: tuple[int | None, int | None, int | None]
    batch: int | None

    @classmethod
    def of(cls, session: Any, where: str) -> FileInput:
        """Read it from an open session.

        Raises:
            ValueError: if the file takes no images.
        """
        inputs = session.get_inputs()
        if len(inputs) != 1:
            raise ValueError(f"{where} has {len(inputs)} inputs ({', '.join(i.name for i in inputs)}): one is accepted")
        (found,) = inputs
        shape = [side if isinstance(side, int) else None for side in found.shape]
        if found.type not in _DTYPES or len(shape) != 4:
            accepted = "images of four axes in float32, float16 or uint8 are accepted"
            raise ValueError(f"{where} takes {found.type} {found.shape}: {accepted}")
        first, last = shape[1] in _CHANNELS, shape[3] in _CHANNELS
        if first == last:
            raise ValueError(
                f"{where} takes {found.shape}, which does not say where the channels are: export it with 1, 3 or 4 "
                "channels, a fixed number, as the second or the last axis"
            )
        size = (shape[3], shape[1], shape[2]) if last else (shape[1], shape[2], shape[3])
        return cls(found.name, _DTYPES[found.type], last, size, shape[0])

    def feed(self, images: Tensor, preprocessing: Preprocessing | None) -> Any:
        """Bring normalized images (B, C, H, W) into the form that the file takes, as a NumPy array.

        Raises:
            ValueError: if the file takes pixels and these are none.
        """
        if self.dtype == "uint8":
            if preprocessing is None:
                raise ValueError("the file takes pixels and does not say how images are normalized: say it")
            images = to_pixels(images, preprocessing)
        array = images.detach().cpu().numpy() if images.dtype != torch.bfloat16 else images.float().cpu().numpy()
        array = array.astype(self.dtype, copy=False)
        return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if self.channels_last else np.ascontiguousarray(array)


class OnnxModel(nn.Module):
    """An ONNX file as a PyTorch module for evaluation, so that anything which scores a model scores the file.

    Args:
        path: an ONNX file with one input for images and one output (batch, classes).
        threads: of one operator; None takes torch's number.
        preprocessing: how the images that it will get are normalized, which a file that takes pixels has to undo; None:
            as the file says.

    Attributes:
        input: what the file takes.
        artefact: what it says of itself.
        num_classes: of its logits; None where the file leaves that open.

    Raises:
        RuntimeError: without the extra `export`.
        ValueError: if onnxruntime cannot open the file, or it is no classifier of images.
    """

    def __init__(
        self, path: str | Path, threads: int | None = None, preprocessing: Preprocessing | None = None
    ) -> None:
        super().__init__()
        require_export_extra()
        where = str(path)
        self._session = _opened(path, threads)
        self.input = FileInput.of(self._session, where)
        self.artefact = Artefact.from_metadata(self._session.get_modelmeta().custom_metadata_map, where)
        self._output, self.num_classes = _logits_of(self._session.get_outputs(), where)
        self.preprocessing = preprocessing or self.artefact.preprocessing

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of normalized images (B, C, H, W), float32, on the images' device."""
        array = self.input.feed(images, self.preprocessing)
        logits = np.concatenate([self.run(part)[:count] for part, count in self._parts(array)])
        return torch.from_numpy(logits.astype(np.float32, copy=False)).to(images.device)

    def run(self, array: Any) -> Any:
        """Run the file on what it takes, as NumPy arrays."""
        return self._session.run([self._output], {self.input.name: array})[0]

    def _parts(self, array: Any) -> Iterator[tuple[Any, int]]:
        """As many images as the file takes at a time, the last part filled up, and how many of them count."""
        batch = self.input.batch or len(array)
        for start in range(0, len(array), batch):
            part = array[start : start + batch]
            filling = np.repeat(part[-1:], batch - len(part), axis=0)
            yield (np.concatenate([part, filling]) if len(filling) else part), len(part)


def _opened(path: str | Path, threads: int | None) -> Any:
    from tweo_timm.quant.ort import open_session

    try:
        return open_session(path, threads)
    except Exception as error:  # onnxruntime has a class for each status, none of them public
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} is no file that onnxruntime can open ({reason}); a checkpoint is validated by --checkpoint"
        ) from error


def _logits_of(outputs: Sequence[Any], where: str) -> tuple[str, int | None]:
    """Name and width of the only output with an axis of images and one of classes."""
    found = [output for output in outputs if len(output.shape) == 2]
    if len(found) != 1:
        shapes = ", ".join(f"{output.name} {output.shape}" for output in outputs)
        raise ValueError(f"{where} has the outputs {shapes}: one of the form (batch, classes) is accepted")
    classes = found[0].shape[1]
    return found[0].name, classes if isinstance(classes, int) else None


def count_values(path: str | Path) -> int:
    """Count the numbers that a file holds: weights, and in a quantized file their scales."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return sum(int(np.prod(tensor.dims, dtype=np.int64)) for tensor in graph.initializer)
