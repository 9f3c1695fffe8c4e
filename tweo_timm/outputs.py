"""Writing a file: in one step, into the folder that was named, and nowhere else.

A crash or a full disk leaves the old file or the new one, never a part. A symbolic link under a name of ours is not
followed: a run folder may come from a stranger. What is no regular file (a device, a pipe, a folder) is not replaced.
Text is UTF-8 whatever the locale; an error of the system names the file. That a folder can be written into is asked
before the work whose results go there.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


class Outputs:
    """The files of one folder.

    Args:
        folder: made when the first file is written, if it is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def check(self, flag: str, name: str = "") -> None:
        """Refuse, before any work, a folder or a file in it that could not be written; nothing is changed.

        Args:
            flag: the option that named it, for the message.
            name: a file of the folder that the option named; empty if it named the folder.

        Raises:
            ValueError: it cannot be written; the message names flag, path and reason.
        """
        given = f"{flag} {self.folder / name}"
        there = next(
            path for path in (self.folder.absolute(), *self.folder.absolute().parents) if os.path.lexists(path)
        )
        if not there.is_dir():
            under = f"lies under the file {there}" if name or there != self.folder.absolute() else "is a file"
            raise ValueError(f"{given} {under}: name {'another place' if name else 'a folder, which need not exist'}")
        try:
            if name:
                _refuse_irregular(self.folder / name)
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"{given}: cannot write into {there} ({reason}); name another place") from error

    def write(self, name: str, content: str | bytes) -> Path:
        """Replace a file in one step; what stands under its name is left as it is until the new one is complete.

        Args:
            name: the file's, without a path.
            content: text, which is written in UTF-8 with what UTF-8 cannot hold escaped; or bytes.

        Returns:
            The file's path.

        Raises:
            OSError: the system refused; it names the file.
        """
        with self._replacing(name) as file:
            file.write(_encoded(content) if isinstance(content, str) else content)
        return self.folder / name

    def append(self, name: str, text: str) -> None:
        """Add text to the end of a file, which is made if it is not there; raises as `write`."""
        path = self._path(name)
        with _naming(path):
            _refuse_irregular(path, links=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            with open(os.open(path, flags, 0o666), "ab") as file:
                file.write(_encoded(text))

    def picture(self, name: str, draw: Callable[[BinaryIO], object]) -> Path:
        """Replace a picture by what `draw` writes into the file that it is given; raises as `write`."""
        drawn = io.BytesIO()
        draw(drawn)
        return self.write(name, drawn.getvalue())

    @contextlib.contextmanager
    def _replacing(self, name: str) -> Iterator[BinaryIO]:
        """A new file beside the named one, which takes its place at the end and is gone after an error."""
        path = self._path(name)
        temporary = path.with_name(f".{name}.tmp")
        with _naming(path):
            _refuse_irregular(path)
            temporary.unlink(missing_ok=True)  # of a run that was killed; a link goes, not what it points to
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
            try:
                with open(os.open(temporary, flags, 0o666), "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def _path(self, name: str) -> Path:
        assert name == os.path.basename(name), name
        with _naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name


def _encoded(text: str) -> bytes:
    # Names of files whose bytes are no text come as lone surrogates, which UTF-8 does not have.
    return text.encode("utf-8", errors="backslashreplace")


def _refuse_irregular(path: Path, links: bool = False) -> None:
    """Refuse to write where something stands that is no regular file; a link is replaced, not followed."""
    if links and path.is_symlink():
        raise OSError(f"{path} is a symbolic link, which is not followed: remove it")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file, and is not replaced")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in what the system says: that a disk is full, it says without one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # ours, which names it
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
