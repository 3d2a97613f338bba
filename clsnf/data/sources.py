"""Where an image's bytes lie: in a file of their own, or in a row of a pack's shard. The one place
that tells both apart.

A table's ``path`` and ``mask_path`` are references. A file's is its path. That of a picture in a
pack (see :mod:`clsnf.data.packs`) is ``SHARD.parquet#image/ROW/NAME`` or
``SHARD.parquet#mask/ROW/NAME``, with the name that the picture had before it was packed, so that
messages name it and ``Path(reference).stem`` is what it would be of a file. A shard may lie on any
file system that pyarrow has a URI for.

Unusual: each thread opens shards for itself and keeps the row group that it read last, because a
    Parquet reader serves one thread at a
time; what a shard's footer says is shared.
"""

from __future__ import annotations

import os
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from clsnf.core.errors import DataError, ImageError
from clsnf.core.uris import is_uri, refuse_password

Reference = str | os.PathLike[str]

_PACKED = re.compile(
    r"(?P<shard>.+\.parquet(?:\?[^#]*)?)#(?P<column>image|mask)/(?P<row>\d+)/.*", re.DOTALL
)
_MOST_OPEN = 8  # shards that a thread keeps open


def packed_reference(shard: str, column: str, row: int, name: str) -> str:
    """The reference of a row's ``image`` or ``mask``."""
    return f"{shard}#{column}/{row}/{name}"


def read_bytes(reference: Reference) -> bytes:
    """The encoded bytes of an image or mask. Raises ImageError, with the mend."""
    text = os.fspath(reference)
    packed = _PACKED.fullmatch(text)
    if packed is not None:
        return _read_packed(packed["shard"], packed["column"], int(packed["row"]), text)
    try:
        return Path(reference).read_bytes()
    except OSError as error:
        raise ImageError(
            f"{text} can't be read ({error.strerror}): check the path and its permissions."
        ) from error


def is_packed(reference: Reference) -> bool:
    """Whether a reference is to a picture in a pack."""
    return _PACKED.fullmatch(os.fspath(reference)) is not None


def file_system(location: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path in it. Raises DataError for a URI that can't
    be used, SettingsError for a password.
    """
    text = os.fspath(location)
    if not is_uri(text):
        return fs.LocalFileSystem(), os.path.abspath(text)
    try:
        refuse_password(text)
        system, path = fs.FileSystem.from_uri(text)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{text} can't be opened ({_line(error)}): give a folder, or a URI such as "
            "s3://bucket/folder."
        ) from error
    return system, path


def forget_shards() -> None:
    """Read shards anew from now on: called where a pack is opened, which may be another one at the
    place of an earlier.
    """
    _footer.cache_clear()
    _generation[0] += 1


# ---- rows of shards ----


class _Threads(threading.local):
    """What each thread has open."""

    def __init__(self) -> None:
        self.generation = _generation[0]
        self.files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self.group: tuple[tuple[str, str, int] | None, pa.ChunkedArray | None] = (None, None)


_generation = [0]  # of all threads: what one opened in an earlier generation it opens again
_threads = _Threads()


@lru_cache(maxsize=256)
def _footer(shard: str) -> tuple[pq.FileMetaData, list[int]]:
    """What a shard says of itself, and the first row of each of its row groups, with the number of
    rows at the end.
    """
    system, path = file_system(shard)
    with system.open_input_file(path) as file:
        metadata = pq.read_metadata(file)
    sizes = (metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
    return metadata, list(accumulate(sizes, initial=0))


def _read_packed(shard: str, column: str, row: int, name: str) -> bytes:
    try:
        _, starts = _footer(shard)
        if row >= starts[-1]:
            raise ImageError(
                f"{name} is no row of its shard, which has {starts[-1]}: read the pack again."
            )
        group = bisect_right(starts, row) - 1
        found: bytes | None = _read_group(shard, column, group)[row - starts[group]].as_py()
    except (pa.ArrowException, OSError) as error:
        reason = "it is not there" if isinstance(error, FileNotFoundError) else _line(error)
        raise ImageError(
            f"{name} can't be read ({reason}): the pack is damaged or was moved; clsnf data "
            "verify says more."
        ) from error
    if found is None:
        raise ImageError(f"{name}: the pack holds no {column} in this row; read the pack again.")
    return found


def _read_group(shard: str, column: str, group: int) -> pa.ChunkedArray:
    """One column of a row group; pages whose checksum fails raise OSError."""
    wanted = (shard, column, group)
    if _threads.generation != _generation[0]:
        _threads.__init__()  # type: ignore[misc]
    if _threads.group[0] != wanted:
        _threads.group = (
            wanted,
            _opened(shard).read_row_group(group, columns=[column], use_threads=False)[column],
        )
    return _threads.group[1]


def _opened(shard: str) -> pq.ParquetFile:
    files = _threads.files
    if shard not in files:
        while len(files) >= _MOST_OPEN:
            files.popitem(last=False)[1].close()
        system, path = file_system(shard)
        files[shard] = pq.ParquetFile(
            system.open_input_file(path),
            metadata=_footer(shard)[0],
            page_checksum_verification=True,
            pre_buffer=False,
        )
    files.move_to_end(shard)
    return files[shard]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
