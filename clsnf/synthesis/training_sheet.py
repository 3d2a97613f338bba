"""Training defects for people to look at: rows of a contact sheet, one for each kind of source.

The defects come from :class:`clsnf.synthesis.training_defects.DefectMaker` itself, at the size of
the network's input. This module is not a part of :mod:`clsnf.synthesis.contact_sheet`, because that
one serves validation sets, which share nothing with the generator of training defects. Called by
``clsnf data show``.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from clsnf.core.config import DefectSettings
from clsnf.data.images import LoadedImages
from clsnf.synthesis.contact_sheet import Cell, Row
from clsnf.synthesis.object_mask import object_masks
from clsnf.synthesis.training_defects import DefectMaker, sample_key

_SAMPLES = 24  # defects made for a row: the object mask leaves some of them empty
_COLUMNS = 6


def training_rows(
    fit: LoadedImages, textures: Tensor, settings: DefectSettings, mask_mode: str, seed: int
) -> list[Row]:
    """The object mask on some normals, then defects from textures, then from other normals.

    There is no row for the mask if ``mask_mode`` is "off", and none for a source that the settings'
    ``texture_share`` rules out.

    Args:
        fit: N normal images.
        textures: uint8 (T, 3, H, W).

    Raises:
        DataError: as :class:`~clsnf.synthesis.training_defects.DefectMaker` does.
    """
    chosen = torch.linspace(0, len(fit.images) - 1, min(_SAMPLES, len(fit.images))).round().long()
    chosen = chosen.repeat(-(-_SAMPLES // len(chosen)))[:_SAMPLES]
    images = fit.images[chosen]
    masks = None if mask_mode == "off" else object_masks(images, mask_mode)
    rows: list[Row] = []
    if masks is not None:
        some = [i for i in range(len(images)) if masks[i].any()][:_COLUMNS]
        cells = [Cell(_picture(images[i]), masks[i].numpy()) for i in some]
        rows.append(Row(f"object mask ({mask_mode} product): training defects lie inside", cells))
    if fit.valid is not None:
        masks = fit.valid[chosen] if masks is None else masks & fit.valid[chosen]
    texture_share = settings.texture_share if len(fit.images) > 1 else 1.0
    sources = [
        ("from textures", 1.0, texture_share),
        ("from other normal images", 0.0, 1 - texture_share),
    ]
    for number, (name, only, share) in enumerate(sources):
        if share == 0:
            continue
        maker = DefectMaker(dataclasses.replace(settings, texture_share=only), textures, fit.images)
        keys = torch.from_numpy(sample_key(seed, 0, np.arange(_SAMPLES), number))
        batch = maker.make(images, masks, keys)
        some = [i for i in range(_SAMPLES) if batch.regions[i].any()]
        caption = (
            f"training defect {name} ({share:.0%} of the defects); {_SAMPLES - len(some)} of "
            f"{_SAMPLES} came out empty"
        )
        pictures = (batch.images * 255).round().to(torch.uint8)
        cells = [Cell(_picture(pictures[i]), batch.regions[i].numpy()) for i in some[:_COLUMNS]]
        rows.append(Row(caption, cells))
    return rows


def _picture(image: Tensor) -> np.ndarray:
    """uint8 (3, H, W) -> (H, W, 3)."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())
