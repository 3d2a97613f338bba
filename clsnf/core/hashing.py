"""Content as names: short hashes of settings and of files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def content_key(content: Any) -> str:
    """40 hex digits of the sha256 of plain JSON content, independent of the order of its keys."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:40]


def set_key(hashes: Iterable[str]) -> str:
    """40 hex digits for a set of content hashes, whatever their order."""
    return content_key(sorted(hashes))


def sha256_file(path: Path) -> str:
    """64 hex digits: the sha256 of a file's bytes. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
