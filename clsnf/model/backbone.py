"""The shared feature extractor: any timm architecture that gives feature maps.

Padded convolutions pad by reflection, so that the border of an image does not look like a defect.
The module stays in evaluation mode: batch-norm statistics never change, and only the affine
parameters train. There is no silent fallback: without weights that fit, there is no backbone.

:mod:`clsnf.model.extractors` builds timm's feature extractor, and
:mod:`clsnf.model.backbone_weights` fills it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clsnf.core.config import BackboneSettings
from clsnf.core.errors import SettingsError, first_line
from clsnf.model.architectures import architecture_of
from clsnf.model.backbone_weights import fetch_pretrained, filled_extractor
from clsnf.model.extractors import build_extractor
from clsnf.model.layers import compute_attention_biases_anew, slice_strided_convolutions
from clsnf.model.padding import pad_by_reflection
from clsnf.model.weights_files import weights_file


@dataclass(frozen=True)
class BackboneInfo:
    """Shape facts of a backbone, enough to build the modules that sit on it."""

    architecture: str
    channels: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]  # (h, w) of each level's map at the image size in use


class Backbone(nn.Module):
    """A feature pyramid.

    Args:
        extractor: a module that maps (B, 3, H, W) to a list of feature maps, shallow to deep.
        architecture: its timm name.
        settings: resolved: mean, deviation and joining of levels count.
        canvas: (H, W) of its images.

    Raises:
        SettingsError: the network can't take images of that size.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        extractor: nn.Module,
        architecture: str,
        settings: BackboneSettings,
        canvas: tuple[int, int],
    ) -> None:
        super().__init__()
        assert settings.mean is not None, "resolve the settings first"
        assert settings.std is not None, "resolve the settings first"
        self.extractor = extractor
        self._channels_last = getattr(extractor, "output_fmt", None) == "NHWC"  # Swin and its kind
        self._joins = settings.join == "mean"
        self.register_buffer("mean", torch.tensor(settings.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(settings.std).view(1, 3, 1, 1), persistent=False)
        pad_by_reflection(extractor)
        slice_strided_convolutions(extractor)
        self.eval()
        try:
            with torch.no_grad():
                maps = self(torch.zeros(1, 3, *canvas))
        except (RuntimeError, AssertionError) as error:
            size = "x".join(map(str, canvas))
            raise SettingsError(
                f"Backbone {architecture!r} can't take images of {size} pixels: {first_line(error)}"
            ) from error
        self.info = BackboneInfo(
            architecture,
            tuple(m.shape[1] for m in maps),
            tuple((m.shape[2], m.shape[3]) for m in maps),
        )

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: batch-norm statistics keep their pretrained values."""
        super().train(False)
        compute_attention_biases_anew(self)
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W), RGB in [0, 1], to L maps (B, C_l, h_l, w_l), shallow to deep."""
        features: list[Tensor] = self.extractor((images - self.mean) / self.std)
        if self._channels_last:
            features = [level.permute(0, 3, 1, 2) for level in features]
        return joined(features) if self._joins else features


def joined(levels: list[Tensor]) -> list[Tensor]:
    """Levels with one for each shape: the mean of those of equal shape.

    The blocks of a transformer add to one stream, so their states go together as they are.
    Standardising each vector first was measured: it helped on one of three products and cost on
    two, because the length of a vector says something too.

    Args:
        levels: maps (B, C_l, h_l, w_l), shallow to deep.
    """
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for level in levels:
        groups.setdefault(tuple(level.shape[1:]), []).append(level)
    return [
        group[0] if len(group) == 1 else torch.stack(group).mean(dim=0) for group in groups.values()
    ]


def empty_backbone(
    settings: BackboneSettings, canvas: tuple[int, int], architecture: str | None = None
) -> Backbone:
    """A backbone with random parameters, for weights that are loaded later.

    Args:
        settings: resolved (:func:`clsnf.model.resolve.resolved`).
        canvas: (H, W) of its images.
        architecture: timm's name; None for that of the settings.

    Raises:
        SettingsError: the model gives no feature maps, or not those levels, or does not take that
            image size.
    """
    architecture = architecture or architecture_of(settings)
    extractor = build_extractor(architecture, settings.level_numbers, canvas)
    return Backbone(extractor, architecture, settings, canvas)


def load_backbone(settings: BackboneSettings, canvas: tuple[int, int]) -> tuple[Backbone, str]:
    """Build the backbone with its pretrained weights.

    Args:
        settings: resolved (:func:`clsnf.model.resolve.resolved`).
        canvas: (H, W) of its images.

    Returns:
        The backbone, and the :func:`fingerprint` of its weights, which does not depend on the file
        that they come from.

    Raises:
        SettingsError: see :func:`architecture_of` and :func:`empty_backbone`.
        WeightsError: the weights are not there, can't be read or fetched, or belong to another
            architecture.
    """
    architecture = architecture_of(settings)
    path = weights_file(settings)
    levels = settings.level_numbers
    if path is None:
        extractor = fetch_pretrained(architecture, levels, canvas)
    else:
        extractor = filled_extractor(architecture, levels, canvas, path)
    backbone = Backbone(extractor, architecture, settings, canvas)
    return backbone, fingerprint(backbone)


def fingerprint(module: nn.Module) -> str:
    """sha256 over the names, shapes and values of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
