"""From a category's table to a pipeline: images placed, backbone loaded, object mask decided.

:class:`clsnf.detector.Detector` and every trial of a study call it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from clsnf.core.config import DetectorSettings, key_content
from clsnf.core.device import choose_device
from clsnf.core.errors import DataError
from clsnf.core.hashing import content_key, set_key
from clsnf.core.progress import Progress, silent
from clsnf.data.images import load_images
from clsnf.model.backbone import Backbone, load_backbone
from clsnf.model.resolve import resolved
from clsnf.streams.choice import StreamChoice, choose_stream, open_stream
from clsnf.synthesis.object_mask import MaskDecision, choose_mask_mode, decision_indices
from clsnf.synthesis.textures import draw_textures, load_textures
from clsnf.training.artifacts import ArtifactStore
from clsnf.training.pipeline import (
    CategoryPipeline,
    Images,
    PlacedImages,
    StreamedImages,
    TrainingData,
)

# More textures only cost memory: each is cropped, rotated and recoloured anew for every defect.
MAX_TEXTURES = 256


@dataclass(frozen=True)
class Prepared:
    """A category that is ready to train on.

    Attributes:
        pipeline: computes and finds its artifacts.
        mask_mode: where defects may lie: ``off``, ``dark`` or ``bright`` products.
        mask_reason: why, in one line for people.
    """

    pipeline: CategoryPipeline
    mask_mode: str
    mask_reason: str


def rows_of(table: pa.Table, split: str) -> pa.Table:
    """The rows of one split."""
    return table.filter(pc.equal(table["split"], split))


def place_rows(table: pa.Table, settings: DetectorSettings) -> PlacedImages:
    """Read the images of a table's rows, in their order, onto the network's canvas."""
    loaded = load_images(table["path"].to_pylist(), settings.image)
    return PlacedImages(loaded.images, loaded.valid, _images_key(table, settings))


def _images_key(table: pa.Table, settings: DetectorSettings) -> str:
    return content_key(
        {"images": table["sha256"].to_pylist(), "image": key_content(settings.image)}
    )


def check_ingredients(
    settings: DetectorSettings, textures: str | Path | None, device: str
) -> Backbone:
    """Load what training needs besides the product's images: errors come before the long work.

    Returns:
        The backbone.

    Raises:
        DataError, ImageError, SettingsError, WeightsError: as :func:`prepare` would later.
    """
    choose_device(device)
    settings = resolved(settings)
    backbone, _ = load_backbone(settings.backbone, settings.image.size)
    if textures is not None:
        load_textures(Path(textures), settings.image.size, MAX_TEXTURES)
    return backbone


def texture_bank(settings: DetectorSettings, textures: str | Path | None) -> Tensor:
    """The textures that defects are made from, uint8 (T, 3, H, W).

    Args:
        settings: their size and seed count.
        textures: a folder of pictures; None for textures drawn by code.

    Raises:
        DataError, ImageError: the folder holds no pictures, or one can't be read.
    """
    if textures is None:
        return draw_textures(64, settings.image.size, settings.seed)
    return load_textures(Path(textures), settings.image.size, MAX_TEXTURES)


def prepare(
    table: pa.Table,
    settings: DetectorSettings,
    textures: str | Path | None,
    store: ArtifactStore,
    device: torch.device,
    progress: Progress = silent,
    stream: StreamChoice | None = None,
) -> Prepared:
    """Load what training needs.

    Args:
        table: one category. Training uses the rows of split ``fit``.
        settings: all settings; those of the pipeline are resolved.
        textures: a folder of pictures to make defects from; None for textures drawn by code.
        store: finds and keeps artifacts.
        device: where to compute.
        progress: called with the progress of long work.
        stream: how the images come to training. None: from memory where they fit into it, else
            this process decodes them.

    Raises:
        DataError, ImageError, SettingsError, WeightsError: see the functions called.
    """
    fit_rows = rows_of(table, "fit")
    if len(fit_rows) < 2:
        raise DataError(
            f"There are {len(fit_rows)} normal images to train on: at least 2 are needed, 50 or "
            "more are advised."
        )
    settings = resolved(settings)
    backbone, _ = load_backbone(settings.backbone, settings.image.size)
    fit = open_fit_rows(table, settings, stream)
    decision = fit_mask_mode(fit, settings)
    bank = texture_bank(settings, textures)
    textures_key = hashlib.sha256(bank.numpy().data).hexdigest()
    data = TrainingData(fit, decision.mode, bank, textures_key)
    pipeline = CategoryPipeline(settings, backbone, data, store, device, progress)
    return Prepared(pipeline, decision.mode, decision.reason)


def fit_rows_in_order(table: pa.Table) -> pa.Table:
    """The rows to train on, sorted by content, so that names and folders change no result."""
    return rows_of(table, "fit").sort_by("sha256")


def open_fit_rows(
    table: pa.Table, settings: DetectorSettings, stream: StreamChoice | None = None
) -> Images:
    """The images to train on, in memory or from a stream."""
    rows = fit_rows_in_order(table)
    choice = stream or choose_stream("local", [len(rows)], settings.image)
    if choice.kind == "memory":
        return place_rows(rows, settings)
    return StreamedImages(
        open_stream(choice, rows["path"].to_pylist(), settings.image), _images_key(rows, settings)
    )


def fit_mask_mode(fit: Images, settings: DetectorSettings) -> MaskDecision:
    """Where defects may lie on these images, decided from a sample of them."""
    return choose_mask_mode(
        fit.stream.take(decision_indices(len(fit.stream))), settings.defects.object_mask
    )


def data_fingerprint(table: pa.Table) -> str:
    """Hash of the contents of a table's images, whatever their names and order."""
    return set_key(table["sha256"].to_pylist())
