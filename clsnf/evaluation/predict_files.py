"""Scoring files for people: which files, one record each, pictures of the maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clsnf.core.errors import DataError, ImageError, OutputError
from clsnf.core.files import check_writable
from clsnf.data.checks import MAX_BAD
from clsnf.data.images import IMAGE_SUFFIXES, read_image, write_image
from clsnf.data.layouts import natural_key
from clsnf.detector import Detector
from clsnf.evaluation.pictures import heat_map, overlay
from clsnf.streams.choice import StreamChoice


def picture_files(given: Sequence[Path]) -> list[Path]:
    """The files themselves, and the pictures in given folders (not in folders below them), in
    natural order.

    Raises:
        ImageError: a path does not exist.
        DataError: a folder holds no pictures.
    """
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            found = [
                p
                for p in path.iterdir()
                if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
            ]
            if not found:
                raise DataError(
                    f"{path} holds no pictures: give files, or a folder with pictures right in it."
                )
            files += sorted(found, key=lambda p: natural_key(p.name))
        elif path.is_file():
            files.append(path)
        else:
            raise ImageError(f"There is no picture {path}.")
    return files


def predict_files(
    detector: Detector,
    files: Sequence[Path],
    out: Path | None = None,
    *,
    max_bad: float = MAX_BAD,
    stream: StreamChoice | None = None,
) -> Iterator[dict[str, Any]]:
    """Score files one after the other, after all were read once: many damaged ones must not leave
    half of the answers.

    Memory: a few batches, however many files there are.

    Args:
        detector: what to ask.
        files: pictures.
        out: a folder for ``<name>_map.png`` and ``<name>_overlay.png``; None for none.
        max_bad: share of the files that may be unreadable.
        stream: who scores them, see :meth:`clsnf.detector.Detector.predict`.

    Yields:
        First for every unreadable file ``path`` and ``error``; then for every other one
        ``path``, ``score``, ``threshold``, ``verdict`` (``good`` or ``defect``) and ``p_value``
        (the share of validation normals that score at least as high, counted with the picture
        itself: split-conformal), and ``pictures`` where `out` is given.

    Raises:
        ImageError: more files than `max_bad` allows can't be read.
        OutputError: two files would write the same pictures, or `out` can't be written.
    """
    if out is not None:
        check_writable(out, folder=True)
    with ThreadPoolExecutor() as pool:
        errors = list(pool.map(_error_of, files))
    bad = [error for error in errors if error is not None]
    if len(bad) > max_bad * len(files):
        share = (
            f" ({len(bad)} of {len(files)} pictures can't be read, more than --max-bad {max_bad:g})"
        )
        raise ImageError(str(bad[0]) + (share if len(bad) > 1 else ""))
    yield from (
        {"path": str(f), "error": str(error)}
        for f, error in zip(files, errors, strict=True)
        if error is not None
    )
    files = [f for f, error in zip(files, errors, strict=True) if error is None]
    names = _names(files) if out is not None else []
    normals = np.asarray(detector.provenance.validation_scores)
    for index, (score_map, score, verdict) in enumerate(
        detector.predict_each(files, stream=stream)
    ):
        record: dict[str, Any] = {
            "path": str(files[index]),
            "score": score,
            "threshold": detector.threshold.value,
            "verdict": "defect" if verdict else "good",
            "p_value": (int((normals >= score).sum()) + 1) / (len(normals) + 1),
        }
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            pictures = [out / f"{names[index]}_map.png", out / f"{names[index]}_overlay.png"]
            write_image(
                pictures[0], heat_map(score_map, detector.shown_from, 1.2 * detector.map_threshold)
            )
            write_image(
                pictures[1],
                overlay(
                    read_image(files[index]), score_map, detector.shown_from, detector.map_threshold
                ),
            )
            record["pictures"] = [str(p) for p in pictures]
        yield record


def _error_of(file: Path) -> ImageError | None:
    try:
        read_image(file)
    except ImageError as error:
        return error
    return None


def _names(files: Sequence[Path]) -> list[str]:
    """A name for each file's pictures: its own, with the folder's before it where two files share
    theirs.
    """
    stems = Counter(f.stem for f in files)
    names = [f"{f.absolute().parent.name}_{f.stem}" if stems[f.stem] > 1 else f.stem for f in files]
    repeated = next((name for name, times in Counter(names).items() if times > 1), None)
    if repeated is not None:
        raise OutputError(
            f"Several pictures would be written as {repeated}_map.png: give them in separate "
            "calls with their own --out."
        )
    return names
