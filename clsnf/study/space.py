"""What a study searches: names of settings with their ranges, from a YAML file or the default.

    fusion_weight:   {type: float, low: 0.0, high: 1.0}
    finetune_epochs: {type: choice, values: [0, 4, 8]}
    flow_depth:      {type: int, low: 0, high: 6, step: 2}
    flow.passes:     {type: float, low: 0.5, high: 4.0, log: true}

The three short names stand for the settings that stages are shared by; any other setting goes by its full name, such as
``flow.passes`` or ``defects.threshold``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clsnf.config import DetectorSettings, from_dict, to_dict
from clsnf.errors import SettingsError, nearest

SHORT_NAMES = {"fusion_weight": "fusion_weight", "finetune_epochs": "finetune.joint_epochs", "flow_depth": "flow.depth"}

DEFAULT_SPACE: dict[str, dict[str, Any]] = {
    "fusion_weight": {"type": "float", "low": 0.0, "high": 1.0},
    "finetune_epochs": {"type": "choice", "values": [0, 4, 8]},
    "flow_depth": {"type": "choice", "values": [0, 2, 4]},
}

_KEYS = {"float": {"low", "high", "log", "step"}, "int": {"low", "high", "log", "step"}, "choice": {"values"}}


@dataclass(frozen=True)
class Space:
    """A checked search space.

    Attributes:
        ranges: name to range, as in the file.
    """

    ranges: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        if not self.ranges:
            raise SettingsError("The search space is empty: name at least one setting with its range.")
        for name, given in self.ranges.items():
            _check_range(name, given)
            for value in _extremes(given):
                apply_config(DetectorSettings(), {name: value})  # refuses unknown names and values out of range

    def distributions(self) -> dict[str, Any]:
        """Name to Optuna distribution."""
        from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

        def distribution(given: Mapping[str, Any]) -> BaseDistribution:
            if given["type"] == "choice":
                return CategoricalDistribution(given["values"])
            if given["type"] == "int":
                return IntDistribution(given["low"], given["high"], log=given.get("log", False), step=given.get("step", 1))
            return FloatDistribution(given["low"], given["high"], log=given.get("log", False), step=given.get("step"))

        return {name: distribution(given) for name, given in self.ranges.items()}

    def start(self, settings: DetectorSettings) -> dict[str, Any]:
        """The point of the space nearest to the settings as they stand: the first trial of each category."""
        return {name: _nearest_value(given, _lookup(settings, name)) for name, given in self.ranges.items()}

    def leaving_epochs(self, settings: DetectorSettings) -> list[int]:
        """All numbers of joint epochs that a trial can ask for: the trunk is stored where they leave it."""
        given = self.ranges.get("finetune_epochs")
        if given is None:
            return [settings.finetune.joint_epochs]
        if given["type"] == "choice":
            return sorted(given["values"])
        return list(range(given["low"], given["high"] + 1, given.get("step", 1)))


def read_space(path: Path | None) -> Space:
    """The space in a YAML file, or the default.

    Raises:
        SettingsError: the file is missing, no YAML, or names what does not exist.
    """
    if path is None:
        return Space(DEFAULT_SPACE)
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SettingsError(f"The search space {path} can't be read ({error.strerror}).") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise SettingsError(
            f"{path}: a search space maps names of settings to ranges, such as flow_depth: {{type: choice, values: [2, 4]}}."
        )
    try:
        return Space(content)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def apply_config(settings: DetectorSettings, config: Mapping[str, Any]) -> DetectorSettings:
    """The settings with a trial's values put in.

    Raises:
        SettingsError: an unknown name, or a value out of its range.
    """
    content = to_dict(settings)
    for name, value in config.items():
        *sections, last = SHORT_NAMES.get(name, name).split(".")
        place = content
        for section in sections:
            if not isinstance(place.get(section), dict):
                raise SettingsError(f"There is no setting {name!r}.{nearest(name, _names(settings))}")
            place = place[section]
        if last not in place or isinstance(place[last], dict):
            raise SettingsError(f"There is no setting {name!r}.{nearest(name, _names(settings))}")
        place[last] = value
    return from_dict(DetectorSettings, content)


def _names(settings: DetectorSettings) -> list[str]:
    def walk(prefix: str, value: Any) -> list[str]:
        if not dataclasses.is_dataclass(value):
            return [prefix]
        return [n for f in dataclasses.fields(value) for n in walk(f"{prefix}.{f.name}".lstrip("."), getattr(value, f.name))]

    return [*SHORT_NAMES, *walk("", settings)]


def _lookup(settings: DetectorSettings, name: str) -> Any:
    value: Any = settings
    for section in SHORT_NAMES.get(name, name).split("."):
        value = getattr(value, section)
    return value


def _check_range(name: str, given: Mapping[str, Any]) -> None:
    kind = given.get("type")
    if kind not in _KEYS:
        raise SettingsError(f"{name}: type is {kind!r}.{nearest(str(kind), _KEYS)}")
    unknown = set(given) - _KEYS[kind] - {"type"}
    if unknown:
        raise SettingsError(f"{name}: unknown key {sorted(unknown)[0]!r}.{nearest(sorted(unknown)[0], _KEYS[kind])}")
    if kind == "choice":
        if not isinstance(given.get("values"), list) or not given["values"]:
            raise SettingsError(f"{name}: a choice needs values: [a, b, ...].")
        return
    low, high = given.get("low"), given.get("high")
    number = int if kind == "int" else (int, float)
    if not isinstance(low, number) or not isinstance(high, number) or isinstance(low, bool) or low > high:
        raise SettingsError(f"{name}: low is {low!r} and high is {high!r}: a range of type {kind} needs numbers with low <= high.")
    if given.get("log") and (low <= 0 or given.get("step")):
        raise SettingsError(f"{name}: log needs low above 0 and no step.")


def _extremes(given: Mapping[str, Any]) -> list[Any]:
    return list(given["values"]) if given["type"] == "choice" else [given["low"], given["high"]]


def _nearest_value(given: Mapping[str, Any], value: Any) -> Any:
    if given["type"] == "choice":
        if value in given["values"]:
            return value
        numbers = all(isinstance(v, (int, float)) for v in given["values"]) and isinstance(value, (int, float))
        return min(given["values"], key=lambda v: abs(v - value)) if numbers else given["values"][0]
    value = min(max(value, given["low"]), given["high"])
    step = given.get("step")
    if step:
        value = given["low"] + round((value - given["low"]) / step) * step
    return int(value) if given["type"] == "int" else float(value)
