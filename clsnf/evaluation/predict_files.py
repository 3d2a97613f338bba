"""Scores of image files for ``clsnf predict``, and pictures of their maps."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from clsnf.core.errors import DataError, ImageError, OutputError
from clsnf.core.files import check_writable
from clsnf.data.checks import MAX_BAD
from clsnf.data.images import IMAGE_SUFFIXES, read_image, write_image
from clsnf.data.picture_folders import natural_key
from clsnf.detector import Detector
from clsnf.evaluation.pictures import heat_map, overlay
from clsnf.streams.choice import StreamChoice
from clsnf.training.calibrate import p_value


@dataclass(frozen=True)
class FilePrediction:
    """A detector's answer about one file.

    Attributes:
        path: of the file.
        score: of the image.
        threshold: scores above it are defects.
        verdict: ``good`` or ``defect``.
        p_value: of the score among the validation normals
            (:func:`clsnf.training.calibrate.p_value`).
        pictures: paths of the map's pictures; None where none were asked for.
    """

    path: str
    score: float
    threshold: float
    verdict: Literal["good", "defect"]
    p_value: float
    pictures: list[str] | None = None

    def to_plain(self) -> dict[str, Any]:
        """As plain JSON types."""
        content = dataclasses.asdict(self)
        if self.pictures is None:
            del content["pictures"]
        return content


@dataclass(frozen=True)
class UnreadableFile:
    """A file that could not be read, and why."""

    path: str
    error: str

    def to_plain(self) -> dict[str, Any]:
        """As plain JSON types."""
        return dataclasses.asdict(self)


def picture_files(given: Sequence[Path]) -> list[Path]:
    """The given files, and the pictures that lie directly in given folders, in natural order.

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
) -> Iterator[FilePrediction | UnreadableFile]:
    """Score files one after the other.

    Every file is read once before the first is scored: too many damaged files end the command
    before there are any answers. Memory holds a few batches, however many files there are.

    Args:
        detector: scores the files.
        files: pictures.
        out: a folder for ``<name>_map.png`` and ``<name>_overlay.png``; None for no pictures.
        max_bad: share of the files that may be unreadable.
        stream: what brings the images, see :meth:`clsnf.detector.Detector.predict`.

    Yields:
        First all unreadable files, then an answer for every other file, in the files' order.

    Raises:
        ImageError: more files than `max_bad` allows can't be read.
        OutputError: two files would write the same pictures, or `out` can't be written.
    """
    if out is not None:
        check_writable(out, folder=True)
    errors = _read_errors(files, max_bad)
    readable = []
    for file, error in zip(files, errors, strict=True):
        if error is None:
            readable.append(file)
        else:
            yield UnreadableFile(str(file), str(error))
    names = [] if out is None else _picture_names(readable)
    normal_scores = np.asarray(detector.provenance.validation_scores)
    answers = detector.predict_each(readable, stream=stream)
    for index, (score_map, score, is_defect) in enumerate(answers):
        file = readable[index]
        yield FilePrediction(
            path=str(file),
            score=score,
            threshold=detector.threshold.value,
            verdict="defect" if is_defect else "good",
            p_value=p_value(score, normal_scores),
            pictures=None
            if out is None
            else _write_pictures(detector, file, score_map, out, names[index]),
        )


def _read_errors(files: Sequence[Path], max_bad: float) -> list[ImageError | None]:
    """Why each file can't be read, None where it can.

    Raises:
        ImageError: more files than `max_bad` allows can't be read.
    """
    with ThreadPoolExecutor() as pool:
        errors = list(pool.map(_read_error, files))
    bad = [error for error in errors if error is not None]
    if len(bad) > max_bad * len(files):
        share = (
            f" ({len(bad)} of {len(files)} pictures can't be read, more than --max-bad {max_bad:g})"
        )
        raise ImageError(str(bad[0]) + (share if len(bad) > 1 else ""))
    return errors


def _read_error(file: Path) -> ImageError | None:
    try:
        read_image(file)
    except ImageError as error:
        return error
    return None


def _picture_names(files: Sequence[Path]) -> list[str]:
    """A name for the pictures of each file: the file's own, after its folder's where names repeat.

    Raises:
        OutputError: two files have the same name in folders of the same name.
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


def _write_pictures(
    detector: Detector, file: Path, score_map: NDArray[np.float32], out: Path, name: str
) -> list[str]:
    """Write the map of a file and its overlay into a folder; returns their paths."""
    low, limit = detector.shown_from, detector.map_threshold
    map_path, overlay_path = out / f"{name}_map.png", out / f"{name}_overlay.png"
    out.mkdir(parents=True, exist_ok=True)
    write_image(map_path, heat_map(score_map, low, 1.2 * limit))
    write_image(overlay_path, overlay(read_image(file), score_map, low, limit))
    return [str(map_path), str(overlay_path)]
