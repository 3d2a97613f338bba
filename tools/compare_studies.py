#!/usr/bin/env python
"""Print what differs between the results of two studies, apart from times, paths and versions.

    python tools/compare_studies.py runs/before runs/after

The proof that a change of the code changed no result: run the same study with both versions, on one
machine and with as many cores a trial, and compare. Exits with 1 where something differs.

The files are read as they are, not through :mod:`clsnf.results`, so that a change there is seen
too. Entries without a value (null, an empty list) count as missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

# Times, what depends on who computed an artifact, and what describes the machine or the version.
_IGNORED = {
    "at",
    "clsnf",
    "detector",
    "examples",
    "folder",
    "format",
    "images_per_second",
    "latency",
    "machine",
    "origin",
    "traceback",
    "versions",
    "waited_seconds",
    "winner",
}
_IGNORED_PREFIXES = ("seconds", "wall_seconds", "stages_", "stream", "artifacts_")
# Old names of settings' values -> new ones.
_SAME_VALUES = {"trunk": "wsd"}
_PATH_PARTS = 3  # of an image's path, from its end: data sets may have moved


def comparable(value: Any, name: str = "") -> Any:
    """The value without what may differ."""
    if isinstance(value, dict):
        entries = {key: comparable(found, key) for key, found in value.items() if _counts(key)}
        return {key: found for key, found in entries.items() if found not in (None, [], {})}
    if isinstance(value, (list, tuple)):
        return [comparable(entry, name) for entry in value]
    if isinstance(value, str) and name == "path":
        return "/".join(Path(value).parts[-_PATH_PARTS:])
    if isinstance(value, str) and name == "schedule":
        return _SAME_VALUES.get(value, value)
    return value


def _counts(key: str) -> bool:
    return key not in _IGNORED and not key.startswith(_IGNORED_PREFIXES)


def differences(first: Any, second: Any, place: str) -> Iterator[str]:
    """A line for each value that differs."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in dict.fromkeys((*first, *second)):
            yield from differences(first.get(key), second.get(key), f"{place}: {key}")
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for number, (a, b) in enumerate(zip(first, second, strict=True)):
            yield from differences(a, b, f"{place}[{number}]")
    elif first != second:
        yield f"{place}: {_short(first)} | {_short(second)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read(path: Path) -> Any:
    """A file's content: a JSON file, the rows of a table, or bytes."""
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return path.read_bytes()


# Files below a study's folder.
_FILES = (
    "summary.json",
    "trials.parquet",
    "finished/*.json",
    "evidence/*/facts.json",
    "evidence/*/images.parquet",
    "evidence/*/regions.parquet",
    "evidence/*/pictures/*",
    "examples/*.png",
    "winners/*/*.safetensors",
    "front/*/*/*.safetensors",
)


def compare(first: Path, second: Path) -> Iterator[str]:
    """A line for each file that one study lacks, and for each value that differs."""
    for pattern in _FILES:
        files = [
            {path.relative_to(study).as_posix() for path in study.glob(pattern)}
            for study in (first, second)
        ]
        yield from (f"{name}: only in {first}" for name in sorted(files[0] - files[1]))
        yield from (f"{name}: only in {second}" for name in sorted(files[1] - files[0]))
        for name in sorted(files[0] & files[1]):
            a, b = (comparable(_ordered(name, read(study / name))) for study in (first, second))
            if isinstance(a, bytes):
                if a != b:
                    yield f"{name}: other bytes"
            else:
                yield from differences(a, b, name)


def _ordered(name: str, content: Any) -> Any:
    """Trials in one order, and rests_on left out: its hash may have changed its recipe."""
    if name == "trials.parquet":
        return {f"{row['category']} {row['trial']}": row for row in content}
    return content.get("result", content) if name.startswith("finished/") else content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path, help="a study's folder")
    parser.add_argument("second", type=Path, help="another study's folder")
    given = parser.parse_args()
    for study in (given.first, given.second):
        if not (study / "summary.json").is_file():
            parser.error(f"{study} holds no finished study (no summary.json in it)")
    found = list(compare(given.first, given.second))
    print("\n".join(found) if found else "the same: every metric, setting, score and tensor")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
