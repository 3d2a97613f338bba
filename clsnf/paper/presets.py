"""What the authors published for each category: the settings of their scripts, and test metrics.

Source: S. Oh and J. Kim, IEEE Access 12 (2024), 75873-75887, and their public repository.
``--preset paper`` is made from the table ``assets/authors_presets.csv``; reports compare with
``assets/authors_metrics.csv``. Settings that are the same for all categories are not in the table
but in :attr:`Preset.overrides`.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, TypeVar

from clsnf.core.config import IMAGENET_MEAN, IMAGENET_STD, DetectorSettings, replaced
from clsnf.core.errors import SettingsError

T = TypeVar("T")

# In percent in the authors' tables; everywhere else metrics are in [0, 1].
_METRICS = ("image_auroc", "pixel_ap", "pixel_auroc", "au_pro_200_steps")


@dataclass(frozen=True)
class Preset:
    """The settings of the authors' scripts for one category: a row of their table.

    Attributes:
        dataset, category: names as the data sets have them; empty for settings that several
            categories share.
        finetune_lr, finetune_batch: stage one's learning rate and images per step.
        warmup: whether stage one's learning rate rises first; false in all of their scripts.
        freeze_epochs, joint_epochs: epochs of the decoder alone, then of decoder and backbone.
        passes_per_epoch, repeat: passes over the images in an epoch, and how often each pass shows
            an image.
        in_domain: true: half of the defects are filled from other images of the category; false:
            all are filled from textures.
        levels: feature levels of the backbone.
        loss: stage one's loss.
        flow_lr, flow_batch: stage two's learning rate and images per batch; a step takes 256
            feature vectors of a batch.
        flow_epochs, flow_passes: meta epochs, and passes over the images in each.
        base_flow_epochs, base_flow_passes: the same for the baseline on the pretrained backbone.
        w_fe: weight of the classifier's map, which is added to the sum over the levels.
    """

    dataset: str
    category: str
    finetune_lr: float
    finetune_batch: int
    warmup: bool
    freeze_epochs: int
    joint_epochs: int
    passes_per_epoch: int
    repeat: int
    in_domain: bool
    levels: tuple[int, ...]
    loss: str
    flow_lr: float
    flow_batch: int
    flow_epochs: int
    flow_passes: int
    base_flow_epochs: int
    base_flow_passes: int
    w_fe: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float):
                _check(0 < value < math.inf, name, value, "above 0 and finite")
            if type(value) is int:
                _check(value >= 1, name, value, "1 or more")
        rising = bool(self.levels) and list(self.levels) == sorted(set(self.levels))
        _check(rising, "levels", self.levels, "levels in rising order")

    @property
    def recipe(self) -> Preset:
        """The settings without the names: equal for categories that have the same settings."""
        return dataclasses.replace(self, dataset="", category="")

    @property
    def fusion_weight(self) -> float:
        """w = w_fe / (L + w_fe) in the fused map (1 - w) a_nf + w a_cls.

        The authors weight the sum over the L levels, not their mean.
        """
        return self.w_fe / (len(self.levels) + self.w_fe)

    @property
    def baseline_passes(self) -> float:
        """``flow.passes`` of the baseline: flows on the pretrained backbone."""
        return float(self.base_flow_epochs * self.base_flow_passes)

    @property
    def overrides(self) -> dict[str, Any]:
        """The values of all settings that the authors decided, by dotted name.

        What is not in the table is the same for all categories. The learning rate of the flows
        rises over 2 of 25 meta epochs, a share of 0.08; for BTAD's 8 meta epochs the same share is
        assumed.
        """
        return {
            "image.height": 256,
            "image.width": 256,
            "image.aspect": "squeeze",
            "image.interpolation": "bilinear",
            "backbone.name": "wide_resnet50_2",
            "backbone.join": "none",
            "backbone.mean": IMAGENET_MEAN,
            "backbone.std": IMAGENET_STD,
            "backbone.levels": self.levels,
            "defects.max_transparency": 0.8,
            "defects.texture_share": 0.5 if self.in_domain else 1.0,
            "defects.max_frequency_power": 5,
            "defects.threshold": 0.5,
            "finetune.frozen_epochs": self.freeze_epochs,
            "finetune.joint_epochs": self.joint_epochs,
            "finetune.schedule": "cosine",
            "finetune.repeats": self.passes_per_epoch * self.repeat,
            "finetune.batch_size": self.finetune_batch,
            "finetune.learning_rate": self.finetune_lr,
            "finetune.backbone_factor": 1.0,
            "finetune.weight_decay": 1e-4,
            "finetune.loss": self.loss,
            "finetune.target": "signed",
            "finetune.skips": True,
            "finetune.decoder": "authors",
            "flow.depth": 6,
            "flow.start": "random",
            "flow.neighbourhood": 1,
            "flow.memory": 0,
            "flow.passes": float(self.flow_epochs * self.flow_passes),
            "flow.vectors_per_step": 256,
            "flow.learning_rate": self.flow_lr,
            "flow.warmup": 0.08,
            "flow.clamp": 1.9,
            "flow.permutation": "soft",
            "flow.condition_dims": 128,
            "flow.levels": "mean",
            "flow.level_quantile": 1.0,
            "smoothing": 0.0,
            "fusion_weight": self.fusion_weight,
        }

    @property
    def settings(self) -> DetectorSettings:
        """The defaults with these overrides."""
        return replaced(DetectorSettings(), self.overrides)


@dataclass(frozen=True)
class PublishedMetrics:
    """The authors' test metrics for one category in percent: means of three runs.

    Their AU-PRO has 200 thresholds, and regions whose holes are filled.
    """

    dataset: str
    category: str
    image_auroc: float
    pixel_ap: float
    pixel_auroc: float
    au_pro_200_steps: float

    def __post_init__(self) -> None:
        for name in _METRICS:
            value = getattr(self, name)
            _check(0 <= value <= 100, name, value, "a percentage")


def _check(ok: bool, name: str, value: Any, rule: str) -> None:
    if not ok:
        raise SettingsError(f"{name} is {value!r}: it must be {rule}.")


# ---- by category ----


def presets() -> dict[str, Preset]:
    """The authors' settings of each category, by its name."""
    return dict(_presets())


def preset_for(category: str | None) -> Preset:
    """The authors' settings for a category; :func:`common_preset` if they have none for it."""
    return _presets().get(category or "") or common_preset()


def common_preset() -> Preset:
    """The settings that most of the authors' categories have, without a name.

    It is a complete row of their table, not the most frequent value of each column.
    """
    (recipe, _), *_ = Counter(preset.recipe for preset in _presets().values()).most_common(1)
    return recipe


def sharing(preset: Preset) -> list[str]:
    """The authors' categories that have exactly these settings."""
    return [name for name, other in _presets().items() if other.recipe == preset.recipe]


def published_metrics(category: str) -> dict[str, float] | None:
    """The authors' test metrics for a category, in [0, 1]; None if they have none.

    Returns:
        ``image_auroc``, ``pixel_ap``, ``pixel_auroc``, and ``au_pro_200_steps``, which differs
        slightly from AU-PRO as :mod:`clsnf.metrics` computes it.
    """
    found = _metrics().get(category)
    if found is None:
        return None
    return {name: round(getattr(found, name) / 100, 6) for name in _METRICS}


@cache
def _presets() -> Mapping[str, Preset]:
    return {row.category: row for row in _asset(Preset, "authors_presets.csv")}


@cache
def _metrics() -> Mapping[str, PublishedMetrics]:
    return {row.category: row for row in _asset(PublishedMetrics, "authors_metrics.csv")}


def _asset(cls: type[T], name: str) -> list[T]:
    text = (resources.files("clsnf") / "assets" / name).read_text(encoding="utf-8")
    return parse_rows(cls, text, name)


# ---- reading ----


def parse_rows(cls: type[T], text: str, where: str) -> list[T]:
    """The rows of a CSV table as objects of the dataclass `cls`, whose fields are the columns.

    Lines that start with ``#`` are comments. Booleans are ``yes`` or ``no``, levels a range such as
    ``2-4``.

    Raises:
        SettingsError: a column or cell is missing, unknown or of the wrong type, or a value is out
            of its range; with the number of the line.
    """
    kinds = typing.get_type_hints(cls)
    numbered = [
        (number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.startswith("#")
    ]
    reader = csv.DictReader(line for _, line in numbered)
    wrong = sorted(set(kinds) ^ set(reader.fieldnames or ()))
    if wrong:
        problem = "missing" if wrong[0] in kinds else "unknown"
        raise SettingsError(f"{where}: the column {wrong[0]!r} is {problem}.")
    rows = []
    for cells in reader:
        try:
            if None in cells or None in cells.values():
                raise SettingsError(f"it must have {len(kinds)} cells.")
            values = {name: _cell(name, cells[name], kind) for name, kind in kinds.items()}
            rows.append(cls(**values))
        except SettingsError as error:
            line = numbered[reader.line_num - 1][0]
            raise SettingsError(f"{where}, line {line}: {error}") from error
    return rows


def _cell(name: str, text: str, kind: Any) -> Any:
    """The value of a cell, of its column's type."""
    readers: dict[Any, tuple[Callable[[str], Any], str]] = {
        str: (str, "a text"),
        int: (int, "a whole number"),
        float: (float, "a number"),
        bool: ({"yes": True, "no": False}.__getitem__, "yes or no"),
        tuple[int, ...]: (_levels, "levels such as 2-4"),
    }
    read, rule = readers[kind]
    try:
        return read(text)
    except (ValueError, KeyError) as error:
        raise SettingsError(f"{name} is {text!r}: it must be {rule}.") from error


def _levels(text: str) -> Sequence[int]:
    first, _, last = text.partition("-")
    return tuple(range(int(first), int(last or first) + 1))
