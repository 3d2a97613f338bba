"""From the settings that a user gives to those that a network is built with.

What a user leaves open (``null``, ``auto``) follows from the backbone: its levels, the mean and
deviation that its weights expect, how pictures are resized, and what the sides of the network's
input are multiples of. Training resolves settings once, at its start. Artifacts' keys and saved
detectors hold resolved settings alone, so that a later default changes no detector.
"""

from __future__ import annotations

import dataclasses
import math

from clsnf.core.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PYRAMID_NEIGHBOURHOOD,
    BackboneSettings,
    DetectorSettings,
    FlowSettings,
    ImageSettings,
)
from clsnf.model.architectures import (
    TRANSFORMER,
    ArchitectureFacts,
    architecture_of,
    default_levels,
    facts_of,
    known_interpolation,
    numbers_of_levels,
)
from clsnf.model.extractors import takes
from clsnf.model.weights_files import DEMO, weights_facts, weights_file

# Tried where the deepest level's stride is not enough. Padding to larger ones would be most of the
# canvas.
_MORE = (32, 64)


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """What a backbone's weights expect of images.

    Attributes:
        mean, std: of red, green and blue in [0, 1].
        interpolation: ``bilinear`` or ``bicubic``.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


def resolved(settings: DetectorSettings) -> DetectorSettings:
    """The settings with nothing left open. Resolved settings stay as they are.

    Raises:
        SettingsError: timm knows no such model, or the model has not those levels.
        WeightsError: the weights file is not there.
    """
    if not _is_open(settings):
        return settings
    facts = facts_of(architecture_of(settings.backbone))
    weights = pretraining_of(settings.backbone, facts)
    backbone = _resolved_backbone(settings.backbone, facts, weights)
    return dataclasses.replace(
        settings,
        backbone=backbone,
        image=_resolved_image(settings.image, backbone.level_numbers, facts, weights),
        flow=_resolved_flow(settings.flow, facts),
    )


def _is_open(settings: DetectorSettings) -> bool:
    backbone, image = settings.backbone, settings.image
    return (
        backbone.levels is None
        or any(isinstance(level, float) for level in backbone.levels)
        or None in (backbone.mean, backbone.std, image.multiple, settings.flow.neighbourhood)
        or "auto" in (backbone.join, image.interpolation)
    )


def _resolved_backbone(
    given: BackboneSettings, facts: ArchitectureFacts, weights: Pretraining
) -> BackboneSettings:
    join = given.join
    if join == "auto":
        join = "mean" if facts.kind == TRANSFORMER else "none"
    return dataclasses.replace(
        given,
        levels=numbers_of_levels(given.levels or default_levels(facts), facts),
        join=join,
        mean=weights.mean if given.mean is None else given.mean,
        std=weights.std if given.std is None else given.std,
    )


def _resolved_image(
    given: ImageSettings, levels: tuple[int, ...], facts: ArchitectureFacts, weights: Pretraining
) -> ImageSettings:
    interpolation, multiple = given.interpolation, given.multiple
    if interpolation == "auto":
        interpolation = weights.interpolation
    if multiple is None:
        multiple = _multiple(given, facts, levels)
    return dataclasses.replace(given, interpolation=interpolation, multiple=multiple)


def _resolved_flow(given: FlowSettings, facts: ArchitectureFacts) -> FlowSettings:
    if given.neighbourhood is not None:
        return given
    return dataclasses.replace(
        given, neighbourhood=1 if facts.kind == TRANSFORMER else PYRAMID_NEIGHBOURHOOD
    )


def _multiple(given: ImageSettings, facts: ArchitectureFacts, levels: tuple[int, ...]) -> int:
    """What the canvas's sides must be multiples of: the stride of the deepest level, or more where
    an architecture needs it, such as one that attends in windows.

    Where none of these sizes is taken, loading the backbone says which are.
    """
    deepest = max(facts.reductions[level] for level in levels)
    for multiple in sorted({deepest, math.lcm(*facts.reductions), *_MORE}):
        canvas = dataclasses.replace(given, multiple=multiple).size
        if multiple >= deepest and takes(facts.name, levels, canvas):
            return multiple
    return deepest


def pretraining_of(settings: BackboneSettings, facts: ArchitectureFacts) -> Pretraining:
    """What the weights of these settings expect.

    A file's own word, where it has one, goes before timm's for the model's name and tag. The demo
    backbone has its own.
    """
    if settings.name == DEMO:
        return Pretraining(IMAGENET_MEAN, IMAGENET_STD, "bilinear")
    file = weights_file(settings)
    said = None if file is None else weights_facts(file)
    if said is None:
        return Pretraining(facts.mean, facts.std, facts.interpolation)
    return Pretraining(
        said.mean or facts.mean, said.std or facts.std, known_interpolation(said.interpolation)
    )
