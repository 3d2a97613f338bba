"""Pictures as sources give them: files, frames, and what should have been one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from clsnf.core.errors import ImageError
from clsnf.data.images import decode_image
from clsnf.data.sources import read_bytes


class FileChangedError(ImageError):
    """A file changed while it was read: somebody still writes it."""


class Picture(Protocol):
    """A picture to judge.

    Attributes:
        source: path of the file, or name of the camera.
        frame: number of the frame; None for a file.
        version: of a file its size in bytes and the time of its last change in nanoseconds.
        may_change: whether a damaged one may still be written to, and is worth another look.
    """

    @property
    def source(self) -> str: ...
    @property
    def frame(self) -> int | None: ...
    @property
    def version(self) -> tuple[int, int] | None: ...
    @property
    def may_change(self) -> bool: ...

    def read(self) -> NDArray[np.uint8]:
        """(h, w, 3) uint8 RGB. Raises ImageError where there is no picture to judge."""
        ...


@dataclass(frozen=True)
class FilePicture:
    """A file; see :class:`Picture`."""

    source: str
    version: tuple[int, int]
    may_change: bool = False
    frame: None = None

    def read(self) -> NDArray[np.uint8]:
        """The file's pixels. Raises ImageError, FileChangedError."""
        data = read_bytes(Path(self.source))
        if version_of(self.source) != self.version or len(data) != self.version[0]:
            raise FileChangedError(f"{self.source} changed while it was read.")
        return decode_image(data, self.source)


@dataclass(frozen=True)
class Frame:
    """A frame of a camera or video, (h, w, 3) uint8 RGB; see :class:`Picture`."""

    source: str
    frame: int
    image: NDArray[np.uint8]
    version: None = None
    may_change: bool = False

    def read(self) -> NDArray[np.uint8]:
        """The frame's pixels."""
        return self.image


@dataclass(frozen=True)
class MissingPicture:
    """What should have been a picture, and why it is none; see :class:`Picture`."""

    source: str
    reason: str
    version: tuple[int, int] | None = None
    frame: None = None
    may_change: bool = False

    def read(self) -> NDArray[np.uint8]:
        """Raises ImageError."""
        raise ImageError(self.reason)


def version_of(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """A file's size in bytes and the time of its last change; None where it is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


class Source(Protocol):
    """Where pictures come from.

    Attributes:
        name: for messages and results.
        waiting: pictures that wait to be judged.
        overloaded: whether more wait than may.
        dropped: frames that came while another was judged.
        trouble: why no pictures come for now; empty where all is well.
        ended: whether no more will come.
    """

    name: str
    dropped: int
    trouble: str

    @property
    def waiting(self) -> int: ...
    @property
    def overloaded(self) -> bool: ...
    @property
    def ended(self) -> bool: ...

    def open(self) -> None:
        """Begin. Raises ClsnfError where there is no such folder or camera."""
        ...

    def take(self, seconds: float) -> Picture | None:
        """The next picture; None where none comes within so many seconds."""
        ...

    def postpone(self, picture: Picture) -> None:
        """Give a picture again later, once its file has stopped changing."""
        ...

    def close(self) -> None:
        """Free what :meth:`open` took."""
        ...
