"""From a category's table to a pipeline that is ready to compute: images placed, backbone loaded, product mask decided.

Called by :class:`clsnf.detector.Detector` and by every trial of a study.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from clsnf.config import DetectorSettings, to_dict
from clsnf.data.foreground import chosen_polarity
from clsnf.data.images import load_images
from clsnf.data.textures import draw_textures, load_textures
from clsnf.device import choose_device
from clsnf.errors import DataError
from clsnf.fingerprint import content_key, set_key
from clsnf.model.backbone import load_backbone
from clsnf.progress import Progress, silent
from clsnf.training.pipeline import CategoryPipeline, PlacedImages
from clsnf.training.stages import StageStore

# More textures than this only cost memory: each is cropped, turned and recoloured anew for every defect.
MAX_TEXTURES = 256


@dataclass(frozen=True)
class Prepared:
    """A category, ready to train on.

    Attributes:
        pipeline: its stages.
        polarity: ``off``, ``dark`` or ``bright``.
        polarity_reason: one line for people.
    """

    pipeline: CategoryPipeline
    polarity: str
    polarity_reason: str


def rows_of(table: pa.Table, split: str) -> pa.Table:
    """The rows of one split."""
    return table.filter(pc.equal(table["split"], split))


def place_rows(table: pa.Table, settings: DetectorSettings) -> PlacedImages:
    """Read the images of a table's rows, in their order, onto the network's canvas."""
    loaded = load_images(table["path"].to_pylist(), settings.image)
    key = content_key({"images": table["sha256"].to_pylist(), "image": to_dict(settings.image)})
    return PlacedImages(loaded.images, loaded.valid, key)


def check_ingredients(settings: DetectorSettings, textures: str | Path | None, device: str) -> None:
    """Load what training needs besides the product's images, so that what is wrong with it is said before the long work.

    Raises:
        DataError, ImageError, SettingsError, WeightsError: as :func:`prepare` would later.
    """
    choose_device(device)
    load_backbone(settings.backbone, settings.image.size)
    if textures is not None:
        load_textures(Path(textures), settings.image.size, MAX_TEXTURES)


def texture_bank(settings: DetectorSettings, textures: str | Path | None) -> Tensor:
    """The textures that defects are made from, uint8 (T, 3, H, W): of a folder, or drawn by code. Raises DataError, ImageError."""
    if textures is None:
        return draw_textures(64, settings.image.size, settings.seed)
    return load_textures(Path(textures), settings.image.size, MAX_TEXTURES)


def prepare(
    table: pa.Table,
    settings: DetectorSettings,
    textures: str | Path | None,
    store: StageStore,
    device: torch.device,
    progress: Progress = silent,
) -> Prepared:
    """Load what training needs.

    Args:
        table: one category; rows of split ``fit`` are trained on, others are left alone.
        settings: all settings.
        textures: a folder of pictures to make defects from; None for textures drawn by code.
        store: where stages lie.
        device: where to compute.
        progress: told about long work.

    Raises:
        DataError, ImageError, SettingsError, WeightsError: see the functions called.
    """
    fit_rows = rows_of(table, "fit")
    if len(fit_rows) < 2:
        raise DataError(f"There are {len(fit_rows)} normal images to train on: at least 2 are needed, 50 or more are advised.")
    backbone, _ = load_backbone(settings.backbone, settings.image.size)
    fit = place_fit_rows(table, settings)
    decision = chosen_polarity(fit.images, settings.defects.object_mask)
    bank = texture_bank(settings, textures)
    textures_key = hashlib.sha256(bank.numpy().data).hexdigest()
    pipeline = CategoryPipeline(settings, backbone, fit, decision.kind, bank, textures_key, store, device, progress)
    return Prepared(pipeline, decision.kind, decision.reason)


def place_fit_rows(table: pa.Table, settings: DetectorSettings) -> PlacedImages:
    """The images to train on, sorted by content: neither names nor the order of folders decide what is trained."""
    return place_rows(rows_of(table, "fit").sort_by("sha256"), settings)


def data_fingerprint(table: pa.Table) -> str:
    """Hash of the contents of a table's images, whatever their names and order."""
    return set_key(table["sha256"].to_pylist())
