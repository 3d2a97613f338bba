"""Freeing the disk of a study that ended: which artifacts go, and which stay.

All of ``stages/`` can be computed anew, bit for bit. Winners, fronts and evidence are whole in
folders of their own and need none of it; only going on with the study does.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clsnf.core.errors import OutputError
from clsnf.core.files import locked
from clsnf.results import StudySummary, read_result

# Kinds of artifacts that stay: score maps and latencies, because a resumed study compares all of
# its trials again, and finetuned networks, from which the flows of a new trial are soon trained.
_KEPT = ("classifier_maps", "density_maps", "finetuned", "latency")


@dataclass(frozen=True)
class Cleaned:
    """What was deleted, or would be.

    Attributes:
        freed: kind of artifact -> bytes; ``drafts`` is what killed processes left half written.
        kept: the same of what stays.
    """

    freed: dict[str, int]
    kept: dict[str, int]


def clean_study(out: Path, all_stages: bool = False, dry_run: bool = False) -> Cleaned:
    """Delete artifacts that a study which ended can do without.

    Of a study that has not ended only drafts go: its next trials need the rest.

    Args:
        out: the study's folder.
        all_stages: delete every artifact, also of a study that has not ended.
        dry_run: delete nothing.

    Raises:
        OutputError: the folder holds no study, the study runs, or a file can't be deleted.
    """
    if not (out / "study.json").is_file():
        raise OutputError(f"{out} holds no study: give the folder that a study wrote.")
    try:
        with locked(out, f"{out} is in use by a study right now: clean it when that has ended."):
            return _clean(out, all_stages, dry_run)
    except OSError as error:
        raise OutputError(f"{out} can't be cleaned ({error}): see to its permissions.") from error


def _clean(out: Path, all_stages: bool, dry_run: bool) -> Cleaned:
    ended = _has_ended(out)
    freed: dict[str, int] = {}
    kept: dict[str, int] = {}
    for kind, path in _entries(out / "stages"):
        goes = kind == "drafts" or all_stages or (ended and kind not in _KEPT)
        sizes = freed if goes else kept
        sizes[kind] = sizes.get(kind, 0) + _size(path)
        if goes and not dry_run:
            _delete(path)
    return Cleaned(freed, kept)


def _has_ended(out: Path) -> bool:
    try:
        read_result(StudySummary, out / "summary.json")
    except OutputError:
        return False
    return True


def _entries(stages: Path) -> Iterator[tuple[str, Path]]:
    """Each artifact and each draft, with its kind."""
    for kind in sorted(path for path in stages.glob("*") if path.is_dir()):
        if kind.name == ".leases":  # small, and no process holds one now
            continue
        for path in sorted(kind.iterdir()):
            yield "drafts" if path.name.startswith(".") else kind.name, path


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
