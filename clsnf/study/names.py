"""Names in a search space: short names, full names, and labels of joint choices.

A point of a space has a value for each name. The value of a joint choice is a mapping of settings,
which vary together; its own name, such as ``network``, is a label alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FUSION_WEIGHT = "fusion_weight"
# The settings that most studies search.
SHORT_NAMES = {
    FUSION_WEIGHT: FUSION_WEIGHT,
    "finetune_epochs": "finetune.joint_epochs",
    "flow_depth": "flow.depth",
}


def full_name(name: str) -> str:
    """The full name of a setting."""
    return SHORT_NAMES.get(name, name)


def spread(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point with the settings of a joint choice in its place; other names stay as they are."""
    found: dict[str, Any] = {}
    for name, value in point.items():
        found |= value if isinstance(value, Mapping) else {name: value}
    return found


def in_full(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point, or a part of one, as full names of settings with their values."""
    return {full_name(name): value for name, value in spread(point).items()}
