"""What the authors published: the settings of their scripts and their test figures, category by
category.

Both lie as tables beside the code (``assets/authors_presets.csv``, ``assets/authors_figures.csv``;
the first line of each names its source: S. Oh and J. Kim, IEEE Access 12 (2024), 75873-75887, and
their public repository). ``--preset paper`` is made from the first; reports compare with the
second. Unusual: settings that the authors keep for all categories are not in the table but in
:attr:`Preset.overrides`.
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

from clsnf.core.errors import SettingsError

T = TypeVar("T")

# In percent in the authors' tables; a figure of this project is a share.
_PERCENT = ("image_auroc", "pixel_ap", "pixel_auroc", "au_pro_200_steps")


@dataclass(frozen=True)
class Preset:
    """The settings of the authors' scripts for one category, a row of their table.

    Attributes:
        dataset, category: names as the data sets write them; empty for settings that several
            categories share.
        finetune_lr, finetune_batch: stage one's learning rate and images per step.
        warmup: whether stage one's learning rate rises first (in none of their scripts it does).
        freeze_epochs, joint_epochs: epochs of the decoder alone, then of decoder and backbone.
        passes_per_epoch, repeat: an epoch is so many passes over the images, each of which a pass
            shows `repeat` times.
        in_domain: whether half of the defects are filled from other images of the category; else
            textures fill all.
        levels: the backbone's stages.
        loss: stage one's loss.
        flow_lr, flow_batch: stage two's learning rate, and images per batch (256 of their vectors
            make a step).
        flow_epochs, flow_passes: meta epochs and passes over the images in each.
        base_flow_epochs, base_flow_passes: the same for the baseline on the pretrained backbone.
        w_fe: weight of the classifier's map where it is added to the sum over the levels.
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
            _check(
                not isinstance(value, float) or 0 < value < math.inf,
                name,
                value,
                "above 0 and finite",
            )
            _check(type(value) is not int or value >= 1, name, value, "1 or more")
        _check(
            bool(self.levels) and list(self.levels) == sorted(set(self.levels)),
            "levels",
            self.levels,
            "stages in rising order",
        )

    @property
    def recipe(self) -> Preset:
        """The same settings without a name: equal for categories that share all of them."""
        return dataclasses.replace(self, dataset="", category="")

    @property
    def fusion_weight(self) -> float:
        """w in (1 - w) a_nf + w a_cls: ``w_fe / (L + w_fe)``, because the authors add to the *sum*
        over L levels.
        """
        return self.w_fe / (len(self.levels) + self.w_fe)

    @property
    def baseline_passes(self) -> float:
        """``flow.passes`` of the baseline, flows on the pretrained backbone."""
        return float(self.base_flow_epochs * self.base_flow_passes)

    @property
    def overrides(self) -> dict[str, Any]:
        """Settings that differ from, or repeat, the defaults, as plain types by section;
        :class:`clsnf.core.config.DetectorSettings` takes them.

        What the table leaves out is the same for all categories. Learning rates of the flows rise
        over 2 of 25 meta epochs, a share of 0.08; for BTAD's 8 meta epochs that share is our
        reading.
        """
        return {
            "image": {"height": 256, "width": 256, "aspect": "squeeze"},
            "backbone": {"name": "wide_resnet50_2", "levels": list(self.levels)},
            "defects": {
                "max_transparency": 0.8,
                "texture_share": 0.5 if self.in_domain else 1.0,
                "max_frequency_power": 5,
                "threshold": 0.5,
            },
            "finetune": {
                "frozen_epochs": self.freeze_epochs,
                "joint_epochs": self.joint_epochs,
                "schedule": "cosine",
                "repeats": self.passes_per_epoch * self.repeat,
                "batch_size": self.finetune_batch,
                "learning_rate": self.finetune_lr,
                "backbone_factor": 1.0,
                "weight_decay": 1e-4,
                "loss": self.loss,
                "target": "signed",
                "skips": True,
                "decoder": "authors",
            },
            "flow": {
                "depth": 6,
                "start": "random",
                "neighbourhood": 1,
                "memory": 0,
                "passes": float(self.flow_epochs * self.flow_passes),
                "vectors_per_step": 256,
                "learning_rate": self.flow_lr,
                "warmup": 0.08,
                "clamp": 1.9,
                "permutation": "soft",
                "condition_dims": 128,
                "levels": "mean",
                "level_quantile": 1.0,
            },
            "smoothing": 0.0,
            "fusion_weight": self.fusion_weight,
        }


@dataclass(frozen=True)
class Figures:
    """The authors' test figures for one category in percent, mean of three runs; AU-PRO with 200
    thresholds and hole-filled regions.
    """

    dataset: str
    category: str
    image_auroc: float
    pixel_ap: float
    pixel_auroc: float
    au_pro_200_steps: float

    def __post_init__(self) -> None:
        for name in _PERCENT:
            value = getattr(self, name)
            _check(0 <= value <= 100, name, value, "a percentage")


def _check(ok: bool, name: str, value: Any, rule: str) -> None:
    if not ok:
        raise SettingsError(f"{name} is {value!r}: it must be {rule}.")


# ---- asking ----


def presets() -> dict[str, Preset]:
    """The authors' settings of each category, by its name."""
    return dict(_presets())


def preset_for(category: str | None) -> Preset:
    """The authors' settings for a category, or, where they have none (or for None), those that most
    of their categories share.

    The latter are one row of their table, a recipe that they did run, not the most frequent value
    of each column; its name is empty.
    """
    return _presets().get(category or "") or common_preset()


def common_preset() -> Preset:
    """The settings that most of the authors' categories share, without a name."""
    (recipe, _), *_ = Counter(preset.recipe for preset in _presets().values()).most_common(1)
    return recipe


def sharing(preset: Preset) -> list[str]:
    """Names of the authors' categories that have exactly these settings."""
    return [name for name, other in _presets().items() if other.recipe == preset.recipe]


def figures_for(category: str) -> dict[str, float] | None:
    """The authors' test figures for a category, as shares in [0, 1]; None where they have none.

    Returns:
        ``image_auroc``, ``pixel_ap``, ``pixel_auroc``, and ``au_pro_200_steps``, which is not quite
        AU-PRO as this project computes it.
    """
    found = _figures().get(category)
    return (
        None if found is None else {name: round(getattr(found, name) / 100, 6) for name in _PERCENT}
    )


@cache
def _presets() -> Mapping[str, Preset]:
    return {row.category: row for row in _asset(Preset, "authors_presets.csv")}


@cache
def _figures() -> Mapping[str, Figures]:
    return {row.category: row for row in _asset(Figures, "authors_figures.csv")}


def _asset(cls: type[T], name: str) -> list[T]:
    return parse_rows(
        cls, (resources.files("clsnf") / "assets" / name).read_text(encoding="utf-8"), name
    )


# ---- reading ----


def parse_rows(cls: type[T], text: str, where: str) -> list[T]:
    """The rows of a table with commas as objects of the dataclass `cls`, whose fields are its
    columns.

    Lines that start with ``#`` are notes. Numbers are plain, booleans ``yes`` or ``no``, stages a
    range such as ``2-4``.

    Raises:
        SettingsError: columns or cells are missing, unknown or not of their type, or a value is out
            of its range; with the line's number.
    """
    kinds = typing.get_type_hints(cls)
    lines = [
        (number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.startswith("#")
    ]
    reader = csv.DictReader(line for _, line in lines)
    wrong = sorted(set(kinds) ^ set(reader.fieldnames or ()))
    if wrong:
        raise SettingsError(
            f"{where}: the column {wrong[0]!r} is {'missing' if wrong[0] in kinds else 'unknown'}."
        )
    rows = []
    for cells in reader:
        try:
            if None in cells or None in cells.values():
                raise SettingsError(f"it must have {len(kinds)} cells.")
            rows.append(
                cls(**{name: _cell(name, cells[name], kind) for name, kind in kinds.items()})
            )
        except SettingsError as error:
            raise SettingsError(
                f"{where}, line {lines[reader.line_num - 1][0]}: {error}"
            ) from error
    return rows


def _cell(name: str, text: str, kind: Any) -> Any:
    """One cell as the type that its column declares."""
    readers: dict[Any, tuple[Callable[[str], Any], str]] = {
        str: (str, "a text"),
        int: (int, "a whole number"),
        float: (float, "a number"),
        bool: ({"yes": True, "no": False}.__getitem__, "yes or no"),
        tuple[int, ...]: (_levels, "stages such as 2-4"),
    }
    read, rule = readers[kind]
    try:
        return read(text)
    except (ValueError, KeyError) as error:
        raise SettingsError(f"{name} is {text!r}: it must be {rule}.") from error


def _levels(text: str) -> Sequence[int]:
    first, _, last = text.partition("-")
    return tuple(range(int(first), int(last or first) + 1))
