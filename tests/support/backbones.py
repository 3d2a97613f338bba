"""Resolved settings of backbones, for tests that build networks themselves."""

from __future__ import annotations

from clsnf.core.config import IMAGENET_MEAN, IMAGENET_STD, BackboneSettings


def backbone_settings(
    name: str, levels: tuple[int, ...], weights: str | None = None
) -> BackboneSettings:
    """Settings with ImageNet's mean and deviation, and levels that stay apart."""
    return BackboneSettings(name, levels, weights, "none", IMAGENET_MEAN, IMAGENET_STD)
