"""Settings: one frozen, validated dataclass per stage.

The command line's flags, the YAML keys and the tables in ``docs/settings.md`` are all made from
these classes: a field's ``help`` is its documentation. Unusual: a settings object is *content*. Its
canonical form (:func:`to_dict`) is hashed into the names of stored stages, so a field that does not
change a result must not live here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from clsnf.core.errors import SettingsError, nearest

T = TypeVar("T")

STREAMS = ("auto", "local", "ray")  # what can bring images to training; it changes no result


def setting(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with its one-line documentation and, for strings, the valid choices."""
    return field(default=default, metadata={"help": help, "choices": choices})


def _check(owner: object, name: str, ok: bool, rule: str) -> None:
    if not ok:
        raise SettingsError(
            f"{type(owner).__name__}.{name} is {getattr(owner, name)!r}: it must be {rule}."
        )


def _check_choices(owner: Any) -> None:
    for f in dataclasses.fields(owner):
        choices = f.metadata.get("choices")
        value = getattr(owner, f.name)
        if choices and value not in choices:
            raise SettingsError(
                f"{type(owner).__name__}.{f.name} is {value!r}.{nearest(str(value), choices)}"
            )


@dataclass(frozen=True)
class ImageSettings:
    """How an image file becomes the network's input: the same for training, prediction and serving."""

    height: int = setting(256, "height of the network's input in pixels")
    width: int = setting(256, "width of the network's input in pixels")
    aspect: str = setting(
        "squeeze",
        "squeeze: resize to height x width whatever the shape; fit: keep the shape and pad "
        "(padding counts as no pixel)",
        ("squeeze", "fit"),
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("height", "width"):
            value = getattr(self, name)
            _check(
                self,
                name,
                isinstance(value, int) and 32 <= value <= 4096 and value % 32 == 0,
                "a multiple of 32 from 32 to 4096",
            )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width


@dataclass(frozen=True)
class BackboneSettings:
    """The shared feature extractor, a timm architecture."""

    name: str = setting(
        "resnet18", "a timm model name, or 'demo' for the small backbone that ships with clsnf"
    )
    levels: tuple[int, ...] = setting(
        (1, 2, 3),
        "timm's feature stages, shallow to deep (ResNets: 1, 2, 3, 4 = strides 4, 8, 16, 32)",
    )
    weights: str | None = setting(
        None,
        "a weights file (.safetensors, .pth, .pt, .bin); without it, timm's pretrained weights",
    )

    def __post_init__(self) -> None:
        _check(self, "name", bool(self.name), "a timm model name")
        ok = len(self.levels) > 0 and all(isinstance(v, int) and v >= 0 for v in self.levels)
        _check(
            self,
            "levels",
            ok and list(self.levels) == sorted(set(self.levels)),
            "different stages in rising order, such as 1,2,3",
        )


@dataclass(frozen=True)
class DefectSettings:
    """Synthetic training defects (METHOD: DRAEM's recipe)."""

    max_transparency: float = setting(
        0.8, "defects are blended in with opacity 1 - b, b uniform in [0, this]"
    )
    texture_share: float = setting(
        0.5,
        "share of defects filled from textures; the rest from other normal images of the category",
    )
    object_mask: str = setting(
        "auto",
        "cut defects to the product: auto decides from the normal images; off, dark (a dark "
        "product), bright",
        ("auto", "off", "dark", "bright"),
    )
    max_frequency_power: int = setting(
        5, "Perlin noise: each axis's frequency is drawn from 2^0 to 2^this"
    )
    threshold: float = setting(0.5, "Perlin noise above this is defect")

    def __post_init__(self) -> None:
        _check_choices(self)
        _check(self, "max_transparency", 0 <= self.max_transparency < 1, "in [0, 1)")
        _check(self, "texture_share", 0 <= self.texture_share <= 1, "in [0, 1]")
        _check(self, "max_frequency_power", 0 <= self.max_frequency_power <= 7, "from 0 to 7")
        _check(self, "threshold", 0 < self.threshold < 1, "in (0, 1)")


@dataclass(frozen=True)
class FinetuneSettings:
    """Stage one: decoder and backbone learn to find synthetic defects."""

    frozen_epochs: int = setting(8, "epochs in which the decoder alone trains")
    joint_epochs: int = setting(
        8,
        "epochs in which decoder and backbone train together, after those (0: the backbone stays "
        "as it is)",
    )
    schedule: str = setting(
        "trunk",
        "learning rate; trunk: constant, then falling over the last decay_epochs (runs of "
        "different length share work); "
        "cosine: falling from the first step to 1e-3 of the start, as the authors (they share "
        "none)",
        ("trunk", "cosine"),
    )
    decay_epochs: int = setting(
        3, "with schedule=trunk, the learning rate falls to nothing over this many last epochs"
    )
    repeats: int = setting(
        1, "how often each image appears in an epoch, each time with a fresh defect"
    )
    batch_size: int = setting(8, "images per step")
    learning_rate: float = setting(2e-3, "Adam's learning rate for the decoder")
    backbone_factor: float = setting(
        0.05, "the backbone's learning rate as a share of the decoder's"
    )
    weight_decay: float = setting(1e-4, "Adam's weight decay")
    loss: str = setting(
        "soft",
        "soft: cross-entropy against the soft target; hard: against 0 and 1, weighted; "
        "regression: L1 to the change of each pixel; "
        "focal, dice: against 0 and 1, meant to overfit synthetic defects less",
        ("soft", "hard", "regression", "focal", "dice"),  # the names in clsnf/training/losses.py
    )
    target: str = setting(
        "absolute",
        "soft target of a defect: sigmoid(5 d), d the mean colour difference to the clean image; "
        "absolute: |d|, signed: d as the authors",
        ("absolute", "signed"),
    )
    decoder: str = setting(
        "compact",
        "compact: small and fast; authors: their decoder, a ResNet turned round, of many times "
        "the size",
        ("compact", "authors"),
    )
    decoder_width: int = setting(128, "largest number of channels in the compact decoder")
    skips: bool = setting(
        True, "the decoder sees all levels of the backbone; false: the deepest alone"
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("frozen_epochs", "joint_epochs"):
            _check(self, name, getattr(self, name) >= 0, "0 or more")
        for name in ("decay_epochs", "repeats", "batch_size"):
            _check(self, name, getattr(self, name) >= 1, "1 or more")
        _check(self, "learning_rate", 0 < self.learning_rate < math.inf, "above 0 and finite")
        _check(self, "backbone_factor", 0 < self.backbone_factor <= 1, "in (0, 1]")
        _check(self, "weight_decay", 0 <= self.weight_decay < math.inf, "0 or more and finite")
        _check(self, "decoder_width", self.decoder_width >= 16, "16 or more")

    @property
    def epochs(self) -> int:
        """All epochs, frozen and joint."""
        return self.frozen_epochs + self.joint_epochs


@dataclass(frozen=True)
class FlowSettings:
    """Stage two: conditional normalizing flows learn the density of normal features, one flow a
    level.
    """

    depth: int = setting(2, "coupling blocks of each flow (0, with start=data: a Gaussian)")
    start: str = setting(
        "data",
        "data: whiten by the features' mean and covariance and start from that Gaussian; random: "
        "as the authors",
        ("data", "random"),
    )
    neighbourhood: int = setting(
        3, "vectors are means over a square of this many cells a side (odd; 1: as the authors)"
    )
    covariance: str = setting(
        "local",
        "with start=data: one covariance for the whole map (shared), or one for each part of it "
        "(local)",
        ("local", "shared"),
    )
    memory: int = setting(
        2000,
        "normal vectors remembered at each level: the distance to the nearest joins the density "
        "map (0: none, as the authors)",
    )
    passes: float = setting(2.0, "how often training sees each feature vector")
    vectors_per_step: int = setting(2048, "feature vectors in a step")
    learning_rate: float = setting(1e-3, "Adam's learning rate")
    warmup: float = setting(
        0.08, "share of the steps in which the learning rate rises; then it falls as a cosine"
    )
    clamp: float = setting(1.9, "affine clamp of a coupling block")
    permutation: str = setting(
        "soft",
        "between coupling blocks: soft (a random rotation) or hard (a shuffle)",
        ("soft", "hard"),
    )
    condition_dims: int = setting(128, "size of the sine-cosine encoding of a vector's place")
    levels: str = setting(
        "mean",
        "mean: levels are averaged by their likelihoods as they are; tails: each is first scaled "
        "by how rare its values are",
        ("mean", "tails"),
    )
    level_quantile: float = setting(
        1.0,
        "with levels=mean: the level constant m is this quantile of the training vectors' "
        "log-likelihood (1: the largest)",
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        _check(
            self,
            "depth",
            self.depth >= (0 if self.start == "data" else 1),
            "0 or more (1 or more with start=random)",
        )
        _check(
            self,
            "neighbourhood",
            self.neighbourhood >= 1 and self.neighbourhood % 2 == 1,
            "an odd number",
        )
        _check(self, "memory", self.memory >= 0, "0 or more")
        _check(self, "passes", 0 < self.passes < math.inf, "above 0 and finite")
        _check(self, "vectors_per_step", self.vectors_per_step >= 2, "2 or more")
        _check(self, "learning_rate", 0 < self.learning_rate < math.inf, "above 0 and finite")
        _check(self, "warmup", 0 <= self.warmup < 1, "in [0, 1)")
        _check(self, "clamp", 0 < self.clamp < math.inf, "above 0 and finite")
        _check(
            self,
            "condition_dims",
            self.condition_dims > 0 and self.condition_dims % 4 == 0,
            "a positive multiple of 4",
        )
        _check(self, "level_quantile", 0.5 <= self.level_quantile <= 1, "in [0.5, 1]")


@dataclass(frozen=True)
class ValidationSettings:
    """What selection and the threshold rest on: held-out normal images, and defects that training
    never saw.
    """

    fraction: float = setting(0.15, "share of the normal training images that is held out")
    images_per_family: int = setting(16, "synthetic validation defects per defect family")
    false_reject_rate: float = setting(
        0.01, "share of normal products that the threshold may reject"
    )

    def __post_init__(self) -> None:
        _check(self, "fraction", 0 < self.fraction < 1, "in (0, 1)")
        _check(self, "images_per_family", self.images_per_family >= 1, "1 or more")
        _check(self, "false_reject_rate", 0 < self.false_reject_rate < 1, "in (0, 1)")


def _check_fusion(owner: Fusion | DetectorSettings) -> None:
    score_weight = owner.score_weight
    ok = score_weight is None or 0 <= score_weight <= 1
    _check(owner, "score_weight", ok, "null, or in [0, 1]")
    _check(owner, "smoothing", 0 <= owner.smoothing <= 32, "from 0 to 32")
    _check(owner, "fusion_weight", 0 <= owner.fusion_weight <= 1, "in [0, 1]")


@dataclass(frozen=True)
class Fusion:
    """How the density map and the classifier's map become the anomaly map and the image's score.

    Attributes:
        fusion_weight: share of the classifier's map in the anomaly map, in [0, 1].
        score_weight: the same share in the map whose largest value is the image's score; None: as
            `fusion_weight`.
        smoothing: sigma in pixels of a Gaussian over the fused map; 0: none.
    """

    fusion_weight: float
    score_weight: float | None = None
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_fusion(self)

    @property
    def image_weight(self) -> float:
        """The share of the classifier's map in the map that the image's score is taken from."""
        return self.fusion_weight if self.score_weight is None else self.score_weight


@dataclass(frozen=True)
class DetectorSettings:
    """Everything that decides what a detector becomes, apart from its data."""

    image: ImageSettings = field(default_factory=ImageSettings)
    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    defects: DefectSettings = field(default_factory=DefectSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    flow: FlowSettings = field(default_factory=FlowSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    fusion_weight: float = setting(0.25, "share of the classifier's map in the fused map")
    score_weight: float | None = setting(
        None,
        "the same share in the map whose largest value is the image's score (null: that of "
        "fusion_weight)",
    )
    smoothing: float = setting(0.0, "sigma in pixels of a Gaussian over the fused map (0: none)")
    seed: int = setting(0, "seed of everything random")

    def __post_init__(self) -> None:
        _check_fusion(self)
        # The generators' range, with room for the seeds that are derived from this one.
        _check(self, "seed", 0 <= self.seed < 2**32, "from 0 to 4294967295")

    @property
    def fusion(self) -> Fusion:
        """How the two maps are fused."""
        return Fusion(self.fusion_weight, self.score_weight, self.smoothing)

    @property
    def image_weight(self) -> float:
        """The fusion weight of the map that image scores are taken from."""
        return self.fusion.image_weight


@dataclass(frozen=True)
class StudySettings:
    """How a study searches; what it searches is its space (see :mod:`clsnf.study.space`)."""

    trials: int = setting(8, "trials of each category")
    objectives: tuple[str, ...] = setting(
        ("pixel_ap",),
        "the figure to raise: its mean over the validation defect families (see clsnf metrics); "
        "several give a Pareto front, "
        "latency (ms a picture) may be one of the others",
    )
    selection: str = setting(
        "mean",
        "how the winner is picked from the families' figures: mean, worst, leave_one_out, rank "
        "(see docs/study.md)",
    )
    stop_hopeless: bool = setting(
        True,
        "stop a trial on its way that is worse than three quarters of its category's others "
        "(where trials share no trunk)",
    )
    reuse: bool = setting(
        True, "trials share stages; false: each starts from scratch, for comparison"
    )
    refine: int = setting(
        3,
        "at the end the fusion weight is swept exactly for this many best (backbone, depth) of "
        "each category",
    )
    concurrent_trials: int = setting(
        0, "trials at once; 0: as many as the cluster's CPUs or GPUs carry"
    )
    cpus_per_trial: int = setting(
        0,
        "CPU cores of a trial; 0: an even share for one trial of each category at a time, four "
        "at most",
    )
    gpus_per_trial: float = setting(0.0, "GPUs of a trial, such as 1 or 0.25")
    stream: str = setting(
        "auto",
        "what brings images to training: the trial itself (local), workers of the cluster (ray), "
        "or what fits (auto)",
        STREAMS,
    )
    stream_cpus: int = setting(
        0, "CPU cores of a trial's ray stream, reserved with the trial; 0: 1"
    )

    def __post_init__(self) -> None:
        _check(self, "trials", self.trials >= 1, "1 or more")
        _check(
            self,
            "objectives",
            len(set(self.objectives)) == len(self.objectives) > 0,
            "different names, one or more",
        )
        _check(self, "refine", self.refine >= 1, "1 or more")
        _check(self, "concurrent_trials", self.concurrent_trials >= 0, "0 or more")
        _check(self, "cpus_per_trial", self.cpus_per_trial >= 0, "0 or more")
        _check(self, "gpus_per_trial", self.gpus_per_trial >= 0, "0 or more")
        _check(self, "stream_cpus", self.stream_cpus >= 0, "0 or more")
        _check_choices(self)

    @property
    def objective(self) -> str:
        """The first objective: what picks the winner."""
        return self.objectives[0]


def to_dict(settings: Any) -> dict[str, Any]:
    """Return a settings object as plain JSON types (tuples become lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    result: dict[str, Any] = plain(settings)
    return result


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "settings") -> T:
    """Build the settings class `cls` from plain JSON or YAML types.

    Raises:
        SettingsError: an unknown key (the nearest valid one is named), one that is missing and has
            no default, a value of the wrong type, or one out of its range.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(f"{where} must be a mapping of names to values, not {values!r}.")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise SettingsError(f"{where}: unknown setting {key!r}.{nearest(str(key), hints)}")
        arguments[key] = _coerce(hints[key], value, f"{where}.{key}")
    fields = dataclasses.fields(typing.cast(Any, cls))
    needed = [
        f.name
        for f in fields
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in needed if name not in arguments]
    if missing:
        raise SettingsError(f"{where}: {', '.join(missing)} must be given.")
    return cls(**arguments)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Turn a plain value into the type that a field declares, or say why it can't be."""
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if isinstance(hint, types.UnionType):  # "str | None" is the only union in use
        inner = next(h for h in typing.get_args(hint) if h is not type(None))
        return None if value is None else _coerce(inner, value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise SettingsError(f"{where} is {value!r}: it must be a list.")
        return tuple(_coerce(typing.get_args(hint)[0], v, where) for v in value)
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise SettingsError(f"{where} is {value!r}: it must be a mapping.")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise SettingsError(f"{where} is {value!r}: it must be of type {hint.__name__}.")
    return value


def setting_names(settings: Any) -> list[str]:
    """The dotted names of all settings of an object or its class, such as ``flow.depth``."""
    cls = settings if isinstance(settings, type) else type(settings)
    names = []
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            names += [f"{name}.{inner}" for inner in setting_names(hint)]
        else:
            names.append(name)
    return names


def value_at(settings: Any, name: str) -> Any:
    """The value of the setting with this dotted name.

    Raises:
        SettingsError: there is no such setting (the nearest name is given).
    """
    _check_names(settings, [name])
    return functools.reduce(getattr, name.split("."), settings)


def replaced(settings: T, values: Mapping[str, Any]) -> T:
    """The settings with other values, by dotted name: ``replaced(settings, {"flow.depth": 2})``.

    Values are plain JSON or YAML types, as in :func:`from_dict`. All are put in before any rule is
    checked, so their order does not matter.

    Raises:
        SettingsError: an unknown name (the nearest valid one is given), a value of the wrong type,
            or one out of its range.
    """
    _check_names(settings, values)
    return _replaced(settings, values, "settings")


def _replaced(settings: T, values: Mapping[str, Any], where: str) -> T:
    hints = typing.get_type_hints(type(settings))
    changes: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        first, _, rest = name.partition(".")
        if rest:
            sections.setdefault(first, {})[rest] = value
        else:
            changes[first] = _coerce(hints[first], value, f"{where}.{first}")
    for first, inner in sections.items():
        changes[first] = _replaced(getattr(settings, first), inner, f"{where}.{first}")
    return typing.cast(T, dataclasses.replace(typing.cast(Any, settings), **changes))


def _check_names(settings: Any, names: Iterable[str]) -> None:
    valid = setting_names(settings)
    for name in names:
        if name not in valid:
            raise SettingsError(f"There is no setting {name!r}.{nearest(name, valid)}")


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names: ``{"flow": {"depth": 2}}`` as
    ``{"flow.depth": 2}``.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """Lines for people: where two pieces of plain JSON differ, such as ``finetune.loss was 'soft',
    is 'dice'``.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys((*before, *now)):
            yield from differences(before.get(name), now.get(name), f"{where}.{name}".lstrip("."))
    elif before != now:
        name = where or "it"
        if before is None or now is None:
            yield f"{name} is new" if before is None else f"{name} is gone"
        elif (
            isinstance(before, str) and isinstance(now, str) and len(before) > 30
        ):  # hashes say nothing to people
            yield f"{name} has changed"
        else:
            yield f"{name} was {before!r}, is {now!r}"
