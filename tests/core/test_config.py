"""Settings: what they accept, what they refuse and in which words, and how they are stored."""

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsnf.core.config import (
    BackboneSettings,
    DefectSettings,
    DetectorSettings,
    FinetuneSettings,
    FlowSettings,
    Fusion,
    ImageSettings,
    ValidationSettings,
    differences,
    flattened,
    from_dict,
    key_content,
    replaced,
    setting_names,
    to_dict,
    value_at,
)
from clsnf.core.errors import SettingsError

SIDES = st.integers(1, 128).map(lambda n: 32 * n)
SHARES = st.floats(0, 1)
POSITIVE = st.floats(1e-9, 1e6)

IMAGES = st.builds(
    ImageSettings, height=SIDES, width=SIDES, aspect=st.sampled_from(["squeeze", "fit"])
)
BACKBONES = st.builds(
    BackboneSettings,
    name=st.text(min_size=1),
    levels=st.sets(st.integers(0, 9), min_size=1).map(lambda levels: tuple(sorted(levels))),
    weights=st.none() | st.text(),
)
DEFECTS = st.builds(
    DefectSettings,
    max_transparency=st.floats(0, 1, exclude_max=True),
    texture_share=SHARES,
    object_mask=st.sampled_from(["auto", "off", "dark", "bright"]),
    max_frequency_power=st.integers(0, 7),
    threshold=st.floats(0.01, 0.99),
)
FINETUNES = st.builds(
    FinetuneSettings,
    frozen_epochs=st.integers(0, 500),
    joint_epochs=st.integers(0, 500),
    learning_rate=POSITIVE,
    loss=st.sampled_from(["soft", "hard", "regression", "focal", "dice"]),
    schedule=st.sampled_from(["wsd", "cosine"]),
    skips=st.booleans(),
    target=st.sampled_from(["absolute", "signed"]),
)
FLOWS = st.builds(
    FlowSettings,
    depth=st.integers(1, 20),
    start=st.sampled_from(["data", "random"]),
    passes=POSITIVE,
)
ALL = st.builds(
    DetectorSettings,
    image=IMAGES,
    backbone=BACKBONES,
    defects=DEFECTS,
    finetune=FINETUNES,
    flow=FLOWS,
    validation=st.builds(ValidationSettings, fraction=st.floats(0.01, 0.99)),
    fusion_weight=SHARES,
    seed=st.integers(0, 2**32 - 1),
)


@given(ALL)
def test_settings_come_back_equal_from_json(settings: DetectorSettings) -> None:
    assert from_dict(DetectorSettings, json.loads(json.dumps(to_dict(settings)))) == settings


def test_an_empty_mapping_gives_the_defaults() -> None:
    assert from_dict(DetectorSettings, {}) == DetectorSettings()
    assert from_dict(DetectorSettings, {"flow": {}}) == DetectorSettings()


def test_plain_values_take_the_declared_types() -> None:
    settings = from_dict(
        DetectorSettings, {"fusion_weight": 1, "backbone": {"levels": [1, 3], "weights": None}}
    )
    assert isinstance(settings.fusion_weight, float)
    assert settings.backbone.levels == (1, 3)
    assert settings.backbone.weights is None
    assert hash(settings) == hash(from_dict(DetectorSettings, to_dict(settings)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"flow": {"dept": 3}}, ["settings.flow", "'dept'", "Did you mean 'depth'?"]),
        ({"fusion_wieght": 0.5}, ["settings", "'fusion_wieght'", "Did you mean 'fusion_weight'?"]),
        ({"zzz": 1}, ["'zzz'", "Valid:", "fusion_weight", "backbone"]),
        ({3: 1}, ["unknown setting 3"]),
        ({"flow": 3}, ["settings.flow", "3", "mapping"]),
        ({"flow": {"depth": "4"}}, ["settings.flow.depth", "'4'", "int"]),
        ({"flow": {"depth": 4.0}}, ["settings.flow.depth", "4.0", "int"]),
        ({"flow": {"depth": True}}, ["settings.flow.depth", "True", "int"]),
        ({"fusion_weight": True}, ["settings.fusion_weight", "True", "float"]),
        ({"fusion_weight": "half"}, ["settings.fusion_weight", "'half'", "float"]),
        ({"fusion_weight": None}, ["settings.fusion_weight", "None", "float"]),
        ({"backbone": {"weights": 5}}, ["settings.backbone.weights", "5", "str"]),
        ({"backbone": {"levels": "1,2"}}, ["settings.backbone.levels", "'1,2'", "list"]),
        ({"backbone": {"levels": ["1"]}}, ["settings.backbone.levels", "'1'", "int"]),
    ],
)
def test_unknown_names_and_wrong_types_are_refused_in_one_line(
    values: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        from_dict(DetectorSettings, values)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize("values", [[], "text", None, 3])
def test_settings_that_are_no_mapping_are_refused(values: Any) -> None:
    with pytest.raises(SettingsError, match="must be a mapping"):
        from_dict(DetectorSettings, values)


@dataclasses.dataclass(frozen=True)
class Needy:
    """Without defaults for all of its fields, as the facts of a saved detector."""

    name: str
    count: int
    share: float = 0.5


def test_what_has_no_default_must_be_given() -> None:
    assert from_dict(Needy, {"name": "a", "count": 2}) == Needy("a", 2)
    with pytest.raises(SettingsError, match=r"facts: name, count must be given"):
        from_dict(Needy, {"share": 1.0}, "facts")


OUT_OF_RANGE: list[tuple[type, str, Any]] = [
    (ImageSettings, "height", 0),
    (ImageSettings, "height", 31),
    (ImageSettings, "multiple", 0),
    (ImageSettings, "interpolation", "nearest"),
    (ImageSettings, "width", 8192),
    (ImageSettings, "aspect", "squeze"),
    (BackboneSettings, "name", ""),
    (BackboneSettings, "levels", ()),
    (BackboneSettings, "levels", (2, 1)),
    (BackboneSettings, "levels", (1, 1)),
    (BackboneSettings, "levels", (-1, 1)),
    (DefectSettings, "max_transparency", 1.0),
    (DefectSettings, "texture_share", 1.5),
    (DefectSettings, "object_mask", "drak"),
    (DefectSettings, "max_frequency_power", 8),
    (DefectSettings, "threshold", 0.0),
    (FinetuneSettings, "frozen_epochs", -1),
    (FinetuneSettings, "joint_epochs", -1),
    (FinetuneSettings, "decay_epochs", 0),
    (FinetuneSettings, "repeats", 0),
    (FinetuneSettings, "batch_size", 0),
    (FinetuneSettings, "learning_rate", 0.0),
    (FinetuneSettings, "learning_rate", math.nan),
    (FinetuneSettings, "learning_rate", math.inf),
    (FinetuneSettings, "backbone_factor", 0.0),
    (FinetuneSettings, "weight_decay", -1e-4),
    (FinetuneSettings, "weight_decay", math.inf),
    (FinetuneSettings, "loss", "sofft"),
    (FinetuneSettings, "schedule", "cosin"),
    (FinetuneSettings, "target", "sined"),
    (FinetuneSettings, "decoder_width", 8),
    (FlowSettings, "depth", -1),
    (FlowSettings, "start", "noise"),
    (FlowSettings, "passes", 0.0),
    (FlowSettings, "passes", math.inf),
    (FlowSettings, "vectors_per_step", 1),
    (FlowSettings, "learning_rate", math.inf),
    (FlowSettings, "warmup", 1.0),
    (FlowSettings, "clamp", 0.0),
    (FlowSettings, "clamp", math.inf),
    (FlowSettings, "condition_dims", 6),
    (FlowSettings, "level_quantile", 0.2),
    (ValidationSettings, "fraction", 1.0),
    (ValidationSettings, "images_per_family", 0),
    (ValidationSettings, "false_reject_rate", 0.0),
    (DetectorSettings, "fusion_weight", 1.1),
    (DetectorSettings, "fusion_weight", math.nan),
    (DetectorSettings, "seed", -1),
    (DetectorSettings, "seed", 2**32),
]


@pytest.mark.parametrize(
    ("cls", "name", "value"), OUT_OF_RANGE, ids=lambda v: getattr(v, "__name__", repr(v))
)
def test_a_value_out_of_range_is_quoted_with_its_name(cls: type, name: str, value: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        cls(**{name: value})
    assert f"{cls.__name__}.{name}" in str(caught.value)
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelt_choice_names_the_nearest() -> None:
    with pytest.raises(SettingsError, match="Did you mean 'squeeze'"):
        ImageSettings(aspect="squeze")


def test_a_random_start_needs_a_block() -> None:
    assert FlowSettings(depth=0, start="data").depth == 0
    with pytest.raises(SettingsError, match=r"FlowSettings\.depth is 0"):
        FlowSettings(depth=0, start="random")


SECTIONS = [
    f.default_factory
    for f in dataclasses.fields(DetectorSettings)
    if f.default_factory is not dataclasses.MISSING
]


@pytest.mark.parametrize("cls", SECTIONS)
def test_every_setting_says_what_it_is(cls: type) -> None:
    for field in dataclasses.fields(cls):
        assert field.metadata["help"], field.name


# ---- settings by dotted name ----


@given(ALL)
def test_all_values_put_in_by_name_give_the_same_settings(settings: DetectorSettings) -> None:
    values = flattened(json.loads(json.dumps(to_dict(settings))))
    assert list(values) == setting_names(settings) == setting_names(DetectorSettings)
    assert replaced(DetectorSettings(), values) == settings
    assert replaced(settings, {}) == settings
    for name, value in values.items():
        found = value_at(settings, name)
        assert (list(found) if isinstance(found, tuple) else found) == value


def test_replaced_values_take_the_declared_types_and_nothing_else_changes() -> None:
    default = DetectorSettings()
    found = replaced(default, {"flow.passes": 7, "seed": 3, "backbone.levels": [2, 3]})
    assert isinstance(found.flow.passes, float)
    assert found == dataclasses.replace(
        default,
        flow=dataclasses.replace(default.flow, passes=7.0),
        backbone=dataclasses.replace(default.backbone, levels=(2, 3)),
        seed=3,
    )


def test_values_that_are_valid_together_are_replaced_together() -> None:
    gaussian = DetectorSettings(flow=FlowSettings(depth=0))
    for names in (("flow.start", "flow.depth"), ("flow.depth", "flow.start")):
        values = {name: {"flow.start": "random", "flow.depth": 3}[name] for name in names}
        assert replaced(gaussian, values).flow == FlowSettings(depth=3, start="random")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("flow.dept", 1, "There is no setting 'flow.dept'. Did you mean 'flow.depth'?"),
        (
            "flow",
            1,
            "There is no setting 'flow'. It is a section: name one of its settings, such as "
            "flow.depth.",
        ),
        ("flow.depth.x", 1, "There is no setting 'flow.depth.x'."),
        ("", 1, "There is no setting ''."),
        ("flow.depth", "two", "settings.flow.depth is 'two': it must be of type int."),
        ("flow.depth", -1, "FlowSettings.depth is -1: it must be from 0 to 128"),
    ],
)
def test_what_can_not_be_replaced_is_named(name: str, value: Any, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        replaced(DetectorSettings(), {name: value})
    assert said in str(caught.value)


def test_a_name_that_does_not_exist_has_no_value() -> None:
    with pytest.raises(SettingsError, match=r"Did you mean 'flow\.depth'"):
        value_at(DetectorSettings(), "flow.dept")


# ---- fusion ----


def test_the_image_score_has_the_weight_of_the_map_unless_it_has_its_own() -> None:
    assert DetectorSettings(fusion_weight=0.5).fusion == Fusion(0.5, None, 0.0)
    assert DetectorSettings(fusion_weight=0.5).fusion.image_weight == 0.5
    assert DetectorSettings(score_weight=0.0, smoothing=2.0).fusion == Fusion(0.25, 0.0, 2.0)
    assert DetectorSettings(score_weight=0.0).fusion.image_weight == 0.0


@pytest.mark.parametrize(
    "values", [{"fusion_weight": 1.5}, {"score_weight": -0.1}, {"smoothing": 33.0}]
)
def test_a_fusion_has_the_ranges_of_the_settings(values: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=f"Fusion.{next(iter(values))}"):
        Fusion(**({"fusion_weight": 0.25} | values))


# ---- renamed values and keys ----


def test_the_old_name_of_the_schedule_is_still_read() -> None:
    wsd = FinetuneSettings()
    assert wsd.schedule == "wsd"
    assert FinetuneSettings(schedule="trunk") == wsd
    assert from_dict(FinetuneSettings, {"schedule": "trunk"}) == wsd
    cosine = DetectorSettings(finetune=FinetuneSettings(schedule="cosine"))
    assert replaced(cosine, {"finetune.schedule": "trunk"}) == DetectorSettings()
    assert "trunk" not in FinetuneSettings.__dataclass_fields__["schedule"].metadata["choices"]


def test_the_content_of_keys_has_the_schedule_s_old_name() -> None:
    # of the settings' first version: artifacts that were stored under it are found
    assert key_content(FinetuneSettings())["schedule"] == "trunk"
    assert key_content(DetectorSettings())["finetune"] == key_content(FinetuneSettings())
    assert key_content(FinetuneSettings(schedule="cosine"))["schedule"] == "cosine"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, {}),
        ({"layer_decay": 0.7}, {"layer_decay": 0.7}),
        ({"trained_layers": 4}, {"trained_layers": 4}),
        ({"layer_decay": 0.7, "trained_layers": 4}, {"layer_decay": 0.7, "trained_layers": 4}),
        ({"layer_decay": 0.7, "trained_layers": 0}, {"trained_layers": 0}),
        ({"layer_decay": 0.7, "trained_layers": 4, "joint_epochs": 0}, {}),
    ],
)
def test_the_content_of_keys_says_of_layers_what_changes_a_result(
    changes: dict[str, Any], said: dict[str, Any]
) -> None:
    before_there_were_any = to_dict(FinetuneSettings()) | {"schedule": "trunk"}
    del before_there_were_any["layer_decay"], before_there_were_any["trained_layers"]
    before_there_were_any |= {k: v for k, v in changes.items() if k == "joint_epochs"}
    assert key_content(FinetuneSettings(**changes)) == before_there_were_any | said


# ---- differences ----


def test_differences_name_what_changed_and_how() -> None:
    before = {
        "seed": 0,
        "flow": {"depth": 2, "start": "data"},
        "data": {"nut": "a" * 64, "bolt": "b" * 64},
        "levels": [1, 2],
    }
    now = {
        "seed": 1,
        "flow": {"depth": 2, "start": "random"},
        "data": {"nut": "c" * 64},
        "levels": [1, 2],
        "new": 3,
    }
    assert list(differences(before, now)) == [
        "seed was 0, is 1",
        "flow.start was 'data', is 'random'",
        "data.nut has changed",
        "data.bolt is gone",
        "new is new",
    ]
    assert list(differences(now, now)) == []
