"""Reads the encoded bytes of an image, from a file of its own or from a row of a pack's shard.

The ``path`` and ``mask_path`` of a table are references. The reference of a file is its path. The
reference of an image in a pack (see :mod:`clsnf.data.packs`) is ``SHARD.parquet#image/ROW/NAME``
or ``SHARD.parquet#mask/ROW/NAME``. NAME is the name that the file had before it was packed: error
messages show it, and ``Path(reference).stem`` is the same as for the file. A shard may lie on any
file system that pyarrow has a URI for. The reference of several masks of one image is that of their
folder, see :mod:`clsnf.data.region_files`.

:data:`SHARDS` is the process's one cache of opened shards; all readers of packs share it.
"""

from __future__ import annotations

import io
import os
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pyarrow import fs

from clsnf.core.errors import DataError, ImageError
from clsnf.core.uris import is_uri, refuse_password
from clsnf.data.region_files import bundle, has_regions

Reference = str | os.PathLike[str]

_PACKED = re.compile(
    r"(?P<shard>.+\.parquet(?:\?[^#]*)?)#(?P<column>image|mask)/(?P<row>\d+)/.*", re.DOTALL
)


_COLOURED = re.compile(r"(?P<mask>.+)#background=(?P<colour>[0-9a-f]{6})", re.DOTALL)


def packed_reference(shard: str, column: str, row: int, name: str) -> str:
    """The reference of a row's ``image`` or ``mask``."""
    return f"{shard}#{column}/{row}/{name}"


def mask_on_background(path: str, colour: str) -> str:
    """The reference of a mask whose background is not black but `colour`, such as ``ffffff``."""
    return path if colour == "000000" else f"{path}#background={colour}"


def is_packed(reference: Reference) -> bool:
    """Whether a reference is to an image or mask in a pack."""
    return _PACKED.fullmatch(os.fspath(reference)) is not None


def read_bytes(reference: Reference) -> bytes:
    """The encoded bytes of an image or mask. Raises ImageError."""
    text = os.fspath(reference)
    packed = _PACKED.fullmatch(text)
    if packed is not None:
        return _read_packed(packed["shard"], packed["column"], int(packed["row"]), text)
    if has_regions(text):
        return bundle(text)
    coloured = _COLOURED.fullmatch(text)
    if coloured is not None:
        return _on_black(read_bytes(coloured["mask"]), coloured["colour"], text)
    try:
        return Path(reference).read_bytes()
    except OSError as error:
        raise ImageError(
            f"{text} can't be read ({error.strerror}): check the path and its permissions."
        ) from error


def _on_black(mask: bytes, colour: str, name: str) -> bytes:
    """A mask's PNG with 0 where it has that colour, and 255 elsewhere. Raises ImageError."""
    try:
        with Image.open(io.BytesIO(mask)) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except Exception as error:  # codecs raise nearly anything
        raise ImageError(f"{name} is no mask that can be read ({one_line(error)}).") from error
    background = (pixels == np.frombuffer(bytes.fromhex(colour), np.uint8)).all(axis=2)
    file = io.BytesIO()
    Image.fromarray(np.where(background, np.uint8(0), np.uint8(255))).save(file, format="PNG")
    return file.getvalue()


def _read_packed(shard: str, column: str, row: int, name: str) -> bytes:
    try:
        found = SHARDS.read(shard, column, row)
    except IndexError as error:
        raise ImageError(f"{name} {error}: read the pack again.") from None
    except (pa.ArrowException, OSError) as error:
        reason = "it is not there" if isinstance(error, FileNotFoundError) else one_line(error)
        raise ImageError(
            f"{name} can't be read ({reason}): the pack is damaged or was moved; clsnf data "
            "verify says more."
        ) from error
    if found is None:
        raise ImageError(f"{name}: the pack holds no {column} in this row; read the pack again.")
    return found


def file_system(location: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path in it.

    Raises:
        DataError: the URI can't be used.
        SettingsError: the URI holds a password.
    """
    text = os.fspath(location)
    if not is_uri(text):
        return fs.LocalFileSystem(), os.path.abspath(text)
    try:
        refuse_password(text)
        system, path = fs.FileSystem.from_uri(text)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{text} can't be opened ({one_line(error)}): give a folder, or a URI such as "
            "s3://bucket/folder."
        ) from error
    return system, path


def one_line(error: Exception) -> str:
    """An error's message on one line of at most 200 characters; its type's name if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---- rows of shards ----


class _Footer(NamedTuple):
    """What a shard says of itself, and which file said it."""

    version: tuple[int, int | None]  # the file's size in bytes and its time of change
    metadata: pq.FileMetaData
    starts: list[int]  # the first row of each row group; at the end the number of rows


class _OpenShards(threading.local):
    """What one thread has open: a Parquet reader serves one thread at a time."""

    def __init__(self) -> None:
        self.files: OrderedDict[str, tuple[_Footer, pq.ParquetFile]] = OrderedDict()
        # The rows read last, and where they are from: shard, column and number of the row group.
        self.rows: pa.ChunkedArray | None = None
        self.place: tuple[str, str, int] | None = None
        self.footer: _Footer | None = None


class ShardCache:
    """Footers, open files and row groups of shards, for reading many rows one by one.

    All threads share the footers (at most 256). Each thread has its own open files (at most 8) and
    keeps one column of the row group that it read last, about half a megabyte.

    A pack may be replaced by another one at the same place. What is cached belongs to one version
    of a shard's file, told by its size and its time of change: :meth:`info` drops the footer of
    another version, and a thread's file and rows are used only with the footer that they were
    opened with. A shard on this machine is looked up before every read. One behind a URI, where a
    look-up costs a request, is looked up when its pack is opened.
    """

    MOST_FOOTERS, MOST_OPEN = 256, 8

    def __init__(self) -> None:
        self._footers: OrderedDict[str, _Footer] = OrderedDict()
        self._lock = threading.Lock()
        self._open = _OpenShards()

    def info(self, shard: str) -> fs.FileInfo:
        """The shard's file as it is now. Raises OSError, ArrowException."""
        system, path = file_system(shard)
        info = system.get_file_info(path)
        with self._lock:
            footer = self._footers.get(shard)
            if footer is not None and footer.version != _version(info):
                del self._footers[shard]
        return info

    def read(self, shard: str, column: str, row: int) -> bytes | None:
        """A row's value in a binary column.

        Raises:
            IndexError: the shard has no such row.
            OSError, ArrowException: the file is missing, or a page's checksum is wrong.
        """
        footer = self._footer(shard)
        if row >= footer.starts[-1]:
            raise IndexError(f"is no row of its shard, which has {footer.starts[-1]}")
        group = bisect_right(footer.starts, row) - 1
        value: bytes | None = self._rows(shard, footer, column, group)[
            row - footer.starts[group]
        ].as_py()
        return value

    def _rows(self, shard: str, footer: _Footer, column: str, group: int) -> pa.ChunkedArray:
        """One column of a row group, kept until this thread reads another one."""
        own = self._open
        if own.rows is None or own.footer is not footer or own.place != (shard, column, group):
            file = self._opened(shard, footer)
            own.rows = file.read_row_group(group, columns=[column], use_threads=False)[column]
            own.footer, own.place = footer, (shard, column, group)
        return own.rows

    def _footer(self, shard: str) -> _Footer:
        info = None if is_uri(shard) else self.info(shard)
        with self._lock:
            footer = self._footers.get(shard)
            if footer is not None:
                self._footers.move_to_end(shard)
                return footer
        system, path = file_system(shard)
        info = info or system.get_file_info(path)
        with system.open_input_file(path) as file:
            metadata = pq.read_metadata(file)
        sizes = (metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
        footer = _Footer(_version(info), metadata, list(accumulate(sizes, initial=0)))
        with self._lock:
            footer = self._footers.setdefault(shard, footer)  # another thread may have been first
            while len(self._footers) > self.MOST_FOOTERS:
                self._footers.popitem(last=False)
        return footer

    def _opened(self, shard: str, footer: _Footer) -> pq.ParquetFile:
        files = self._open.files
        if shard in files and files[shard][0] is not footer:
            files.pop(shard)[1].close()
        if shard not in files:
            while len(files) >= self.MOST_OPEN:
                files.popitem(last=False)[1][1].close()
            system, path = file_system(shard)
            file = pq.ParquetFile(
                system.open_input_file(path),
                metadata=footer.metadata,
                page_checksum_verification=True,
                pre_buffer=False,
            )
            files[shard] = (footer, file)
        files.move_to_end(shard)
        return files[shard][1]


def _version(info: fs.FileInfo) -> tuple[int, int | None]:
    return info.size, info.mtime_ns


SHARDS = ShardCache()
