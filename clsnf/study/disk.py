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

from clsnf.core.config import DetectorSettings, StudySettings
from clsnf.core.errors import DiskFullError
from clsnf.model.backbone import Backbone
from clsnf.model.network import build_decoder, empty_flows
from clsnf.study.space import SHORT_NAMES, Space
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
    backbone: Backbone,
) -> DiskNeed:
    """How much room the artifacts of a study need, rather too much.

    Args:
        settings: what trials start from.
        study: how many trials, and whether they share artifacts.
        space: how many trainings and flows may differ.
        tables: category -> its images.
        backbone: of the settings.
    """
    height, width = settings.image.size
    decoder = build_decoder(backbone.info, settings.image, settings.finetune, 0)
    classifier = _bytes(backbone) + _bytes(decoder)
    depths = _values(space, "flow.depth", settings.flow.depth)
    flows = max(
        _bytes(empty_flows(backbone.info, dataclasses.replace(settings.flow, depth=int(depth))))
        for depth in {min(depths), max(depths)}
    )
    # The state of training has two more numbers for each parameter; then what was trained is kept.
    trained = 4 * classifier + flows
    trainings, pairs = 1, 1
    if study.reuse:
        names = {SHORT_NAMES.get(name, name) for name in space.ranges}
        joint = len(space.joint_epochs(settings))
        trials = study.trials or study.total_trials or _UNKNOWN_TRIALS
        shared = names <= _ARTIFACTS_ALONE
        trainings = min(trials, joint) if shared else trials
        pairs = min(trials, joint * len(depths)) if shared else trials
    total = largest = 0
    for table in tables.values():
        validation = len(rows_of(table, "validation"))
        validation += len(FAMILIES) * settings.validation.images_per_family
        tested = len(rows_of(table, "test"))
        maps = _FLOAT * height * width
        own = trainings * (trained + maps * validation) + pairs * (flows + maps * validation)
        total += own + (pairs + trainings) * maps * tested + 2 * (classifier + flows)
        largest = max(largest, trained + flows + 2 * maps * validation)
    return DiskNeed(total, largest)


def _bytes(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def _values(space: Space, full_name: str, default: float) -> list[float]:
    """The values of a number in a space; both ends of a range without steps."""
    for name, given in space.ranges.items():
        if SHORT_NAMES.get(name, name) == full_name:
            if given["type"] == "choice":
                return list(given["values"])
            step = given.get("step") or 1
            return list(range(given["low"], given["high"] + 1, step))
    return [default]


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
