"""The cases of a category that a person wants to see, and its defects one by one: chosen and
measured once the winner is fixed.

Called by :mod:`clsnf.study.evidence`. Unusual: pictures are stored small, as WebP, a layer each: a
report of many products has room for all of them, and lays them out as wide as the screen is.
"""

from __future__ import annotations

from collections.abc import Mapping
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

MOST_CASES = 6  # of each kind
_SIDE = 224  # pixels of a picture's longer side
_QUALITY = 72
_TRUTH = (0, 220, 0)


def chosen_cases(
    rows: list[dict[str, Any]], threshold: float, most: int = MOST_CASES
) -> dict[str, list[int]]:
    """Places in `rows` of the worst misses, the worst false alarms, and of the right answers
    nearest to the threshold.

    Args:
        rows: ``label``, ``score`` and ``verdict`` of each image.
        threshold: of the scores.
        most: of each kind.

    Returns:
        ``miss``: defects that passed, the lowest score first; ``false_alarm``: normals that did
            not, the highest first;
        ``borderline``: right answers, the nearest first. No image is in two of them.
    """
    misses = [i for i, row in enumerate(rows) if row["label"] and not row["verdict"]]
    alarms = [i for i, row in enumerate(rows) if not row["label"] and row["verdict"]]
    right = sorted(set(range(len(rows))) - {*misses, *alarms})
    return {
        "miss": sorted(misses, key=lambda i: rows[i]["score"])[:most],
        "false_alarm": sorted(alarms, key=lambda i: -rows[i]["score"])[:most],
        "borderline": sorted(right, key=lambda i: abs(rows[i]["score"] - threshold))[:most],
    }


def strangest_normals(
    rows: list[dict[str, Any]], most: int = MOST_CASES // 2
) -> dict[str, list[int]]:
    """Places in `rows` of the normals with the highest scores, under ``strange_normal``: a person
    should agree that they are good.
    """
    normals = [i for i, row in enumerate(rows) if not row["label"]]
    return {"strange_normal": sorted(normals, key=lambda i: -rows[i]["score"])[:most]}


def pictures_of(
    chosen: Mapping[str, list[int]],
    rows: list[dict[str, Any]],
    records: list[dict[str, Any]],
    layers: Mapping[str, Tensor],
    limits: Mapping[str, tuple[float, float]],
    detector: Detector,
    folder: Path,
) -> list[dict[str, Any]]:
    """Draw the chosen cases into a folder.

    Args:
        chosen: kind of case -> places in `rows`.
        rows: scores and verdicts of the images.
        records: the same images' rows in the data's table.
        layers: ``density``, ``classifier``, ``fused``: maps (N, H, W) on the network's canvas.
        limits: of each layer, the values shown darkest and brightest.
        detector: whose threshold and preprocessing.
        folder: for the files.

    Returns:
        One record a case: ``kind``, ``path``, ``defect_type``, ``label``, ``score``, ``files``
        (layer -> name of its file).
    """
    cases = []
    for kind, places in chosen.items():
        for number, place in enumerate(places):
            row, record = rows[place], records[place]
            image = read_image(record["path"])
            placement = Placement.of(image.shape[:2], detector.settings.image)
            small = _fitted(image)
            drawn = {"input": small}
            if record["mask_path"] is not None:
                drawn["truth"] = outline(
                    small, _fitted_mask(read_mask(record["mask_path"]), small), _TRUTH
                )
            maps = {name: restore_map(values[place], placement) for name, values in layers.items()}
            for name in ("density", "classifier"):
                drawn[name] = _fitted(heat_map(maps[name], *limits[name]))
            fused = cv2.resize(
                maps["fused"], small.shape[1::-1], interpolation=cv2.INTER_AREA
            ).astype(np.float32)
            drawn["fused"] = overlay(small, fused, limits["fused"][0], detector.map_threshold)
            files = {}
            for layer, picture in drawn.items():
                files[layer] = f"{kind}-{number}-{layer}.webp"
                PillowImage.fromarray(picture).save(
                    folder / files[layer], quality=_QUALITY, method=4
                )
            cases.append(
                {
                    "kind": kind,
                    **{k: row[k] for k in ("path", "defect_type", "label", "score")},
                    "files": files,
                }
            )
    return cases


def _fitted(picture: Image) -> Image:
    h, w = picture.shape[:2]
    scale = min(1.0, _SIDE / max(h, w))
    size = max(1, round(w * scale)), max(1, round(h * scale))
    return np.ascontiguousarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def _fitted_mask(mask: NDArray[np.bool_], small: Image) -> NDArray[np.bool_]:
    """The mask at a picture's size; a defect of one pixel stays one."""
    share = cv2.resize(mask.astype(np.float32), small.shape[1::-1], interpolation=cv2.INTER_AREA)
    result: NDArray[np.bool_] = share > min(0.5, float(share.max()) * 0.99)
    return result


def regions_of(
    rows: list[dict[str, Any]],
    records: list[dict[str, Any]],
    maps: NDArray[np.float32],
    detector: Detector,
) -> list[dict[str, Any]]:
    """Every connected region of the defects' masks, at the images' own size.

    Args:
        rows: scores and verdicts of the images.
        records: the same images' rows in the data's table.
        maps: (N, H, W) fused maps on the network's canvas.
        detector: whose threshold and preprocessing.

    Returns:
        One record a region: ``path``, ``defect_type``, ``pixels``, ``share`` (of the image),
        ``contrast`` (how far the mean of its grey values lies from that of a ring around it, as a
        share of the full range), ``overlap`` (share of its pixels above the line that pictures
        draw), ``found`` (any pixel above it) and ``rejected`` (the image's verdict).
    """
    found = []
    for row, record, score_map in zip(rows, records, maps, strict=True):
        if record["mask_path"] is None:
            continue
        mask, image = read_mask(record["mask_path"]), read_image(record["path"])
        above = (
            restore_map(score_map, Placement.of(mask.shape, detector.settings.image))
            > detector.map_threshold
        )
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
        count, components = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        for number in range(1, count):
            region = components == number
            pixels = int(region.sum())
            found.append(
                {
                    "path": row["path"],
                    "defect_type": row["defect_type"],
                    "pixels": pixels,
                    "share": pixels / region.size,
                    "contrast": _contrast(grey, region, mask),
                    "overlap": float(above[region].mean()),
                    "found": bool(above[region].any()),
                    "rejected": bool(row["verdict"]),
                }
            )
    return found


def _contrast(
    grey: NDArray[np.float32], region: NDArray[np.bool_], mask: NDArray[np.bool_]
) -> float | None:
    """|mean inside - mean of a ring around| / 255; the ring is as wide as a third of the region,
    and leaves out other defects.
    """
    width = max(3, round(np.sqrt(region.sum()) / 3))
    rows, columns = region.nonzero()
    box = (
        slice(max(0, rows.min() - width), rows.max() + width + 1),
        slice(max(0, columns.min() - width), columns.max() + width + 1),
    )
    grown = (
        cv2.dilate(region[box].astype(np.uint8), np.ones((2 * width + 1, 2 * width + 1), np.uint8))
        > 0
    )
    ring = grown & ~mask[box]
    if not ring.any():
        return None
    return float(abs(grey[box][region[box]].mean() - grey[box][ring].mean()) / 255)
