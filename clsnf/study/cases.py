"""The cases of a category that a person wants to see, and its defects one by one.

Called by :mod:`clsnf.study.evidence`, once the winner is fixed. Pictures are stored small, as WebP,
one file for each layer: a report of many products has room for all of them, and its page lays them
out to the width of the screen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from torch import Tensor

from clsnf.data.images import Placement, read_image, read_mask, restore_map
from clsnf.detector import Detector
from clsnf.evaluation.pictures import Image, heat_map, outline, overlay
from clsnf.results import Case, ImageEvidence, RegionEvidence

MAX_CASES = 6  # of each kind
_MAX_SIDE = 224  # pixels of a picture's longer side
_QUALITY = 72
_GREEN = (0, 220, 0)


@dataclass(frozen=True)
class ScoredImages:
    """Images with the winner's answers.

    Attributes:
        rows: what the evidence keeps of each image.
        records: the same images' rows in the images' table.
        maps: ``density``, ``classifier`` and ``fused``: score maps (N, H, W) at the network's size.
    """

    rows: Sequence[ImageEvidence]
    records: Sequence[dict[str, Any]]
    maps: Mapping[str, Tensor]


def choose_cases(
    rows: Sequence[ImageEvidence], threshold: float, most: int = MAX_CASES
) -> dict[str, list[int]]:
    """Choose the worst misses, the worst false alarms, and the right answers nearest the threshold.

    Args:
        rows: the images.
        threshold: of the scores.
        most: how many of each kind.

    Returns:
        Kind -> indices of `rows`. ``miss``: defects below the threshold, the lowest score first;
        ``false_alarm``: normals above it, the highest score first; ``borderline``: right answers,
        the nearest first. No image has two kinds.
    """
    misses = [i for i, row in enumerate(rows) if row.label and not row.verdict]
    alarms = [i for i, row in enumerate(rows) if not row.label and row.verdict]
    right = sorted(set(range(len(rows))) - {*misses, *alarms})
    return {
        "miss": sorted(misses, key=lambda i: rows[i].score)[:most],
        "false_alarm": sorted(alarms, key=lambda i: -rows[i].score)[:most],
        "borderline": sorted(right, key=lambda i: abs(rows[i].score - threshold))[:most],
    }


def strangest_normals(
    rows: Sequence[ImageEvidence], most: int = MAX_CASES // 2
) -> dict[str, list[int]]:
    """Indices of the normals with the highest scores, under ``strange_normal``.

    A person should confirm that these images are good.
    """
    normals = [i for i, row in enumerate(rows) if not row.label]
    return {"strange_normal": sorted(normals, key=lambda i: -rows[i].score)[:most]}


def draw_cases(
    chosen: Mapping[str, list[int]],
    images: ScoredImages,
    ranges: Mapping[str, tuple[float, float]],
    detector: Detector,
    folder: Path,
) -> list[Case]:
    """Draw the chosen cases into a folder, a file for each layer.

    Args:
        chosen: kind of case -> indices of the images.
        images: to choose from.
        ranges: layer -> the map values that are drawn darkest and brightest.
        detector: whose threshold and preprocessing.
        folder: for the files.
    """
    cases = []
    for kind, indices in chosen.items():
        for number, index in enumerate(indices):
            files = {}
            for layer, picture in _draw_layers(images, index, ranges, detector).items():
                files[layer] = f"{kind}-{number}-{layer}.webp"
                PillowImage.fromarray(picture).save(
                    folder / files[layer], quality=_QUALITY, method=4
                )
            row = images.rows[index]
            cases.append(Case(kind, row.path, row.defect_type, row.label, row.score, files))
    return cases


def _draw_layers(
    images: ScoredImages,
    index: int,
    ranges: Mapping[str, tuple[float, float]],
    detector: Detector,
) -> dict[str, Image]:
    """An image's pictures: input, truth where there is a mask, and the three maps."""
    record = images.records[index]
    image = read_image(record["path"])
    small = _shrink(image)
    drawn = {"input": small}
    if record["mask_path"] is not None:
        mask = _shrink_mask(read_mask(record["mask_path"]), small)
        drawn["truth"] = outline(small, mask, _GREEN)
    placement = Placement.of(image.shape[:2], detector.settings.image)
    maps = {name: restore_map(values[index], placement) for name, values in images.maps.items()}
    for name in ("density", "classifier"):
        drawn[name] = _shrink(heat_map(maps[name], *ranges[name]))
    size = small.shape[1::-1]
    fused = cv2.resize(maps["fused"], size, interpolation=cv2.INTER_AREA).astype(np.float32)
    drawn["fused"] = overlay(small, fused, ranges["fused"][0], detector.map_threshold)
    return drawn


def _shrink(picture: Image) -> Image:
    h, w = picture.shape[:2]
    scale = min(1.0, _MAX_SIDE / max(h, w))
    size = max(1, round(w * scale)), max(1, round(h * scale))
    return np.ascontiguousarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def _shrink_mask(mask: NDArray[np.bool_], small: Image) -> NDArray[np.bool_]:
    """The mask at a picture's size; a defect of one pixel stays one."""
    share = cv2.resize(mask.astype(np.float32), small.shape[1::-1], interpolation=cv2.INTER_AREA)
    result: NDArray[np.bool_] = share > min(0.5, float(share.max()) * 0.99)
    return result


def measure_regions(images: ScoredImages, detector: Detector) -> list[RegionEvidence]:
    """Measure every connected region of the defects' masks, at the images' own size."""
    found: list[RegionEvidence] = []
    fused = images.maps["fused"].numpy()
    for row, record, score_map in zip(images.rows, images.records, fused, strict=True):
        if record["mask_path"] is not None:
            found += _regions_of(row, record, score_map, detector)
    return found


def _regions_of(
    row: ImageEvidence,
    record: Mapping[str, Any],
    score_map: NDArray[np.float32],
    detector: Detector,
) -> Iterator[RegionEvidence]:
    mask, image = read_mask(record["mask_path"]), read_image(record["path"])
    placement = Placement.of(mask.shape, detector.settings.image)
    above = restore_map(score_map, placement) > detector.map_threshold
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    count, components = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    for number in range(1, count):
        region = components == number
        pixels = int(region.sum())
        yield RegionEvidence(
            path=row.path,
            defect_type=row.defect_type,
            pixels=pixels,
            share=pixels / region.size,
            contrast=_contrast(grey, region, mask),
            overlap=float(above[region].mean()),
            found=bool(above[region].any()),
            rejected=row.verdict,
        )


def _contrast(
    grey: NDArray[np.float32], region: NDArray[np.bool_], mask: NDArray[np.bool_]
) -> float | None:
    """|mean inside - mean of a ring around| / 255; None without a ring.

    The ring is a third as wide as the region, and leaves out other defects.
    """
    width = max(3, round(np.sqrt(region.sum()) / 3))
    rows, columns = region.nonzero()
    box = (
        slice(max(0, rows.min() - width), rows.max() + width + 1),
        slice(max(0, columns.min() - width), columns.max() + width + 1),
    )
    kernel = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    grown = cv2.dilate(region[box].astype(np.uint8), kernel) > 0
    ring = grown & ~mask[box]
    if not ring.any():
        return None
    return float(abs(grey[box][region[box]].mean() - grey[box][ring].mean()) / 255)
