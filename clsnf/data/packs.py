"""A data set as Parquet shards: few large files instead of many small ones, on any file system that
pyarrow knows (a folder, s3://, gs://).

    DEST/pack.json                   what belongs to it: every shard with its rows, size and sha256;
    written last DEST/CATEGORY/00000.parquet      rows of PACK_SCHEMA: a picture's and its mask's
    encoded bytes as they were, and what is known of them

Unusual: a row group holds about half a megabyte, so that reading one picture reads little else;
    pages carry checksums, so that
damaged bytes are an error even where a picture's format would not notice. A pack gives the same
table as the folder that it was made from, apart from the references, and so the same splits, stages
and figures.
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
        ("name", pa.string()),  # below the category's folder, with its suffix
        ("split", pa.string()),  # fit | test, as the layout says; studies divide fit themselves
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

Location = str | Path


@dataclass(frozen=True)
class Shard:
    """A shard as the pack's list has it; ``file`` is relative to the pack."""

    file: str
    category: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Verified:
    """A pack that is whole: its rows by category, and the pictures in it that are no images, as
    they were before it was packed.
    """

    rows: dict[str, int]
    shards: int
    bytes: int
    unreadable: tuple[str, ...]


# ---- reading ----


def is_pack(location: Location) -> bool:
    """Whether a folder or URI is meant as a pack: one that was cut short is."""
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
    return not is_uri(location) and any(
        Path(location).glob("*/00000.parquet")
    )  # one that was copied in part


def pack_categories(location: Location) -> list[str]:
    """Names of a pack's categories, in the order in which they were packed. Raises PackError."""
    return list(dict.fromkeys(shard.category for shard in _manifest(location)))


def read_pack(location: Location, category: str) -> pa.Table:
    """One category of a pack as a table of ``CATEGORY_SCHEMA``, like
    :func:`clsnf.data.layouts.read_category`. No picture is read.

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
    """A shard's rows, without the pictures."""
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
    """A shard whose size, schema and number of rows are as they should be."""
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
    """The first way in which a schema is not a pack's."""
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
    """The shards that a pack lists."""
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
    """Write categories as a pack, one after the other; in memory there is never more than a row
    group.

    Args:
        categories: name, and what gives the table, as a layout's reader does.
        destination: a folder or URI: new, empty, or holding a pack that was cut short, which is
            begun anew.
        progress: told about every picture.
        shard_bytes, group_bytes: of pictures in a shard and in a row group, about.

    Raises:
        OutputError: the destination holds something else, or can't be written.
        DataError, ImageError: a table can't be made, or a picture is gone or was changed while it
            was packed.
    """
    system, root = file_system(destination)
    _check_destination(system, root, destination)
    shards: list[Shard] = []
    try:
        system.create_dir(root, recursive=True)
        _write_text(system, posixpath.join(root, _UNFINISHED), f"{_KIND}: being written\n")
        for category, read in categories:
            table = read()
            shards += _write_category(
                system, root, category, table, progress, shard_bytes, group_bytes
            )
        content = {"kind": _KIND, "format": FORMAT, "shards": [vars(shard) for shard in shards]}
        _write_text(system, posixpath.join(root, _MANIFEST), json.dumps(content, indent=1) + "\n")
        system.delete_file(posixpath.join(root, _UNFINISHED))
    except (pa.ArrowException, OSError) as error:
        raise OutputError(
            f"{destination} can't be written ({one_line(error)}): check the address, its permissions "
            "and room."
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


class _Hashing:
    """A stream that hashes what is written to it; for Parquet's writer, which can't say what it
    wrote.
    """

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


def _write_category(
    system: fs.FileSystem,
    root: str,
    category: str,
    table: pa.Table,
    progress: Progress,
    shard_bytes: int,
    group_bytes: int,
) -> list[Shard]:
    system.create_dir(posixpath.join(root, category), recursive=True)
    rows = _rows(table, category, progress)
    shards: list[Shard] = []
    row = next(rows, None)
    while row is not None:
        file = f"{category}/{len(shards):05d}.parquet"
        stream = _Hashing(system.open_output_stream(posixpath.join(root, file)))
        written, count = 0, 0
        options: dict[str, Any] = {
            "compression": "none",
            "use_dictionary": False,
            "write_statistics": False,
        }
        with pq.ParquetWriter(
            pa.PythonFile(stream, mode="w"), PACK_SCHEMA, write_page_checksum=True, **options
        ) as writer:
            while row is not None and written < shard_bytes:
                group: list[dict[str, Any]] = []
                held = 0
                while row is not None and held < group_bytes:
                    group.append(row)
                    held += len(row["image"]) + len(row["mask"] or b"")
                    row = next(rows, None)
                writer.write_table(
                    pa.Table.from_pylist(group, schema=PACK_SCHEMA), row_group_size=len(group)
                )
                written += held
                count += len(group)
        stream.close()
        shards.append(Shard(file, category, count, stream.bytes, stream.sha256))
    return shards


def _rows(table: pa.Table, category: str, progress: Progress) -> Iterator[dict[str, Any]]:
    """A table's rows as a pack has them, pictures read."""
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


def verify_pack(location: Location, progress: Progress = silent) -> Verified:
    """Read all of a pack: sizes, checksums of shards, of pages and of every picture; and try every
    picture.

    Raises:
        PackError: the first shard that is not what the pack's list says.
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
    return Verified(rows, len(shards), sum(shard.bytes for shard in shards), tuple(unreadable))


def _check_sha256(location: Location, shard: Shard) -> None:
    place = _below(location, shard.file)
    _opened(location, shard).close()  # a missing or shorter one is said as that
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
    """Why a row's picture or mask is no image, or None. Raises PackError where a checksum is not
    that of its bytes.
    """
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
    """A file of a pack: a URI below a URI, else an absolute path."""
    if is_uri(location):
        base, mark, query = str(location).partition("?")
        return f"{base.rstrip('/')}/{quote(file)}{mark}{query}"
    return str(Path(location).absolute() / file)
