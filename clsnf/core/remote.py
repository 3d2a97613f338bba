"""A folder on any file system that pyarrow knows: ``s3://bucket/runs``, ``gs://...``,
``abfs://...``, ``hdfs://...``, ``file:///...``.

Unusual: nothing here is ever half written. Object stores show an object when it is complete;
    elsewhere a file is written beside its place
and moved there. A study whose folder is remote works in a local copy and passes on what others need
(see :mod:`clsnf.study.remote_copy`).
"""

from __future__ import annotations

import posixpath
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from clsnf.core.errors import OutputError
from clsnf.core.files import atomic_write
from clsnf.core.uris import join_uri, refuse_password, without_secrets

_OBJECT_STORES = ("s3", "gcs", "abfs")  # they have no folders to make, and show whole objects alone


class RemoteFolder:
    """A folder and what lies below it, by names with slashes.

    Args:
        uri: of the folder; credentials come from where the file system's own tools look for them.

    Raises:
        OutputError: no such file system, or a URI that it does not understand.
        SettingsError: a URI with a password.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        with self._named():
            refuse_password(uri)
            self._files, self._path = fs.FileSystem.from_uri(uri)

    def __reduce__(self) -> tuple[type[RemoteFolder], tuple[str]]:
        return type(self), (self.uri,)

    def below(self, name: str) -> RemoteFolder:
        """The folder `name` in this one."""
        return RemoteFolder(join_uri(self.uri, name))

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException, ValueError, NotImplementedError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0].replace(
                self.uri, "it"
            )
            raise OutputError(
                f"{without_secrets(self.uri)} can't be used ({line}): is it a URI that pyarrow "
                "knows, and may it be written?"
            ) from error

    def _at(self, name: str) -> str:
        return posixpath.join(self._path, name) if name else self._path

    def check_writable(self) -> None:
        """Write something and remove it again. Raises OutputError where that fails."""
        name = f".probe-{uuid.uuid4().hex[:8]}"
        self.write(name, b"clsnf")
        self.delete(name)

    def is_empty(self) -> bool:
        """Whether nothing lies here, or the folder does not exist."""
        with self._named():
            return not self._files.get_file_info(fs.FileSelector(self._path, allow_not_found=True))

    def read(self, name: str) -> bytes | None:
        """A file's bytes, None where there is none."""
        with (
            self._named(),
            suppress(FileNotFoundError),
            self._files.open_input_stream(self._at(name)) as file,
        ):
            return bytes(file.read())
        return None

    def write(self, name: str, content: bytes) -> None:
        """A file with this content, in place of one that was there."""
        with (
            self._named(),
            self._whole(name) as place,
            self._files.open_output_stream(place) as file,
        ):
            file.write(content)

    @contextmanager
    def _whole(self, name: str) -> Iterator[str]:
        """A place to write a file to, which then takes its name."""
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
        """A copy of a local file, or of a folder with all in it."""
        if local.is_dir():
            for file in sorted(path for path in local.rglob("*") if path.is_file()):
                self.push(file, posixpath.join(name, file.relative_to(local).as_posix()))
            return
        with self._named(), self._whole(name) as place:
            fs.copy_files(
                str(local),
                place,
                source_filesystem=fs.LocalFileSystem(),
                destination_filesystem=self._files,
            )

    def pull(self, name: str, local: Path) -> bool:
        """A local copy of a file or folder, whole or not at all; False where there is none."""
        with self._named():
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

    def delete(self, name: str) -> None:
        """Remove a file or folder, if it is there."""
        with self._named(), suppress(FileNotFoundError):
            if self._files.get_file_info(self._at(name)).type == fs.FileType.Directory:
                self._files.delete_dir(self._at(name))
            else:
                self._files.delete_file(self._at(name))
