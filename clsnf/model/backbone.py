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
from clsnf.core.errors import SettingsError, first_line, nearest
from clsnf.model.backbone_weights import fetch_pretrained, filled_extractor
from clsnf.model.extractors import build_extractor
from clsnf.model.padding import pad_by_reflection
from clsnf.model.weights_files import DEMO, demo_assets, weights_file

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
        image_size: (H, W) of its images.

    Raises:
        SettingsError: the network can't take images of that size, or a level is too small to pad by
            reflection.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, extractor: nn.Module, architecture: str, image_size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.extractor = extractor
        self._channels_last = getattr(extractor, "output_fmt", None) == "NHWC"  # Swin and its kind
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        pad_by_reflection(extractor)
        self.eval()
        try:
            with torch.no_grad():
                maps = self(torch.zeros(1, 3, *image_size))
        except (RuntimeError, AssertionError) as error:
            size = "x".join(map(str, image_size))
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
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W), RGB in [0, 1], to L maps (B, C_l, h_l, w_l), shallow to deep."""
        features: list[Tensor] = self.extractor((images - self.mean) / self.std)
        if self._channels_last:
            return [level.permute(0, 3, 1, 2) for level in features]
        return features


def architecture_of(settings: BackboneSettings) -> str:
    """timm's name of the architecture (the demo backbone has one too).

    Raises:
        SettingsError: timm knows no such model.
    """
    import timm

    name: str = demo_assets()[0]["architecture"] if settings.name == DEMO else settings.name
    if not timm.is_model(name):
        raise SettingsError(
            f"There is no timm model {name!r}.{nearest(name, [*timm.list_models(), DEMO])}"
        )
    plain, _, tag = name.partition(".")
    tagged = timm.list_models(f"{plain}.*", include_tags=True)
    if tag and name not in tagged:
        raise SettingsError(f"timm has no weights {name!r}.{nearest(name, [*tagged, plain])}")
    return name


def empty_backbone(
    architecture: str, levels: tuple[int, ...], image_size: tuple[int, int]
) -> Backbone:
    """A backbone with random parameters, for weights that are loaded later.

    Raises:
        SettingsError: the model gives no feature maps, or not those levels, or does not take that
            image size.
    """
    return Backbone(build_extractor(architecture, levels, image_size), architecture, image_size)


def load_backbone(settings: BackboneSettings, image_size: tuple[int, int]) -> tuple[Backbone, str]:
    """Build the backbone with its pretrained weights.

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
    if path is None:
        extractor = fetch_pretrained(architecture, settings.levels, image_size)
    else:
        extractor = filled_extractor(architecture, settings.levels, image_size, path)
    backbone = Backbone(extractor, architecture, image_size)
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
