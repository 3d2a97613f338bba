"""How much room a study's artifacts will need, told before the long work."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from torch import nn

from clsnf.core.config import BackboneSettings, DetectorSettings, StudySettings
from clsnf.core.errors import DiskFullError
from clsnf.model.backbone import empty_backbone
from clsnf.model.network import build_decoder, empty_flows
from clsnf.model.resolve import resolved
from clsnf.study.space import Space
from clsnf.synthesis.validation_defects import FAMILIES
from clsnf.training.prepare import rows_of

_FLOAT = 4  # bytes
_UNKNOWN_TRIALS = 16  # of a category, where only the clock ends a study
_ARTIFACTS_ALONE = {"fusion_weight", "finetune.joint_epochs", "flow.depth"}


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that a study writes, estimated from the shapes of its networks.

    Attributes:
        study: of all trials and winners.
        trial: of the largest trial that shares nothing with others.
    """

    study: int
    trial: int


def estimate_disk(
    settings: DetectorSettings,
    study: StudySettings,
    space: Space,
    tables: Mapping[str, pa.Table],
) -> DiskNeed:
    """How much room the artifacts of a study need, rather too much.

    Args:
        settings: what trials start from.
        study: how many trials, and whether they share artifacts.
        space: how many trainings and flows may differ.
        tables: category -> its images.

    Of several backbones, the one that needs most counts.
    """
    networks = [_network_size(one, space) for one in _largest_networks(settings, space)]
    trainings, pairs = _numbers_of_artifacts(settings, study, space)
    total = largest = 0.0
    for table in tables.values():
        validation = len(rows_of(table, "validation"))
        validation += len(FAMILIES) * settings.validation.images_per_family
        tested = len(rows_of(table, "test"))
        needs = []
        for network in networks:
            trained, flows, maps = network.trained, network.flows, network.map
            own = trainings * (trained + maps * validation) + pairs * (flows + maps * validation)
            tests = (pairs + trainings) * maps * tested
            needs.append(own + tests + 2 * (network.classifier + flows))
            largest = max(largest, trained + flows + 2 * maps * validation)
        total += max(needs)
    return DiskNeed(int(total), int(largest))


@dataclass(frozen=True)
class _NetworkSize:
    """Bytes of a classifier, of flows, and of one map of an image."""

    classifier: int
    flows: int
    map: int

    @property
    def trained(self) -> int:
        """What one training stores: its state has two more numbers for each parameter; then what
        was trained is kept.
        """
        return 4 * self.classifier + self.flows


def _largest_networks(settings: DetectorSettings, space: Space) -> list[DetectorSettings]:
    """The settings with each backbone of a space, at its largest image size."""
    largest: dict[BackboneSettings, DetectorSettings] = {}
    for one in map(resolved, space.networks(settings)):
        known = largest.setdefault(one.backbone, one)
        if math.prod(one.image.size) > math.prod(known.image.size):
            largest[one.backbone] = one
    return list(largest.values())


def _network_size(settings: DetectorSettings, space: Space) -> _NetworkSize:
    backbone = empty_backbone(settings.backbone, settings.image.size)
    decoder = build_decoder(backbone.info, settings.image, settings.finetune, 0)
    depths = space.whole_numbers("flow.depth", settings)
    flows = max(
        _bytes(empty_flows(backbone.info, dataclasses.replace(settings.flow, depth=depth)))
        for depth in {min(depths), max(depths)}
    )
    maps = _FLOAT * math.prod(settings.image.size)
    return _NetworkSize(_bytes(backbone) + _bytes(decoder), flows, maps)


def _numbers_of_artifacts(
    settings: DetectorSettings, study: StudySettings, space: Space
) -> tuple[int, int]:
    """How many trainings, and pairs of one and flows, a category stores at most."""
    if not study.reuse:
        return 1, 1
    joint, depths = (
        len(space.whole_numbers(name, settings)) for name in ("finetune.joint_epochs", "flow.depth")
    )
    trials = study.trials or study.total_trials or _UNKNOWN_TRIALS
    if set(space.settings) <= _ARTIFACTS_ALONE:
        return min(trials, joint), min(trials, joint * depths)
    return trials, trials


def _bytes(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def free_room(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    place = next(known for known in (folder, *folder.parents) if os.path.exists(known))
    return shutil.disk_usage(place).free


def check_room(folder: Path, need: DiskNeed) -> str:
    """One line about the disk of a folder, for people.

    Raises:
        DiskFullError: there is no room for a single trial.
    """
    free = free_room(folder)
    if free < need.trial:
        raise DiskFullError(
            f"The disk of {folder} has {size(free)} left, and a single trial needs about "
            f"{size(need.trial)}: make room, or choose another --out."
        )
    line = f"disk: up to {size(need.study)} for the artifacts, {size(free)} are free"
    if free < need.study:
        line += "; trials wait when the disk is full"
    return line


def size(count: float) -> str:
    """``1.4 GB``, ``870 MB``: for people."""
    unit = "GB" if count >= 1e9 else "MB"
    number = count / (1e9 if unit == "GB" else 1e6)
    return f"{number:.1f} {unit}" if number < 10 else f"{math.ceil(number)} {unit}"
