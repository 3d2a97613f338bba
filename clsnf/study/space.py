"""What a study searches: names of settings with their ranges, from a YAML file or the default.

    fusion_weight:   {type: float, low: 0.0, high: 1.0}
    finetune_epochs: {type: choice, values: [0, 4, 8]}
    flow_depth:      {type: int, low: 0, high: 6, step: 2}
    flow.passes:     {type: float, low: 0.5, high: 4.0, log: true}

The settings that most studies search have short names (``SHORT_NAMES``). Any other setting has its
full name, such as ``flow.passes`` or ``defects.threshold``.

Settings that go together are one joint choice under a label of any name. Its values are mappings;
what one of them does not name is as the study's settings have it::

    network:
      type: choice
      values:
        - {backbone.name: resnet18, backbone.levels: [1, 2, 3]}
        - {backbone.name: vit_tiny_patch16_224, backbone.levels: [3, 6, 9], image.height: 224}
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from clsnf.core.config import (
    BackboneSettings,
    DetectorSettings,
    StudySettings,
    check_names,
    replaced,
    setting_names,
    value_at,
)
from clsnf.core.errors import ClsnfError, SettingsError, nearest
from clsnf.core.yaml import read_yaml_mapping
from clsnf.model.architectures import architecture_of
from clsnf.model.backbone import empty_backbone, load_backbone
from clsnf.model.resolve import resolved
from clsnf.model.weights_files import check_weights
from clsnf.results import stored_choice
from clsnf.study.names import FUSION_WEIGHT, SHORT_NAMES, full_name, in_full
from clsnf.training.finetune import RESUME_EVERY

DEFAULT_SPACE: dict[str, dict[str, Any]] = {
    "fusion_weight": {"type": "float", "low": 0.0, "high": 1.0},
    "finetune_epochs": {"type": "choice", "values": [0, 4, 8]},
    "flow_depth": {"type": "choice", "values": [0, 2, 4]},
}

# Swept by every trial, as far as the space allows them. They lie closer together where the authors'
# weights are, from 0.016 to 0.25.
FUSION_WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

# Why no trial depends on a setting, for refusals. Any other name in the section `validation` is
# refused too.
_UNREAD = {
    "score_weight": "the study chooses it for the winner alone, by image AUROC",
    "validation.fraction": "validation images are held out once, before the first trial",
    "validation.images_per_family": "validation defects are made once, before the first trial",
    "validation.false_reject_rate": "the threshold of the winner alone depends on it",
}
_VALIDATION = "all trials are judged by the same validation"

# Sections whose settings change the training of stage one before the learning rate decays.
_CHANGE_STAGE_ONE = ("finetune", "defects", "backbone", "image", "seed")

_RESERVED = ("category", "trial", "densities")  # names beside those of the space in a trial

_KEYS = {
    "float": {"low", "high", "log", "step"},
    "int": {"low", "high", "log", "step"},
    "choice": {"values"},
}


@dataclass(frozen=True)
class Space:
    """A checked search space.

    Attributes:
        ranges: name to range, as in the file.
    """

    ranges: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        if not self.ranges:
            raise SettingsError(
                "The search space is empty: name at least one setting with its range."
            )
        known: dict[str, str] = {}
        for name, given in self.ranges.items():
            _check_range(name, given)
            for full in _settings_in(name, given):
                other = known.setdefault(full, name)
                if other != name:
                    raise SettingsError(_said_twice(full, other, name))
            for value in _samples(given):  # refuse unknown names and values out of range
                try:
                    apply_config(DetectorSettings(), {name: value})
                except SettingsError as error:
                    if not is_joint(given):
                        raise
                    raise SettingsError(f"{name}, {value}: {error}") from error

    def check(self, settings: DetectorSettings) -> None:
        """Refuse values that do not fit these settings.

        For example, ``flow_depth`` 0 does not fit ``flow.start`` random.

        Raises:
            SettingsError: with the setting's name and the value.
        """
        for name, given in self.ranges.items():
            for value in _samples(given):
                try:
                    apply_config(settings, {name: value})
                except SettingsError as error:
                    raise SettingsError(f"The search space's {name}: {error}") from error

    def check_new(self, settings: DetectorSettings) -> None:
        """Refuse what a new study could only waste trials on.

        That is a setting that no trial reads, and backbones that can't be loaded. A study that was
        begun with such a space may still go on.

        Raises:
            SettingsError, WeightsError: with the setting's name, and why.
        """
        for name in self.settings:
            why = _why_unread(name)
            if why is not None:
                raise SettingsError(
                    f"The search space's {name} changes nothing in a trial: {why}. Take it out of "
                    f"the space; give one value with --set {name}=VALUE."
                )
        self._check_backbones(settings)

    def _check_backbones(self, settings: DetectorSettings) -> None:
        """Build every backbone that a trial may have, at every image size, and load its weights."""
        backbones = self.backbones(settings)
        names = list(dict.fromkeys(backbone.name for backbone in backbones))
        for name in names:  # unknown ones are refused before anything is loaded
            with _named({"backbone.name": name}):
                architecture_of(BackboneSettings(name))
        if "backbone.weights" not in self.settings:
            check_weights(settings.backbone.weights, names)
        points = self._points("backbone.", "image.")
        if points == [{}]:
            return  # the settings' own, which is checked with them
        loaded = set[BackboneSettings]()
        for point in points:
            with _named(point):
                tried = settings_of_trial(settings, point)
                _load(tried, with_weights=tried.backbone not in loaded)
                loaded.add(tried.backbone)

    def _points(self, *sections: str) -> list[dict[str, Any]]:
        """All combinations of the values of some sections' settings that are checked.

        Names are full ones.
        """
        parts: list[list[dict[str, Any]]] = []
        for name, given in self.ranges.items():
            of_sections = [
                {full: v for full, v in in_full({name: value}).items() if full.startswith(sections)}
                for value in _samples(given)
            ]
            if any(of_sections):
                parts.append(of_sections)
        points = [
            {name: value for part in combined for name, value in part.items()}
            for combined in itertools.product(*parts)
        ]
        return [point for n, point in enumerate(points) if point not in points[:n]]

    def backbones(self, settings: DetectorSettings) -> list[BackboneSettings]:
        """The different backbones that a trial may have."""
        points = self._points("backbone.")
        return list(dict.fromkeys(apply_config(settings, point).backbone for point in points))

    def networks(self, settings: DetectorSettings) -> list[DetectorSettings]:
        """The settings with each backbone and image size that a trial may have."""
        return [apply_config(settings, point) for point in self._points("backbone.", "image.")]

    @property
    def settings(self) -> list[str]:
        """Full names of all settings that trials differ in, those in joint choices among them."""
        found = (full for name, given in self.ranges.items() for full in _settings_in(name, given))
        return list(dict.fromkeys(found))

    def distributions(self) -> dict[str, Any]:
        """The Optuna distribution of each name that a trial's training depends on.

        The fusion weight has none: each trial sweeps it. Choices that are lists are texts, see
        :func:`clsnf.results.stored_choice`.
        """
        from optuna.distributions import (
            BaseDistribution,
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        def distribution(given: Mapping[str, Any]) -> BaseDistribution:
            if given["type"] == "choice":
                return CategoricalDistribution([stored_choice(v) for v in given["values"]])
            if given["type"] == "int":
                return IntDistribution(
                    given["low"],
                    given["high"],
                    log=given.get("log", False),
                    step=_whole_step(given),
                )
            return FloatDistribution(
                given["low"], given["high"], log=given.get("log", False), step=given.get("step")
            )

        return {name: distribution(given) for name, given in self._searched.items()}

    @property
    def _searched(self) -> dict[str, Mapping[str, Any]]:
        """The ranges that trials are drawn from."""
        return {name: given for name, given in self.ranges.items() if name != FUSION_WEIGHT}

    @property
    def size(self) -> float:
        """Number of different trials; infinite where a range has too many values to count."""
        from clsnf.study.points import space_size  # it needs Optuna

        return space_size(self.distributions())

    def limited(self, study: StudySettings) -> StudySettings:
        """The study with no more trials of a category than the space has points."""
        if study.trials is None or study.trials <= self.size:
            return study
        return dataclasses.replace(study, trials=int(self.size))

    def start(self, settings: DetectorSettings) -> dict[str, Any]:
        """The point of the space nearest to `settings`: the first trial of each category."""
        return {
            name: _nearest_choice(given, settings, name)
            if given["type"] == "choice"
            else _nearest_number(given, value_at(settings, full_name(name)))
            for name, given in self._searched.items()
        }

    def joint_epochs(self, settings: DetectorSettings) -> list[int]:
        """All numbers of joint epochs that a trial can have: training stores its state for each."""
        return self.whole_numbers("finetune.joint_epochs", settings)

    def whole_numbers(self, name: str, settings: DetectorSettings) -> list[int]:
        """All values, rising, that a trial can have of a setting by its full name."""
        given = self._range(name, settings)
        if given is None:
            return [value_at(settings, name)]
        if given["type"] == "choice":
            return sorted(given["values"])
        return list(range(given["low"], given["high"] + 1, _whole_step(given)))

    def rungs(self, settings: DetectorSettings) -> list[int]:
        """Epochs at which running trials are compared, so that hopeless ones can stop.

        Empty if all trials share the training of stage one, or if the learning rate depends on the
        length of the training from the first step (cosine).
        """
        searched = set(self.settings) - {"finetune.joint_epochs", "finetune.decay_epochs"}
        own_training = any(changes_training(name) for name in searched)
        if not own_training or settings.finetune.schedule != "wsd":
            return []
        longest = settings.finetune.frozen_epochs + self.joint_epochs(settings)[-1]
        return list(range(RESUME_EVERY, longest, RESUME_EVERY))

    def fusion_weights(self, settings: DetectorSettings) -> tuple[float, ...]:
        """The fusion weights that each trial sweeps, rising: only those inside the space.

        All values of a choice or of a range with steps; of a range without, its ends, those of
        :data:`FUSION_WEIGHTS`, and the settings' own. Without a fusion weight in the space, the
        settings' own alone.
        """
        given, own = self._range(FUSION_WEIGHT, settings), settings.fusion_weight
        if given is None:
            return (own,)
        if given["type"] == "choice":
            return tuple(sorted(map(float, given["values"])))
        low, high = float(given["low"]), float(given["high"])
        if given.get("step") or given["type"] == "int":
            step = given.get("step") or 1
            return tuple(min(low + n * step, 1.0) for n in range(_steps(low, high, step) + 1))
        inside = {w for w in (*FUSION_WEIGHTS, own) if low <= w <= high}
        return tuple(sorted(inside | {low, high}))

    def _range(self, name: str, settings: DetectorSettings) -> Mapping[str, Any] | None:
        """The range of a setting by its full name; of one in a joint choice, its values there.

        Where a mapping does not name it, it is that of `settings`. None where all trials have that.
        """
        for label, given in self.ranges.items():
            if name not in _settings_in(label, given):
                continue
            if not is_joint(given):
                return given
            own = _plain(value_at(settings, name))
            values = [in_full({label: value}).get(name, own) for value in given["values"]]
            different = [value for n, value in enumerate(values) if value not in values[:n]]
            return {"type": "choice", "values": different}
        return None


def read_space(path: Path | None) -> Space:
    """The space in a YAML file; the default space if there is no file.

    Raises:
        SettingsError: the file can't be read, is no YAML, or holds an unknown name or a range that
            makes no sense.
    """
    if path is None:
        return Space(DEFAULT_SPACE)
    content = read_yaml_mapping(path, "flow_depth: {type: choice, values: [2, 4]}")
    try:
        return Space(content)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def paper_space() -> Space:
    """The default space of a study with the authors' settings: the fusion weight alone."""
    return Space({"fusion_weight": DEFAULT_SPACE["fusion_weight"]})


def apply_config(settings: DetectorSettings, config: Mapping[str, Any]) -> DetectorSettings:
    """The settings with the values of a trial, by short or full names.

    Raises:
        SettingsError: an unknown name, or a value of the wrong type or out of its range.
    """
    names = [one for n, v in config.items() for one in (v if isinstance(v, Mapping) else (n,))]
    check_names(settings, names, SHORT_NAMES)
    return replaced(settings, in_full(config))


def settings_of_trial(settings: DetectorSettings, config: Mapping[str, Any]) -> DetectorSettings:
    """:func:`apply_config`, resolved: what the trial's network is built with.

    Raises:
        SettingsError, WeightsError: see also :func:`clsnf.model.resolve.resolved`.
    """
    return resolved(apply_config(settings, config))


def changes_training(name: str) -> bool:
    """Whether trials that differ in this setting can't share the training of stage one."""
    return name.split(".")[0] in _CHANGE_STAGE_ONE


def _why_unread(name: str) -> str | None:
    """Why no trial depends on a setting, by its full name; None where trials do."""
    in_validation = name.startswith("validation.")
    return _UNREAD.get(name, _VALIDATION if in_validation else None)


def is_joint(given: Mapping[str, Any]) -> bool:
    """Whether a range is a joint choice, of mappings."""
    return given["type"] == "choice" and isinstance(given["values"][0], Mapping)


def _settings_in(name: str, given: Mapping[str, Any]) -> list[str]:
    """The full names of the settings that a range is about."""
    if not is_joint(given):
        return [full_name(name)]
    found = (full for value in given["values"] for full in in_full({name: value}))
    return list(dict.fromkeys(found))


def _said_twice(setting: str, first: str, second: str) -> str:
    names = (full_name(first), full_name(second))
    if names == (setting, setting):
        return f"{first} and {second} are the same setting: keep one."
    return f"Both {first} and {second} give {setting} a value: keep one."


@contextmanager
def _named(point: Mapping[str, Any]) -> Iterator[None]:
    """Errors of the block name the values that they are about."""
    try:
        yield
    except ClsnfError as error:
        values = ", ".join(f"{name}={value}" for name, value in point.items())
        raise type(error)(f"The search space's {values}: {error}") from error


def _load(settings: DetectorSettings, with_weights: bool) -> None:
    """Build a backbone; its weights fit images of every size, so once is enough for them."""
    (load_backbone if with_weights else empty_backbone)(settings.backbone, settings.image.size)


def _check_range(name: str, given: Mapping[str, Any]) -> None:
    if not isinstance(given, Mapping):
        raise SettingsError(
            f"{name}: {given!r} is no range: expected one such as {{type: choice, values: [2, 4]}}."
        )
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise SettingsError(f"{name}: type is {kind!r}.{nearest(str(kind), _KEYS)}")
    unknown = sorted(str(key) for key in given if key not in _KEYS[kind] | {"type"})
    if unknown:
        raise SettingsError(
            f"{name}: unknown key {unknown[0]!r}.{nearest(unknown[0], _KEYS[kind])}"
        )
    if kind == "choice":
        _check_choice(name, given.get("values"))
    else:
        _check_numbers(name, kind, given)


def _check_choice(name: str, values: Any) -> None:
    if not isinstance(values, list) or not values:
        raise SettingsError(f"{name}: a choice needs values: [a, b, ...].")
    if any(isinstance(value, Mapping) for value in values):
        _check_joint(name, values)
    repeated = [value for index, value in enumerate(values) if value in values[:index]]
    if repeated:
        raise SettingsError(f"{name}: the value {repeated[0]!r} stands there twice.")


def _check_joint(name: str, values: list[Any]) -> None:
    """Check the label and the mappings of a joint choice, not yet the values in them."""
    if name in (*SHORT_NAMES, *setting_names(DetectorSettings), *_RESERVED):
        raise SettingsError(
            f"{name}: the label of a joint choice is no setting's name: take another, such as "
            "network."
        )
    for value in values:
        if not isinstance(value, Mapping) or not value:
            raise SettingsError(
                f"{name}: {value!r} is no mapping of settings, as other values of it are: give one "
                "such as {backbone.name: resnet18, image.height: 128}."
            )
        full = [full_name(one) for one in value]
        repeated = [one for n, one in enumerate(full) if one in full[:n]]
        if repeated:
            raise SettingsError(f"{name}: {value!r} gives {repeated[0]} two values: keep one.")
        if FUSION_WEIGHT in value:
            raise SettingsError(
                f"{name}: every trial sweeps {FUSION_WEIGHT}: give it a range of its own."
            )


def _check_numbers(name: str, kind: str, given: Mapping[str, Any]) -> None:
    low, high, step = given.get("low"), given.get("high"), given.get("step")
    log = given.get("log", False)
    if not _is_number(low, kind) or not _is_number(high, kind) or not low <= high:
        raise SettingsError(
            f"{name}: low is {low!r} and high is {high!r}: a range of type {kind} needs numbers "
            "with low <= high."
        )
    if step is not None and (not _is_number(step, kind) or not 0 < step < math.inf):
        what = "a whole number above 0" if kind == "int" else "above 0 and finite"
        raise SettingsError(f"{name}: step is {step!r}: it must be {what}, or left out.")
    if not isinstance(log, bool):
        raise SettingsError(f"{name}: log is {log!r}: it must be true or false.")
    if log and (low <= 0 or step):
        raise SettingsError(f"{name}: log needs low above 0 and no step.")


def _is_number(value: Any, kind: str) -> TypeGuard[float]:
    return isinstance(value, int if kind == "int" else (int, float)) and not isinstance(value, bool)


def _whole_step(given: Mapping[str, Any]) -> int:
    """The step of a range of type int; ``step: null`` is as no step."""
    return given.get("step") or 1


def _steps(low: float, high: float, step: float) -> int:
    """Number of steps from `low` that stay within `high`; a rounding error costs no step."""
    return math.floor((high - low) / step + 1e-9)


def _samples(given: Mapping[str, Any]) -> list[Any]:
    """The values of a range that are checked: all of a choice, else both ends.

    Of whole numbers also the second value, because the step may lead to values that are not valid.
    """
    if given["type"] == "choice":
        return list(given["values"])
    low, high = given["low"], given["high"]
    if given["type"] == "int":
        return [low, high, min(low + _whole_step(given), high)]
    return [float(low), float(high)]


def _nearest_choice(given: Mapping[str, Any], settings: DetectorSettings, name: str) -> Any:
    """The choice that the settings have; else the nearest number, or the first choice."""
    values = given["values"]
    now = None if is_joint(given) else _plain(value_at(settings, full_name(name)))
    if now in values:
        return now
    wanted = _as_trained(settings, {})
    for value in values:  # a mapping, one with an old name, or what an open setting stands for
        if _as_trained(settings, {name: value}) == wanted:
            return value
    if all(isinstance(value, (int, float)) for value in (now, *values)):
        return min(values, key=lambda value: abs(value - now))
    return values[0]


def _as_trained(settings: DetectorSettings, config: Mapping[str, Any]) -> DetectorSettings:
    """The settings that a trial trains with; as they are where no backbone can tell."""
    changed = apply_config(settings, config)
    try:
        return resolved(changed)
    except ClsnfError:  # said where backbones are checked
        return changed


def _plain(value: Any) -> Any:
    """A setting's value as YAML and JSON have it."""
    return list(value) if isinstance(value, tuple) else value


def _nearest_number(given: Mapping[str, Any], now: float | None) -> int | float:
    """The number of a range that is nearest to the value that the settings have.

    The lowest where they have none, such as ``score_weight`` by default.
    """
    low, high, step = given["low"], given["high"], given.get("step")
    value = low if now is None else min(max(now, low), high)
    if step:
        # The last step may end below the range's upper end.
        steps = min(round((value - low) / step), _steps(low, high, step))
        value = min(low + steps * step, high)
    return int(value) if given["type"] == "int" else float(value)
