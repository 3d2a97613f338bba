"""Hashes of settings and files, which name what is made from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def content_key(content: Any) -> str:
    """The first 40 hex digits of the sha256 of JSON content; the order of keys does not matter."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:40]


def set_key(hashes: Iterable[str]) -> str:
    """The content key of a set of hashes; their order does not matter."""
    return content_key(sorted(hashes))


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, as 64 hex digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
