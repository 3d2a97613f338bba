"""A folder on any file system that pyarrow knows, such as an object store.

URIs are ``s3://bucket/runs``, ``gs://...``, ``abfs://...``, ``hdfs://...`` or ``file:///...``.

No file is ever half written. An object store shows an object only when it is complete; on other
file systems a file is written beside its place and then moved there. A study with a remote folder
works in a local copy and sends what other machines need (see :mod:`clsnf.study.remote_copy`).
"""

from __future__ import annotations

import posixpath
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from clsnf.core.errors import OutageError, OutputError
from clsnf.core.files import atomic_write
from clsnf.core.patience import NO_PATIENCE, Patience
from clsnf.core.uris import join_uri, refuse_password, without_secrets

T = TypeVar("T")

_OBJECT_STORES = ("s3", "gcs", "abfs")  # need no folders, and show only complete objects


class RemoteFolder:
    """A folder and its content. Names are relative to the folder, with slashes.

    Args:
        uri: of the folder. Credentials come from where the file system's own tools look for them.
        patience: with a file system that does not answer. Every method tries again that long.

    Raises:
        OutputError: there is no such file system, or it does not understand the URI.
        SettingsError: the URI has a password.

    All methods raise :class:`OutageError` when the file system fails. What it says of a network
    that is gone, of missing rights and of a missing bucket differs from one store to another, so
    all of it counts as an outage.
    """

    def __init__(self, uri: str, patience: Patience = NO_PATIENCE) -> None:
        self.uri, self._patience = uri, patience
        with self._reporting_errors(OutputError):
            refuse_password(uri)
            self._files, self._path = fs.FileSystem.from_uri(uri)

    def below(self, name: str) -> RemoteFolder:
        """The folder `name` in this one."""
        return RemoteFolder(join_uri(self.uri, name), self._patience)

    def with_patience(self, patience: Patience) -> RemoteFolder:
        """The same folder, used with another patience."""
        return RemoteFolder(self.uri, patience)

    @contextmanager
    def _reporting_errors(self, kind: type[OutputError] = OutageError) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException, ValueError, NotImplementedError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            line = line.replace(self.uri, "it")
            raise kind(
                f"{without_secrets(self.uri)} can't be used ({line}): is it a URI that pyarrow "
                "knows, and may it be written?"
            ) from error

    def _patiently(self, work: Callable[[], T]) -> T:
        def attempt() -> T:
            with self._reporting_errors():
                return work()

        return self._patience.wait_for(attempt)

    def _at(self, name: str) -> str:
        return posixpath.join(self._path, name) if name else self._path

    def check_writable(self) -> None:
        """Write a file and delete it again. Raises OutputError if that fails."""
        name = f".probe-{uuid.uuid4().hex[:8]}"
        self.write(name, b"clsnf")
        self.delete(name)

    def names(self) -> list[str]:
        """Names of the files and folders directly in it; none where it does not exist."""
        selector = fs.FileSelector(self._path, allow_not_found=True)
        found = self._patiently(lambda: self._files.get_file_info(selector))
        return [info.base_name for info in found]

    def read(self, name: str) -> bytes | None:
        """The bytes of a file; None if there is no such file."""

        def read() -> bytes | None:
            with (
                suppress(FileNotFoundError),
                self._files.open_input_stream(self._at(name)) as file,
            ):
                return bytes(file.read())
            return None

        return self._patiently(read)

    def write(self, name: str, content: bytes) -> None:
        """Write a file; it replaces one that was there."""

        def write() -> None:
            with self._complete(name) as place, self._files.open_output_stream(place) as file:
                file.write(content)

        self._patiently(write)

    @contextmanager
    def _complete(self, name: str) -> Iterator[str]:
        """A path to write a file to; when the block ends, the file has its own name."""
        place = self._at(name)
        if self._files.type_name in _OBJECT_STORES:
            yield place
            return
        folder, base = posixpath.split(place)
        self._files.create_dir(folder, recursive=True)
        draft = posixpath.join(folder, f".{base}.{uuid.uuid4().hex[:8]}.part")
        try:
            yield draft
            self._files.move(draft, place)
        except BaseException:
            with suppress(OSError):
                self._files.delete_file(draft)
            raise

    def push(self, local: Path, name: str) -> None:
        """Copy a local file, or a folder with everything in it, to `name`."""
        if local.is_dir():
            for file in sorted(path for path in local.rglob("*") if path.is_file()):
                self.push(file, posixpath.join(name, file.relative_to(local).as_posix()))
            return

        def copy() -> None:
            with self._complete(name) as place:
                fs.copy_files(
                    str(local),
                    place,
                    source_filesystem=fs.LocalFileSystem(),
                    destination_filesystem=self._files,
                )

        self._patiently(copy)

    def pull(self, name: str, local: Path) -> bool:
        """Copy a file or folder to `local`, completely or not at all; False if there is none."""

        def copy() -> bool:
            kind = self._files.get_file_info(self._at(name)).type
            if kind == fs.FileType.NotFound:
                return False
            with atomic_write(local) as draft:
                if kind == fs.FileType.Directory:
                    draft.mkdir()
                fs.copy_files(
                    self._at(name),
                    str(draft),
                    source_filesystem=self._files,
                    destination_filesystem=fs.LocalFileSystem(),
                )
            return True

        return self._patiently(copy)

    def delete(self, name: str) -> None:
        """Delete a file or folder if it exists."""

        def delete() -> None:
            with suppress(FileNotFoundError):
                if self._files.get_file_info(self._at(name)).type == fs.FileType.Directory:
                    self._files.delete_dir(self._at(name))
                else:
                    self._files.delete_file(self._at(name))

        self._patiently(delete)
