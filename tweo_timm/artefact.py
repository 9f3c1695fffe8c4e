"""What a file says of itself, so that it can be used rightly without asking who made it.

A model that leaves this package as an ONNX file is nothing without the way its images are prepared and the names of its
classes. The set of fields has its one home here: metadata of ONNX files, scales.json and report.json are written from
it, and `validate.py --onnx` reads it back. A file is a stranger's: what it says is taken by name and type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tweo_timm.records import Fields, plain, shown
from tweo_timm.settings import ABOVE_0, AT_LEAST_0, Bounds
from tweo_timm.version import __version__

FLOAT = "float32"
"""What stands for a float model where others have their scheme."""

_SIDE = Bounds(1, 2**16)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes what a model takes, in timm's words.

    Attributes:
        input_size: channels, height and width.
        mean: of pixels from 0 to 1, for each channel; subtracted.
        std: likewise; divided by.
        crop_pct: the part of the resized image that is kept.
        crop_mode: center, squash or border.
        interpolation: bicubic, bilinear, ...
        image_mode: Pillow's mode that images are converted to; None: RGB, and L for one channel.
        exif: whether images are turned upright first.
        crop_border_pixels: cut from each border first; None for none.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: str
    interpolation: str
    image_mode: str | None = None
    exif: bool = False
    crop_border_pixels: int | None = None

    @classmethod
    def of(cls, data_config: Mapping[str, Any], **rarely: Any) -> Preprocessing:
        """Take over what timm has resolved; what is set rarely is given by name."""
        size, mean, std = (tuple(data_config[name]) for name in ("input_size", "mean", "std"))
        texts = {name: data_config[name] for name in ("crop_mode", "interpolation")}
        return cls(size, mean, std, float(data_config["crop_pct"]), **texts, **rarely)

    @property
    def data_config(self) -> dict[str, Any]:
        """The same as timm's resolved preprocessing."""
        names = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON; what is set rarely only where it is set."""
        rarely = {name: getattr(self, name) for name in ("image_mode", "exif", "crop_border_pixels")}
        found: dict[str, Any] = plain(self.data_config | {name: value for name, value in rarely.items() if value})
        return found

    @classmethod
    def from_json(cls, said: Fields) -> Preprocessing:
        """Read what `to_json` returned.

        Raises:
            ValueError: naming a field that is missing or of another type.
        """
        size, mean, std = (_numbers(said, name, bounds) for name, bounds in _LISTS.items())
        if len(size) != 3 or any(side != int(side) for side in size):
            said.refuse("input_size", said.items("input_size"), "channels, height and width")
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != size[0]:
                said.refuse(name, said.items(name), f"a list of {int(size[0])} numbers, one per channel")
        if said.mapping.get("exif") not in (None, True, False):
            said.refuse("exif", said.mapping["exif"], "true or false")
        border = said.integer("crop_border_pixels", AT_LEAST_0) if said.has("crop_border_pixels") else None
        return cls(
            input_size=(int(size[0]), int(size[1]), int(size[2])),
            mean=mean,
            std=std,
            crop_pct=said.number("crop_pct", Bounds(0, 1, open="low")),
            crop_mode=said.text("crop_mode"),
            interpolation=said.text("interpolation"),
            image_mode=said.text("image_mode") if said.has("image_mode") else None,
            exif=bool(said.mapping.get("exif")),
            crop_border_pixels=border,
        )


_LISTS = {"input_size": _SIDE, "mean": Bounds(-1e6, 1e6), "std": ABOVE_0}


@dataclass(frozen=True)
class Artefact:
    """What a file says of itself.

    Attributes:
        scheme: how it is quantized; "float32" for a float model.
        preprocessing: of its images; None if nobody knows.
        class_names: by index; None if nobody knows.
        calibration: what its scales come from: images, method, and where known the images' split and seed; None
            for a float model.
        arch: timm's name of the architecture; None if nobody knows.
        session_options: what an onnxruntime session needs for it where int8 products saturate, key -> value.
        version: of this package, which wrote it; None for a stranger's file.
    """

    scheme: str = FLOAT
    preprocessing: Preprocessing | None = None
    class_names: Sequence[str | None] | None = None
    calibration: Mapping[str, Any] | None = None
    arch: str | None = None
    session_options: Mapping[str, str] = field(default_factory=dict)
    version: str | None = __version__

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON: a part of scales.json and report.json."""
        found = asdict(replace(self, preprocessing=None))
        found["preprocessing"] = None if self.preprocessing is None else self.preprocessing.to_json()
        found["tweo_timm"] = found.pop("version")
        written: dict[str, Any] = plain(found)
        return written

    def to_metadata(self) -> dict[str, str]:
        """Return the fields as metadata of an ONNX file: texts as they are, everything else as JSON."""
        content = self.to_json()
        return {
            name: value if name in _TEXTS else json.dumps(value)
            for name, value in content.items()
            if not (name in _TEXTS and value is None)
        }

    @classmethod
    def from_metadata(cls, entries: Mapping[str, str], where: str) -> Artefact:
        """Read the metadata of an ONNX file; entries that are not there are unknown.

        Args:
            entries: key -> value, both text.
            where: which file, for messages.

        Raises:
            ValueError: naming an entry that is not what it must be.
        """
        content: dict[str, Any] = {name: entries[name] for name in _TEXTS if name in entries}
        for name in ("preprocessing", "class_names", "calibration", "session_options"):
            try:
                content[name] = json.loads(entries.get(name) or "null")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: {name} is {shown(entries[name])}; it must be JSON") from error
        return cls.from_json(Fields(content, where))

    @classmethod
    def from_json(cls, said: Fields) -> Artefact:
        """Read what `to_json` returned; fields that are not there are unknown.

        Raises:
            ValueError: naming a field that is not what it must be.
        """
        options = said.fields("session_options") if said.has("session_options") else None
        return cls(
            scheme=said.text("scheme") if said.has("scheme") else FLOAT,
            preprocessing=Preprocessing.from_json(said.fields("preprocessing")) if said.has("preprocessing") else None,
            class_names=_names(said),
            calibration=said.fields("calibration").mapping if said.has("calibration") else None,
            arch=said.text("arch") if said.has("arch") else None,
            session_options={} if options is None else {name: options.text(name) for name in options.mapping},
            version=said.text("tweo_timm") if said.has("tweo_timm") else None,
        )


_TEXTS = ("scheme", "arch", "tweo_timm")


def _numbers(said: Fields, name: str, bounds: Bounds) -> tuple[float, ...]:
    values = said.items(name)
    inside = Fields({f"{name}[{index}]": value for index, value in enumerate(values)}, said.where, said.path)
    return tuple(inside.number(place, bounds) for place in inside.mapping)


def _names(said: Fields) -> list[str | None] | None:
    if not said.has("class_names"):
        return None
    names = said.items("class_names")
    if not all(isinstance(name, str | None) for name in names):
        said.refuse("class_names", names, "a list of strings and nulls")
    return list(names)
