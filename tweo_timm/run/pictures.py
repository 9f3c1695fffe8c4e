"""Images as they are read, one by one: what cannot be used is an error that names it, what is altered is counted.

timm replaces an image that it cannot decode by its neighbour, leaves out what a stream cannot read, and takes any
label. It also reads some images otherwise than they are seen: it passes over the orientation that a camera wrote
(EXIF), and cuts off what 16-bit images hold above 255, which makes most of them white.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import numbers
import traceback
from collections.abc import Iterator
from typing import Any

from PIL import Image, ImageOps
from timm.data import IterableImageDataset
from timm.data.readers import reader_wds
from torch.utils.data import Dataset

from tweo_timm.run.failure import Failure

_logger = logging.getLogger(__name__)

_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright


class UnreadableImage(Failure):
    """An image of the dataset, or its label, cannot be used; the message names it."""

    def __init__(self, message: str) -> None:
        # A loader's process sends its whole traceback, which ends in the message.
        super().__init__(message.strip().splitlines()[-1].split("UnreadableImage: ")[-1])


class Alterations:
    """Counts, over all loader processes, the images that are not read as they are seen, and says so once."""

    _WORDS = (
        "%d of the images read carry an EXIF orientation, which is passed over as in timm: they are seen rotated or "
        "mirrored; --exif turns them upright",
        "%d of the images read hold values above 255, which are cut off as in timm (16-bit images become white): "
        "convert them to 8 bits",
    )

    def __init__(self) -> None:
        self._counts = multiprocessing.Array("q", len(self._WORDS))
        self._said = False

    def turned(self) -> None:
        """Count an image whose orientation is passed over."""
        self._add(0)

    def cut_off(self) -> None:
        """Count an image whose values are cut off."""
        self._add(1)

    def _add(self, kind: int) -> None:
        with self._counts.get_lock():
            self._counts[kind] += 1

    def report(self) -> None:
        """Warn of what was counted, if anything was and nothing has been said yet. For the end of a pass."""
        counts = self._counts[:]
        if self._said or not any(counts):
            return
        self._said = True
        for count, words in zip(counts, self._WORDS, strict=True):
            if count:
                _logger.warning(words, count)


class Reading:
    """How the images of a dataset are opened and which labels they may have.

    Args:
        mode: PIL's mode that images are converted to.
        num_classes: how many classes labels speak of; None for targets that are no single label.
        exif: whether images are turned upright.
    """

    def __init__(self, mode: str, num_classes: int | None = None, exif: bool = False) -> None:
        self.mode = mode
        self.alterations = Alterations()
        self._num_classes = num_classes
        self._exif = exif

    def converted(self, image: Image.Image) -> Image.Image:
        """Return an image in the mode, and upright if so asked; counts what is altered otherwise."""
        if _orientation(image) in range(2, 9):
            if self._exif:
                image = ImageOps.exif_transpose(image)
            else:
                self.alterations.turned()
        if image.mode[0] in "IF" and image.getextrema()[1] > 255:  # type: ignore[operator]
            self.alterations.cut_off()
        return image.convert(self.mode)

    def checked(self, target: Any, what: str) -> Any:
        """Return the target of an image; none is -1, as in timm.

        Raises:
            UnreadableImage: if it is a label that the model has no output for.
        """
        target = -1 if target is None else target
        limit = self._num_classes
        if limit is not None and isinstance(target, numbers.Integral) and not 0 <= int(target) < limit:
            raise UnreadableImage(
                f"{what} has the label {target}, and labels are 0 to {limit - 1} here: pass --num-classes if the model "
                "is to have more, or correct the data"
            )
        return target


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged note beside an image that is whole
        return 1


class StrictImages(Dataset[Any]):
    """A map-style dataset of timm or torchvision in which an unreadable image is an error, not a neighbour's image."""

    def __init__(self, dataset: Any, reading: Reading | None = None) -> None:
        self.inner = dataset
        self.reading = reading or Reading(dataset.input_img_mode)
        self.transform: Any = None

    @property
    def alterations(self) -> Alterations:
        """What was read otherwise than it is seen."""
        return self.reading.alterations

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        image, target = self._read(index)
        target = self.reading.checked(target, f"image {self._name(index)}")
        if getattr(self.inner, "reader", None) is not None and self.inner.target_transform is not None:
            target = self.inner.target_transform(target)  # torchvision's datasets have done so
        return image if self.transform is None else self.transform(image), target

    def _read(self, index: int) -> tuple[Image.Image, Any]:
        try:
            reader = getattr(self.inner, "reader", None)
            if reader is None:
                image, target = self.inner[index]
                return self.reading.converted(image), target
            file, target = reader[index]
            with file:
                return self.reading.converted(Image.open(file)), target
        except KeyError as error:
            raise UnreadableImage(f"image {self._name(index)}: {_unlabelled(error)}") from error
        except Exception as error:  # of a damaged file, Pillow raises anything
            raise UnreadableImage(
                f"cannot read image {self._name(index)}: the file is damaged or no image ({error}). Replace or remove "
                "it"
            ) from error

    def _name(self, index: int) -> str:
        """The file's path, or else its number."""
        if getattr(self.inner, "reader", None) is not None:
            return str(self.inner.filename(index, absolute=True) or index)
        files = getattr(self.inner, "samples", None) or getattr(self.inner, "imgs", None)  # torchvision's folders
        return str(files[index][0]) if files else str(index)


class StrictStream(IterableImageDataset):  # type: ignore[misc]
    """A stream of timm's in which an unreadable shard, image or label is an error, and nothing is left out."""

    def __init__(self, dataset: IterableImageDataset, reading: Reading, name: str) -> None:
        super().__init__(None, reader=dataset.reader, target_transform=dataset.target_transform)
        self.reading = reading
        self._stream = name

    @property
    def alterations(self) -> Alterations:
        """What was read otherwise than it is seen."""
        return self.reading.alterations

    def __iter__(self) -> Iterator[Any]:
        for number, (image, target) in enumerate(self._samples()):
            image = self.reading.converted(image)
            target = self.reading.checked(target, f"image {number} of {self._stream}")
            if self.target_transform is not None:
                target = self.target_transform(target)
            yield image if self.transform is None else self.transform(image), target

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        """Read the whole stream for the names of its images."""
        with self._strict():
            return list(self.reader.filenames(basename, absolute))

    def _samples(self) -> Iterator[Any]:
        with self._strict():
            yield from self.reader

    @contextlib.contextmanager
    def _strict(self) -> Iterator[None]:
        """Let nothing that is read meanwhile be left out."""
        before = reader_wds.log_and_continue
        reader_wds.log_and_continue = _refuse  # a pipeline takes it when its first image is asked for
        try:
            yield
        except UnreadableImage:
            raise
        except KeyError as error:
            raise UnreadableImage(
                f"{self._stream}: {_unlabelled(error)}. Shards hold numbers, which a .txt file of names does not map: "
                "give a .pkl file of {number: index}"
            ) from error
        except Exception as error:  # of damaged data, readers raise anything
            raise UnreadableImage(f"cannot read {self._stream}: {error}") from error
        finally:
            reader_wds.log_and_continue = before


def _unlabelled(error: KeyError) -> str:
    return f"there is no label {error} (--class-map, --target-key)"


def _refuse(error: Exception) -> bool:
    """What webdataset calls with an error, in place of timm's function that leaves the image out."""
    shards = [place for place in error.args[1:] if isinstance(place, str)]
    samples = [frame.f_locals.get("sample") for frame, _ in traceback.walk_tb(error.__traceback__)]
    images = [f"{one['__url__']}, {one['__key__']}" for one in samples if isinstance(one, dict) and "__key__" in one]
    if isinstance(error, (TypeError, UnreadableImage)) or not (shards or images):
        raise error  # of the settings, or whoever called knows which shard it is
    reason = f"there is no {error}" if isinstance(error, KeyError) else error.args[0] if error.args else repr(error)
    raise UnreadableImage(f"cannot read {(images or shards)[-1]}: {reason}. Replace or remove it") from error
