"""Training defects as people can look at them: rows of a contact sheet, one for each source that
defects are filled from.

Unusual: the defects come from :class:`clsnf.synthesis.training_defects.DefectMaker` itself, on the
    network's canvas. Called by ``clsnf data show``.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from clsnf.core.config import DefectSettings
from clsnf.data.images import LoadedImages
from clsnf.synthesis.contact_sheet import Band
from clsnf.synthesis.object_mask import object_masks
from clsnf.synthesis.training_defects import DefectMaker, sample_key

_SAMPLES = 24  # defects made for a row: the object mask leaves some of them empty


def training_rows(
    fit: LoadedImages,
    textures: Tensor,
    settings: DefectSettings,
    mask_mode: str,
    seed: int,
    columns: int = 6,
) -> list[Band]:
    """The object mask on some normals (unless ``polarity`` is off), then defects from textures,
    then from other normals.

    ``fit``: N normal images. ``textures``: uint8 (T, 3, H, W). A row whose source the settings'
        ``texture_share`` rules out is left
    out. Raises DataError as the maker does.
    """
    chosen = torch.linspace(0, len(fit.images) - 1, min(_SAMPLES, len(fit.images))).round().long()
    chosen = chosen.repeat(-(-_SAMPLES // len(chosen)))[:_SAMPLES]
    images = fit.images[chosen]
    masks = None if mask_mode == "off" else object_masks(images, mask_mode)
    bands: list[Band] = []
    if masks is not None:
        some = [i for i in range(len(images)) if masks[i].any()][:columns]
        pictures = [(_picture(images[i]), masks[i].numpy()) for i in some]
        bands.append((f"object mask ({mask_mode} product): training defects lie inside", pictures))
    if fit.valid is not None:
        masks = fit.valid[chosen] if masks is None else masks & fit.valid[chosen]
    share = settings.texture_share if len(fit.images) > 1 else 1.0
    sources = [("from textures", 1.0, share), ("from other normal images", 0.0, 1 - share)]
    for number, (name, only, portion) in enumerate(sources):
        if portion == 0:
            continue
        maker = DefectMaker(dataclasses.replace(settings, texture_share=only), textures, fit.images)
        batch = maker.make(
            images, masks, torch.from_numpy(sample_key(seed, 0, np.arange(_SAMPLES), number))
        )
        some = [i for i in range(_SAMPLES) if batch.regions[i].any()]
        caption = (
            f"training defect {name} ({portion:.0%} of the defects); {_SAMPLES - len(some)} of "
            f"{_SAMPLES} came out empty"
        )
        pictures = [
            (_picture((batch.images[i] * 255).round().to(torch.uint8)), batch.regions[i].numpy())
            for i in some
        ]
        bands.append((caption, pictures[:columns]))
    return bands


def _picture(image: Tensor) -> np.ndarray:
    """(3, H, W) uint8 to (H, W, 3)."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())
