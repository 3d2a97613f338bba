"""A data set of any kind: a folder of categories in some layout, a manifest, or a pack."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from clsnf.core.errors import DataError
from clsnf.core.uris import is_uri
from clsnf.data import layouts, manifests, packs


def list_categories(location: str | Path) -> list[str]:
    """Names of the categories in a folder, manifest or pack. Raises DataError, PackError."""
    if manifests.is_manifest(location):
        return [manifests.manifest_category(Path(location))]
    if _is_pack(location):
        return packs.pack_categories(location)
    return layouts.list_categories(location)


def read_category(location: str | Path, category: str) -> pa.Table:
    """One category as a table of ``CATEGORY_SCHEMA``. Raises DataError, PackError."""
    if manifests.is_manifest(location):
        return manifests.read_manifest(Path(location))
    if _is_pack(location):
        return packs.read_pack(location, category)
    return layouts.read_category(location, category)


def _is_pack(location: str | Path) -> bool:
    if packs.is_pack(location):
        return True
    if is_uri(location):
        raise DataError(
            f"{location} is no pack (there is no pack.json): a URI must be one; a folder of "
            "pictures must be on a file system."
        )
    return False
