"""Packs: a data set as Parquet shards, a few large files instead of many small ones.

    DEST/pack.json                every shard with its rows, size and sha256; written last
    DEST/CATEGORY/00000.parquet   rows of PACK_SCHEMA: the encoded bytes of an image and of its
                                  mask as they were, and the facts of the table

A pack lies on any file system that pyarrow knows (a folder, s3://, gs://). It gives the same table
as the folder that it was made from, apart from the references, and so the same splits, artifacts
and metrics. A row group holds about half a megabyte, so that reading one image reads little else.
Pages carry checksums, so that damaged bytes are an error even where an image format would not
notice them.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from clsnf.core.errors import DataError, ImageError, OutputError, PackError, nearest
from clsnf.core.progress import Progress, silent
from clsnf.core.uris import is_uri
from clsnf.data.images import decode_image, decode_mask
from clsnf.data.layouts import CATEGORY_SCHEMA
from clsnf.data.sources import SHARDS, file_system, one_line, packed_reference, read_bytes

PACK_SCHEMA = pa.schema(
    [
        ("name", pa.string()),  # path below the category's folder
        ("split", pa.string()),  # fit | validation | test, as the layout says
        ("label", pa.int8()),
        ("defect_type", pa.string()),
        ("category", pa.string()),
        ("sha256", pa.string()),  # of the image's bytes
        ("image", pa.binary()),
        ("mask_name", pa.string()),  # null without a mask, as the two below
        ("mask_sha256", pa.string()),
        ("mask", pa.binary()),
    ]
)
FORMAT = 1
_KIND = "clsnf pack"
_MANIFEST, _UNFINISHED = "pack.json", "pack.unfinished"
_FACTS = [name for name in PACK_SCHEMA.names if name not in ("image", "mask")]
_GROUP_BYTES = 1 << 19
_SHARD_BYTES = 256 << 20
_WRITER_OPTIONS: dict[str, Any] = {
    "compression": "none",  # the images are compressed already
    "use_dictionary": False,
    "write_statistics": False,
    "write_page_checksum": True,
}

Location = str | Path


@dataclass(frozen=True)
class Shard:
    """One shard as ``pack.json`` lists it; ``file`` is relative to the pack."""

    file: str
    category: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class VerifiedPack:
    """What :func:`verify_pack` found in a pack that is whole.

    Attributes:
        rows: number of rows of each category.
        shards, bytes: number of shards, and their size.
        unreadable: for each image or mask that can't be decoded, one line with its name.
    """

    rows: dict[str, int]
    shards: int
    bytes: int
    unreadable: tuple[str, ...]


# ---- reading ----


def is_pack(location: Location) -> bool:
    """Whether a folder or URI is meant as a pack. One that was cut short is.

    Raises:
        DataError: the location can't be read.
    """
    system, root = file_system(location)
    try:
        found = system.get_file_info(
            [posixpath.join(root, name) for name in (_MANIFEST, _UNFINISHED)]
        )
    except OSError as error:
        raise DataError(
            f"{location} can't be read ({one_line(error)}): check the address and its permissions."
        ) from error
    if any(info.type == fs.FileType.File for info in found):
        return True
    # A pack that was copied in part may lack its list.
    return not is_uri(location) and any(Path(location).glob("*/00000.parquet"))


def pack_categories(location: Location) -> list[str]:
    """Names of a pack's categories, in the order in which they were packed. Raises PackError."""
    return list(dict.fromkeys(shard.category for shard in _manifest(location)))


def read_pack(location: Location, category: str) -> pa.Table:
    """One category of a pack as a table of ``CATEGORY_SCHEMA``; no image is read.

    The table is that of :func:`clsnf.data.layouts.read_category`, with references into the pack.

    Raises:
        PackError: the pack is cut short, or a shard is missing, of another size, or of another
            schema.
        DataError: the pack has no such category.
    """
    shards = _manifest(location)
    own = [shard for shard in shards if shard.category == category]
    if not own:
        raise DataError(
            f"{location} has no category "
            f"{category!r}.{nearest(category, {shard.category for shard in shards})}"
        )
    return pa.concat_tables([_as_table(location, shard) for shard in own])


def _as_table(location: Location, shard: Shard) -> pa.Table:
    """A shard's rows as a table of ``CATEGORY_SCHEMA``."""
    place = _below(location, shard.file)
    with _opened(location, shard) as file:
        facts = file.read(columns=_FACTS).to_pylist()
    rows = [
        {
            **{
                name: fact[name] for name in ("split", "label", "defect_type", "sha256", "category")
            },
            "path": packed_reference(place, "image", row, fact["name"]),
            "mask_path": None
            if fact["mask_name"] is None
            else packed_reference(place, "mask", row, fact["mask_name"]),
        }
        for row, fact in enumerate(facts)
    ]
    return pa.Table.from_pylist(rows, schema=CATEGORY_SCHEMA)


def _opened(location: Location, shard: Shard) -> pq.ParquetFile:
    """A shard whose size, schema and number of rows are as they should be. Raises PackError."""
    place = _below(location, shard.file)
    info = SHARDS.info(place)
    if info.type != fs.FileType.File:
        raise PackError(
            f"{place} is missing: the pack is cut short; copy it again, or make it again with "
            "clsnf data pack."
        )
    if info.size != shard.bytes:
        raise PackError(
            f"{place} has {info.size} bytes, not the {shard.bytes} that {_MANIFEST} says: it is "
            "cut short or was changed; "
            "copy the pack again, or make it again with clsnf data pack."
        )
    system, path = file_system(place)
    try:
        file = pq.ParquetFile(system.open_input_file(path), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise PackError(
            f"{place} is no Parquet file ({one_line(error)}): copy the pack again."
        ) from error
    if not file.schema_arrow.equals(PACK_SCHEMA):
        raise PackError(
            f"{place} has another schema: {_difference(file.schema_arrow)}; make the pack with "
            "clsnf data pack."
        )
    if file.metadata.num_rows != shard.rows:
        raise PackError(
            f"{place} has {file.metadata.num_rows} rows, not the {shard.rows} that {_MANIFEST} "
            "says: copy the pack again."
        )
    return file


def _difference(schema: pa.Schema) -> str:
    """The first way in which a schema differs from ``PACK_SCHEMA``."""
    for field in PACK_SCHEMA:
        index = schema.get_field_index(field.name)
        if index < 0:
            return f"there is no column {field.name!r}"
        if schema.field(index).type != field.type:
            return f"column {field.name!r} is {schema.field(index).type}, not {field.type}"
    strange = [name for name in schema.names if name not in PACK_SCHEMA.names]
    return (
        f"column {strange[0]!r} does not belong" if strange else "its columns are in another order"
    )


def _manifest(location: Location) -> list[Shard]:
    """The shards that a pack lists. Raises PackError; DataError if the list can't be read."""
    place = _below(location, _MANIFEST)
    system, path = file_system(place)
    try:
        with system.open_input_stream(path) as stream:
            content = json.loads(stream.read().decode())
        if content["kind"] != _KIND:
            raise ValueError(f"its kind is {content['kind']!r}")
        version = content["format"]
        if version == FORMAT:
            return [Shard(**shard) for shard in content["shards"]]
    except FileNotFoundError as error:
        raise PackError(
            f"{location} is a pack that was cut short (no {_MANIFEST}): make it again with clsnf "
            "data pack."
        ) from error
    except OSError as error:
        raise DataError(
            f"{place} can't be read ({one_line(error)}): check the address and its permissions."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise PackError(
            f"{place} is damaged ({one_line(error)}): make the pack again with clsnf data pack."
        ) from error
    raise PackError(
        f"{location} has format {version!r}, this version of clsnf reads {FORMAT}: pack it again "
        "with this version."
    )


# ---- writing ----


def write_pack(
    categories: Sequence[tuple[str, Callable[[], pa.Table]]],
    destination: Location,
    progress: Progress = silent,
    *,
    shard_bytes: int = _SHARD_BYTES,
    group_bytes: int = _GROUP_BYTES,
) -> list[Shard]:
    """Write categories as a pack, one after the other, holding at most one row group in memory.

    Args:
        categories: pairs of a name and a function that returns its table.
        destination: a folder or URI: new, empty, or holding a pack that was cut short, which is
            begun anew.
        progress: called after every image.
        shard_bytes, group_bytes: size of the images in a shard and in a row group, approximately.

    Raises:
        OutputError: the destination holds something else, or can't be written.
        DataError, ImageError: a table can't be made, or an image is gone or was changed while it
            was packed.
    """
    system, root = file_system(destination)
    _check_destination(system, root, destination)
    writer = _Writer(system, root, progress, shard_bytes, group_bytes)
    shards: list[Shard] = []
    try:
        system.create_dir(root, recursive=True)
        _write_text(system, posixpath.join(root, _UNFINISHED), f"{_KIND}: being written\n")
        for category, read in categories:
            shards += writer.category(category, read())
        content = {"kind": _KIND, "format": FORMAT, "shards": [vars(shard) for shard in shards]}
        _write_text(system, posixpath.join(root, _MANIFEST), json.dumps(content, indent=1) + "\n")
        system.delete_file(posixpath.join(root, _UNFINISHED))
    except (pa.ArrowException, OSError) as error:
        raise OutputError(
            f"{destination} can't be written ({one_line(error)}): check the address, its "
            "permissions and room."
        ) from error
    return shards


def _check_destination(system: fs.FileSystem, root: str, destination: Location) -> None:
    try:
        found = system.get_file_info(fs.FileSelector(root, allow_not_found=True))
    except (pa.ArrowException, OSError) as error:
        raise OutputError(
            f"{destination} can't be written ({one_line(error)}): give the name of a new folder."
        ) from error
    names = {info.base_name for info in found}
    if _UNFINISHED in names and _MANIFEST not in names:
        return
    if names:
        what = "is a pack already" if _MANIFEST in names else "holds other things"
        raise OutputError(f"{destination} {what}: name another folder or remove it.")


class _HashingStream:
    """A stream that hashes and counts what is written to it; Parquet's writer does neither."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream, self._hash, self.bytes, self.closed = stream, hashlib.sha256(), 0, False

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._hash.update(view)
        self.bytes += view.nbytes
        self._stream.write(view)
        return view.nbytes

    def flush(self) -> None:
        self._stream.flush()

    def tell(self) -> int:
        return self.bytes

    def close(self) -> None:
        self.closed = True
        self._stream.close()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


@dataclass(frozen=True)
class _Writer:
    """Writes the shards of a pack whose root is a path in ``system``."""

    system: fs.FileSystem
    root: str
    progress: Progress
    shard_bytes: int
    group_bytes: int

    def category(self, name: str, table: pa.Table) -> list[Shard]:
        self.system.create_dir(posixpath.join(self.root, name), recursive=True)
        groups = self._groups(_rows(table, name, self.progress))
        shards: list[Shard] = []
        group = next(groups, None)
        while group is not None:
            file = f"{name}/{len(shards):05d}.parquet"
            stream = _HashingStream(self.system.open_output_stream(posixpath.join(self.root, file)))
            written, rows = 0, 0
            with pq.ParquetWriter(
                pa.PythonFile(stream, mode="w"), PACK_SCHEMA, **_WRITER_OPTIONS
            ) as writer:
                while group is not None and written < self.shard_bytes:
                    content = pa.Table.from_pylist(group, schema=PACK_SCHEMA)
                    writer.write_table(content, row_group_size=len(group))
                    written += sum(map(_row_bytes, group))
                    rows += len(group)
                    group = next(groups, None)
            stream.close()
            shards.append(Shard(file, name, rows, stream.bytes, stream.sha256))
        return shards

    def _groups(self, rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """Row groups of about ``group_bytes``."""
        group: list[dict[str, Any]] = []
        held = 0
        for row in rows:
            group.append(row)
            held += _row_bytes(row)
            if held >= self.group_bytes:
                yield group
                group, held = [], 0
        if group:
            yield group


def _row_bytes(row: dict[str, Any]) -> int:
    return len(row["image"]) + len(row["mask"] or b"")


def _rows(table: pa.Table, category: str, progress: Progress) -> Iterator[dict[str, Any]]:
    """A table's rows as rows of ``PACK_SCHEMA``. Raises DataError, ImageError."""
    rows = table.to_pylist()
    top = posixpath.commonpath([posixpath.dirname(row["path"]) for row in rows])
    for done, row in enumerate(rows, start=1):
        image = read_bytes(row["path"])
        if hashlib.sha256(image).hexdigest() != row["sha256"]:
            raise DataError(f"{row['path']} was changed while it was packed: pack again.")
        mask = None if row["mask_path"] is None else read_bytes(row["mask_path"])
        yield {
            **{name: row[name] for name in ("split", "label", "defect_type", "sha256")},
            "category": category,
            "name": posixpath.relpath(row["path"], top),
            "image": image,
            "mask_name": None if row["mask_path"] is None else posixpath.basename(row["mask_path"]),
            "mask_sha256": None if mask is None else hashlib.sha256(mask).hexdigest(),
            "mask": mask,
        }
        progress(f"packing {category}", done, len(rows))


def _write_text(system: fs.FileSystem, path: str, text: str) -> None:
    with system.open_output_stream(path) as stream:
        stream.write(text.encode())


# ---- verifying ----


def verify_pack(location: Location, progress: Progress = silent) -> VerifiedPack:
    """Read all of a pack: compare sizes and checksums, and decode every image and mask.

    Raises:
        PackError: a shard is not what ``pack.json`` says, or an image is not what its row says.
    """
    shards = _manifest(location)
    total = sum(shard.rows for shard in shards)
    rows: dict[str, int] = {}
    unreadable: list[str] = []
    done = 0
    with ThreadPoolExecutor() as pool:
        for shard in shards:
            _check_sha256(location, shard)
            place = _below(location, shard.file)
            with _opened(location, shard) as file:
                first = 0  # row of the group in its shard
                for group in range(file.num_row_groups):
                    try:
                        found = file.read_row_group(group).to_pylist()
                    except (pa.ArrowException, OSError) as error:
                        raise PackError(
                            f"{place}, row group {group} is damaged ({one_line(error)}): copy the "
                            "pack again."
                        ) from error
                    names = [
                        packed_reference(place, "image", first + i, row["name"])
                        for i, row in enumerate(found)
                    ]
                    unreadable += [
                        problem for problem in pool.map(_problem, names, found) if problem
                    ]
                    first += len(found)
                    done += len(found)
                    progress("verifying", done, total)
            rows[shard.category] = rows.get(shard.category, 0) + shard.rows
    return VerifiedPack(rows, len(shards), sum(shard.bytes for shard in shards), tuple(unreadable))


def _check_sha256(location: Location, shard: Shard) -> None:
    place = _below(location, shard.file)
    _opened(location, shard).close()  # says it first if the shard is missing or shorter
    system, path = file_system(place)
    digest = hashlib.sha256()
    with system.open_input_stream(path) as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    if digest.hexdigest() != shard.sha256:
        raise PackError(
            f"{place} is damaged: its sha256 is not the one in {_MANIFEST}; copy the pack again."
        )


def _problem(reference: str, row: dict[str, Any]) -> str | None:
    """Why a row's image or mask can't be decoded, or None. Raises PackError for a wrong hash."""
    for column in ("image", "mask"):
        data, wanted = row[column], row["sha256" if column == "image" else "mask_sha256"]
        if data is not None and hashlib.sha256(data).hexdigest() != wanted:
            raise PackError(
                f"{reference}: the {column}'s sha256 is not the one beside it; make the pack again."
            )
    try:
        decode_image(row["image"], reference)
        if row["mask"] is not None:
            decode_mask(row["mask"], f"the mask of {reference}")
    except ImageError as error:
        return str(error)
    return None


def _below(location: Location, file: str) -> str:
    """The location of a pack's file: a URI below a URI, else an absolute path."""
    if is_uri(location):
        base, mark, query = str(location).partition("?")
        return f"{base.rstrip('/')}/{quote(file)}{mark}{query}"
    return str(Path(location).absolute() / file)
