"""Settings: frozen, validated dataclasses, and the functions that read, replace and compare them.

The command line's flags, the YAML keys and the table in ``docs/settings.md`` come from these
classes: a field's ``help`` is its documentation.

The settings of a detector are hashed into the keys of stored artifacts (:func:`key_content`). A
setting that does not change a result must therefore not be a part of :class:`DetectorSettings`.
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

_LONGEST_SHOWN = 30  # characters of a value that a difference quotes; longer ones are mostly hashes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PYRAMID_NEIGHBOURHOOD = 3

STREAMS = ("auto", "local", "ray")  # what can load the images for training; results are the same


def setting(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with its documentation and, for strings, the valid choices."""
    return field(default=default, metadata={"help": help, "choices": choices})


def _check(owner: object, name: str, ok: bool, rule: str) -> None:
    """Raise SettingsError with the field's name, its value and the rule, unless it is `ok`."""
    if not ok:
        raise SettingsError(
            f"{type(owner).__name__}.{name} is {getattr(owner, name)!r}: it must be {rule}."
        )


def _check_choices(owner: Any) -> None:
    """Raise SettingsError for the first field whose value is none of its choices."""
    for f in dataclasses.fields(owner):
        choices = f.metadata.get("choices")
        value = getattr(owner, f.name)
        if choices and value not in choices:
            raise SettingsError(
                f"{type(owner).__name__}.{f.name} is {value!r}.{nearest(str(value), choices)}"
            )


@dataclass(frozen=True)
class ImageSettings:
    """How an image becomes the network's input, in training, prediction and serving alike."""

    height: int = setting(256, "height of the picture on the network's input in pixels")
    width: int = setting(256, "width of the picture on the network's input in pixels")
    aspect: str = setting(
        "squeeze",
        "squeeze: resize to height x width and change the aspect ratio; fit: keep the aspect ratio "
        "and pad (padding is never scored)",
        ("squeeze", "fit"),
    )
    jpeg_draft: bool = setting(
        False,
        "decode a JPEG at 1/2, 1/4 or 1/8 of its size where that is at least twice the size on the "
        "network's input: faster, and the input changes by a few levels",
    )
    interpolation: str = setting(
        "auto",
        "how pictures are resized, with antialiasing (auto: as those that the backbone's weights "
        "were trained on)",
        ("auto", "bilinear", "bicubic"),
    )
    multiple: int | None = setting(
        None,
        "the network's input has sides that are multiples of this many pixels; where the picture's "
        "are not, it lies in the middle, and the rest is padding, which is never scored (null: "
        "what the backbone needs)",
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("height", "width"):
            value = getattr(self, name)
            _check(self, name, 32 <= value <= 4096, "from 32 to 4096")
        ok = self.multiple is None or 1 <= self.multiple <= 1024
        _check(self, "multiple", ok, "null, or from 1 to 1024")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the network's input, the canvas."""
        multiple = self.multiple or 1
        return -(-self.height // multiple) * multiple, -(-self.width // multiple) * multiple

    @property
    def may_pad(self) -> bool:
        """Whether the canvas can have padding."""
        return self.aspect == "fit" or self.size != (self.height, self.width)


@dataclass(frozen=True)
class BackboneSettings:
    """The feature extractor that decoder and flows share: an architecture of timm's."""

    name: str = setting(
        "resnet18", "a timm model name, or 'demo' for the small backbone that ships with clsnf"
    )
    levels: tuple[int | float, ...] | None = setting(
        None,
        "feature levels, shallow to deep: by timm's numbers (ResNets: 1, 2, 3, 4 have strides 4, "
        "8, 16, 32), or as shares of the depth (0.4, 0.6, 0.8). null: strides 4 to 16 of a "
        "pyramid, a band in the middle of a transformer",
    )
    weights: str | None = setting(
        None,
        "a weights file (.safetensors, .pth, .pt, .bin), or a folder of such files that are named "
        "after their models; without it, timm's pretrained weights",
    )
    join: str = setting(
        "auto",
        "levels of equal stride. mean: become one, their mean; none: stay apart; auto: mean for "
        "transformers, none for pyramids",
        ("auto", "mean", "none"),
    )
    mean: tuple[float, ...] | None = setting(
        None,
        "mean of red, green and blue, in [0, 1], that is subtracted from images (null: what the "
        "weights were trained with)",
    )
    std: tuple[float, ...] | None = setting(
        None,
        "standard deviation of red, green and blue that images are divided by (null: what the "
        "weights were trained with)",
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        _check(self, "name", bool(self.name), "a timm model name")
        if self.levels is not None:
            ok = 0 < len(self.levels) <= 32
            ok = ok and list(self.levels) == sorted(set(self.levels))
            numbers = all(isinstance(v, int) and v >= 0 for v in self.levels)
            shares = all(isinstance(v, float) and 0 < v <= 1 for v in self.levels)
            rule = "different levels in rising order, such as 1,2,3, or shares such as 0.4,0.6,0.8"
            _check(self, "levels", ok and (numbers or shares), rule)
        for name in ("mean", "std"):
            least, values = 0 if name == "mean" else 1e-6, getattr(self, name)
            ok = values is None or (len(values) == 3 and all(least <= v <= 1 for v in values))
            _check(self, name, ok, "null, or three numbers in [0, 1], such as 0.5,0.5,0.5")

    @property
    def level_numbers(self) -> tuple[int, ...]:
        """The levels by timm's numbers, of resolved settings."""
        assert self.levels is not None, "resolve the settings first"
        return tuple(map(int, self.levels))


@dataclass(frozen=True)
class DefectSettings:
    """Synthetic training defects, made as in DRAEM: Perlin-noise shapes filled with textures."""

    max_transparency: float = setting(
        0.8, "a defect's transparency is uniform in [0, this]; its opacity is 1 - transparency"
    )
    texture_share: float = setting(
        0.5,
        "share of defects that are filled from textures; the others are filled from other normal "
        "images of the category",
    )
    object_mask: str = setting(
        "auto",
        "restrict defects to the product. auto: decided from the normal images; off: not "
        "restricted; dark: the product is darker than its background; bright: it is brighter",
        ("auto", "off", "dark", "bright"),
    )
    max_frequency_power: int = setting(
        5, "Perlin noise: the frequency of each axis is drawn from 2^0 to 2^this"
    )
    threshold: float = setting(0.5, "Perlin noise: pixels above this value are defect")

    def __post_init__(self) -> None:
        _check_choices(self)
        _check(self, "max_transparency", 0 <= self.max_transparency < 1, "in [0, 1)")
        _check(self, "texture_share", 0 <= self.texture_share <= 1, "in [0, 1]")
        _check(self, "max_frequency_power", 0 <= self.max_frequency_power <= 7, "from 0 to 7")
        _check(self, "threshold", 0 < self.threshold < 1, "in (0, 1)")


_WSD_BEFORE = "trunk"  # what schedule="wsd" was called: in older files, and still in artifact keys


@dataclass(frozen=True)
class FinetuneSettings:
    """Stage one: decoder and backbone learn to find synthetic defects."""

    frozen_epochs: int = setting(8, "epochs in which the decoder alone trains")
    joint_epochs: int = setting(
        8,
        "epochs after those, in which decoder and backbone train together (0: the backbone keeps "
        "its pretrained weights)",
    )
    schedule: str = setting(
        "wsd",
        "learning-rate schedule. wsd (warm-up, stable, decay): constant after a short warm-up, "
        "then falling over the last decay_epochs; runs of different length share the stable part. "
        "cosine: falling from the first step to 1e-3 of the start, as the authors; runs share "
        "nothing",
        ("wsd", "cosine"),
    )
    decay_epochs: int = setting(
        3, "with schedule=wsd: the learning rate falls to 0 over this many last epochs"
    )
    repeats: int = setting(
        1, "how often an epoch shows each image, each time with a new synthetic defect"
    )
    batch_size: int = setting(8, "images per step")
    learning_rate: float = setting(2e-3, "Adam's learning rate for the decoder")
    backbone_factor: float = setting(
        0.05, "the backbone's learning rate, as a share of the decoder's"
    )
    layer_decay: float = setting(
        1.0,
        "each of the backbone's layers has this times the learning rate of the next deeper one; "
        "the deepest that feeds a level has backbone_factor's (0.65 to 0.9 is usual for "
        "transformers; 1: all have the same)",
    )
    trained_layers: int | None = setting(
        None,
        "how many of the backbone's last layers the joint epochs train, a transformer's blocks for "
        "example, counted from the deepest that feeds a level (null: all; 0: none, the backbone "
        "keeps its pretrained weights)",
    )
    weight_decay: float = setting(1e-4, "Adam's weight decay")
    loss: str = setting(
        "soft",
        "soft: cross-entropy against the soft target; hard: weighted cross-entropy against 0 and "
        "1; regression: L1 distance to the colour change of each pixel; focal, dice: focal and "
        "dice loss against 0 and 1, meant to overfit synthetic defects less",
        ("soft", "hard", "regression", "focal", "dice"),  # the names in clsnf/training/losses.py
    )
    target: str = setting(
        "absolute",
        "soft target of a defect's pixel: sigmoid(5 d), where d is the mean colour difference to "
        "the clean image. absolute: |d|; signed: d with its sign, as the authors",
        ("absolute", "signed"),
    )
    decoder: str = setting(
        "compact",
        "compact: small and fast; authors: the authors' decoder, a mirrored ResNet of many times "
        "the size",
        ("compact", "authors"),
    )
    decoder_width: int = setting(128, "largest number of channels in the compact decoder")
    skips: bool = setting(
        True, "true: the decoder sees all levels of the backbone; false: only the deepest"
    )

    def __post_init__(self) -> None:
        if self.schedule == _WSD_BEFORE:
            object.__setattr__(self, "schedule", "wsd")
        _check_choices(self)
        for name in ("frozen_epochs", "joint_epochs"):
            _check(self, name, getattr(self, name) >= 0, "0 or more")
        for name in ("decay_epochs", "repeats", "batch_size"):
            _check(self, name, getattr(self, name) >= 1, "1 or more")
        _check(self, "learning_rate", 0 < self.learning_rate < math.inf, "above 0 and finite")
        _check(self, "backbone_factor", 0 < self.backbone_factor <= 1, "in (0, 1]")
        _check(self, "layer_decay", 0 < self.layer_decay <= 1, "in (0, 1]")
        layers = self.trained_layers
        _check(self, "trained_layers", layers is None or layers >= 0, "null, or 0 or more")
        _check(self, "weight_decay", 0 <= self.weight_decay < math.inf, "0 or more and finite")
        _check(self, "decoder_width", 16 <= self.decoder_width <= 4096, "from 16 to 4096")

    @property
    def epochs(self) -> int:
        """The number of all epochs, frozen and joint."""
        return self.frozen_epochs + self.joint_epochs

    @property
    def trains_backbone(self) -> bool:
        """Whether the backbone's weights change."""
        return self.joint_epochs > 0 and self.trained_layers != 0


@dataclass(frozen=True)
class FlowSettings:
    """Stage two: conditional normalizing flows, one per level, learn normal features' density."""

    depth: int = setting(
        2, "coupling blocks of each flow (0 is allowed with start=data: a Gaussian)"
    )
    start: str = setting(
        "data",
        "data: whiten with the features' mean and covariance, so that training starts from that "
        "Gaussian; random: no whitening, as the authors",
        ("data", "random"),
    )
    neighbourhood: int | None = setting(
        None,
        "each feature vector is the mean over a square with this side, in cells of the feature map "
        "(odd; 1: no mean, as the authors; null: 3 for pyramids, 1 for transformers, whose cells "
        "are large)",
    )
    covariance: str = setting(
        "local",
        "with start=data. shared: one covariance for the whole map; local: one for each tile of "
        "the map",
        ("local", "shared"),
    )
    memory: int = setting(
        2000,
        "normal feature vectors in the memory bank of each level; the distance to the nearest one "
        "becomes a part of the density map (0: no memory bank, as the authors)",
    )
    passes: float = setting(2.0, "how often training sees each feature vector")
    vectors_per_step: int = setting(2048, "feature vectors per step")
    learning_rate: float = setting(1e-3, "Adam's learning rate")
    warmup: float = setting(
        0.08, "share of the steps in which the learning rate rises; then it falls as a cosine"
    )
    clamp: float = setting(1.9, "clamp of the affine transform of a coupling block")
    permutation: str = setting(
        "soft",
        "of channels, between coupling blocks. soft: a random rotation; hard: a shuffle",
        ("soft", "hard"),
    )
    condition_dims: int = setting(128, "size of the sine-cosine encoding of a vector's position")
    levels: str = setting(
        "mean",
        "how levels are averaged. mean: by their likelihoods; tails: each level is first scaled by "
        "how rare its values are",
        ("mean", "tails"),
    )
    level_quantile: float = setting(
        1.0,
        "with levels=mean: the level constant m is this quantile of the training vectors' "
        "log-likelihoods (1: the largest)",
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        least = 0 if self.start == "data" else 1
        deep = least <= self.depth <= 128
        _check(self, "depth", deep, "from 0 to 128 (from 1 with start=random)")
        side = self.neighbourhood
        odd = side is None or (1 <= side <= 255 and side % 2 == 1)
        _check(self, "neighbourhood", odd, "null, or an odd number up to 255")
        _check(self, "memory", 0 <= self.memory <= 1_000_000, "from 0 to 1000000")
        _check(self, "passes", 0 < self.passes < math.inf, "above 0 and finite")
        _check(self, "vectors_per_step", self.vectors_per_step >= 2, "2 or more")
        _check(self, "learning_rate", 0 < self.learning_rate < math.inf, "above 0 and finite")
        _check(self, "warmup", 0 <= self.warmup < 1, "in [0, 1)")
        _check(self, "clamp", 0 < self.clamp < math.inf, "above 0 and finite")
        fours = 0 < self.condition_dims <= 4096 and self.condition_dims % 4 == 0
        _check(self, "condition_dims", fours, "a positive multiple of 4 up to 4096")
        _check(self, "level_quantile", 0.5 <= self.level_quantile <= 1, "in [0.5, 1]")

    @property
    def side(self) -> int:
        """The neighbourhood's side in cells; a pyramid's where it is open."""
        return PYRAMID_NEIGHBOURHOOD if self.neighbourhood is None else self.neighbourhood


@dataclass(frozen=True)
class ValidationSettings:
    """Validation: held-out normal images, and synthetic defects of families unknown to training."""

    fraction: float = setting(0.15, "share of the normal training images that is held out")
    images_per_family: int = setting(16, "synthetic validation images of each defect family")
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
    """Everything but the data that decides what a detector becomes."""

    image: ImageSettings = field(default_factory=ImageSettings)
    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    defects: DefectSettings = field(default_factory=DefectSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    flow: FlowSettings = field(default_factory=FlowSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    fusion_weight: float = setting(0.25, "share of the classifier's map in the fused map")
    score_weight: float | None = setting(
        None,
        "the same share for the image's score, the largest value of a fused map of its own (null: "
        "as fusion_weight)",
    )
    smoothing: float = setting(0.0, "sigma in pixels of a Gaussian over the fused map (0: none)")
    seed: int = setting(0, "seed of all that is random")

    def __post_init__(self) -> None:
        _check_fusion(self)
        # Below the random generators' limit, because other seeds are derived from this one.
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
    """How a study searches. What it searches is its search space, see :mod:`clsnf.study.space`."""

    trials: int | None = setting(
        8, "trials of each category; null: as many as total_trials or the deadline allow"
    )
    total_trials: int = setting(
        0,
        "trials of all categories together; after 3 each, the next goes to the category with the "
        "most to gain; 0: no such limit",
    )
    target: float | None = setting(
        None, "a category's search ends when its objective reaches this; null: never"
    )
    plateau: int = setting(
        0, "a category's search ends after so many trials without an improvement; 0: never"
    )
    share_points: bool = setting(
        False,
        "after its first points, a category tries the points that are best for other categories, "
        "two at most",
    )
    objectives: tuple[str, ...] = setting(
        ("pixel_ap",),
        "the metric to maximise, its mean over the families of validation defects (see clsnf "
        "metrics). Several metrics give a Pareto front; all but the first may be latency (ms per "
        "image), which is minimised",
    )
    sampler: str = setting(
        "tpe",
        "what suggests trials: tpe, gp, cmaes, random, or a class derived from "
        "optuna.samplers.BaseSampler by its import path, package.module:Class",
    )
    selection: str = setting(
        "mean",
        "how the winner is chosen from the metrics of the families: mean, worst, leave_one_out, "
        "rank (see docs/study.md)",
    )
    stop_hopeless: bool = setting(
        True,
        "stop a running trial that is worse than three quarters of the other trials of its "
        "category (only where trials do not share their training)",
    )
    reuse: bool = setting(
        True, "trials share artifacts; false: each trial trains from scratch, for comparison"
    )
    refine: int = setting(
        3,
        "the winner is chosen among the swept fusion weights of this many best trials of each "
        "category",
    )
    regret: bool | None = setting(
        None,
        "compute what the winner loses against an oracle that picks on the test images, which all "
        "trials' networks must see for it; none: where that is cheap (docs/study.md)",
    )
    concurrent_trials: int = setting(
        0, "trials at the same time; 0: as many as the cluster's CPUs or GPUs allow"
    )
    cpus_per_trial: int = setting(
        0,
        "CPU cores of each trial; 0: an equal share for one trial per category, 4 at most",
    )
    gpus_per_trial: float = setting(0.0, "GPUs of each trial, such as 1 or 0.25")
    stream: str = setting(
        "auto",
        "what loads the images for training. local: the trial itself; ray: workers of the "
        "cluster; auto: what fits",
        STREAMS,
    )
    stream_cpus: int = setting(
        0, "CPU cores of a trial's ray stream, reserved together with the trial; 0: 1 core"
    )
    patience: float = setting(
        1800.0,
        "seconds for which a study waits for what is away: a full disk, an object store, the "
        "Optuna storage",
    )
    trial_timeout: float = setting(
        1800.0,
        "seconds without progress after which a trial is ended and begun again, and failed the "
        "second time; 0: never",
    )

    def __post_init__(self) -> None:
        _check(self, "trials", self.trials is None or self.trials >= 1, "1 or more")
        _check(self, "refine", self.refine >= 1, "1 or more")
        for name in (
            "total_trials",
            "plateau",
            "concurrent_trials",
            "cpus_per_trial",
            "gpus_per_trial",
            "stream_cpus",
            "patience",
            "trial_timeout",
        ):
            _check(self, name, getattr(self, name) >= 0, "0 or more")
        finite = self.target is None or math.isfinite(self.target)
        _check(self, "target", finite, "a finite number")
        different = len(set(self.objectives)) == len(self.objectives) > 0
        _check(self, "objectives", different, "different names, one or more")
        _check_choices(self)

    @property
    def objective(self) -> str:
        """The first objective: it decides the winner."""
        return self.objectives[0]


def to_dict(settings: Any) -> dict[str, Any]:
    """A settings object as plain JSON types (tuples become lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    result: dict[str, Any] = plain(settings)
    return result


def key_content(settings: DetectorSettings | FinetuneSettings | ImageSettings) -> dict[str, Any]:
    """:func:`to_dict` for content keys (:func:`clsnf.core.hashing.content_key`).

    A value that has been renamed keeps its first name here, and a setting that came later is left
    out where it changes nothing, so that artifacts which were stored before are still found.
    """
    content = to_dict(settings)
    finetune, image = content.get("finetune", content), content.get("image", content)
    if finetune.get("schedule") == "wsd":
        finetune["schedule"] = _WSD_BEFORE
    if image.get("jpeg_draft") is False:
        del image["jpeg_draft"]
    if image.get("interpolation") == "bilinear":
        del image["interpolation"]
    if "multiple" in image and from_dict(ImageSettings, to_dict(image)).size == (
        image["height"],
        image["width"],
    ):
        del image["multiple"]
    if "joint_epochs" in finetune:
        _drop_idle_layers(finetune)
    return content


def _drop_idle_layers(finetune: dict[str, Any]) -> None:
    """Leave out of the content of :class:`FinetuneSettings` what says nothing about layers."""
    joint, trained = finetune["joint_epochs"], finetune["trained_layers"]
    if not joint or trained is None:
        del finetune["trained_layers"]
    if not joint or trained == 0 or finetune["layer_decay"] == 1:
        del finetune["layer_decay"]


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "settings") -> T:
    """Build an object of the settings class `cls` from plain JSON or YAML types.

    Args:
        cls: any dataclass; its fields may be dataclasses too.
        values: field names and their values; fields that are left out keep their defaults.
        where: what error messages call this mapping.

    Raises:
        SettingsError: an unknown key (the nearest valid one is named), a missing key without a
            default, a value of the wrong type, or a value out of its range.
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


def from_stored(values: Mapping[str, Any], where: str = "settings") -> DetectorSettings:
    """:func:`from_dict` for settings in a file that clsnf wrote.

    What an earlier version could not say is what it did: ImageNet's mean and deviation, bilinear
    resizing, levels apart.
    """
    if not isinstance(values, Mapping):
        return from_dict(DetectorSettings, values, where)
    did: dict[str, dict[str, Any]] = {
        "image": {"interpolation": "bilinear", "multiple": 32},
        "backbone": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "join": "none"},
        "flow": {"neighbourhood": PYRAMID_NEIGHBOURHOOD},
    }
    given = dict(values)
    for section, content in did.items():
        if isinstance(given.get(section), Mapping):
            given[section] = content | dict(given[section])
    return from_dict(DetectorSettings, given, where)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Convert a plain value to a field's type `hint`; SettingsError if it does not fit."""
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if isinstance(hint, types.UnionType):  # "T | None", or "int | float"
        if set(typing.get_args(hint)) == {int, float}:
            return value if isinstance(value, float) else _coerce(int, value, where)
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
    check_names(settings, [name])
    return functools.reduce(getattr, name.split("."), settings)


def replaced(settings: T, values: Mapping[str, Any]) -> T:
    """The settings with other values, by dotted name: ``replaced(settings, {"flow.depth": 2})``.

    Values are plain JSON or YAML types, as in :func:`from_dict`. All are put in before any rule is
    checked, so their order does not matter.

    Raises:
        SettingsError: an unknown name (the nearest valid one is given), a value of the wrong type,
            or one out of its range.
    """
    check_names(settings, values)
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


def check_names(settings: Any, names: Iterable[str], short_names: Iterable[str] = ()) -> None:
    """Raise SettingsError for a name that is neither a setting's dotted name nor a short name."""
    valid = [*short_names, *setting_names(settings)]
    for name in names:
        if name not in valid:
            inside = next((other for other in valid if other.startswith(f"{name}.")), None)
            hint = f" It is a section: name one of its settings, such as {inside}."
            if not name or inside is None:
                hint = nearest(name, valid)
            raise SettingsError(f"There is no setting {name!r}.{hint}")


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
    """One line for each difference of two JSON values, such as ``flow.depth was 2, is 4``."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys((*before, *now)):
            yield from differences(before.get(name), now.get(name), f"{where}.{name}".lstrip("."))
    elif before != now:
        name = where or "it"
        if before is None:
            yield f"{name} is new"
        elif now is None:
            yield f"{name} is gone"
        elif isinstance(before, str) and isinstance(now, str) and len(before) > _LONGEST_SHOWN:
            yield f"{name} has changed"
        else:
            yield f"{name} was {before!r}, is {now!r}"
