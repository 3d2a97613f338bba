"""Search spaces: valid and refused YAML files, and how a trial's values become settings."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution, IntDistribution

from clsnf.core.config import (
    BackboneSettings,
    DetectorSettings,
    FinetuneSettings,
    FlowSettings,
    ImageSettings,
    StudySettings,
    to_dict,
)
from clsnf.core.errors import ClsnfError, SettingsError, WeightsError
from clsnf.model.weights_files import weights_of_models
from clsnf.study.names import SHORT_NAMES
from clsnf.study.space import (
    DEFAULT_SPACE,
    FUSION_WEIGHTS,
    Space,
    apply_config,
    paper_space,
    read_space,
)

SPACES = Path(__file__).parents[2] / "tune" / "spaces"
SHIPPED = SPACES / "default.yaml"


def written(folder: Path, text: str) -> Path:
    path = folder / "space.yaml"
    path.write_text(text)
    return path


# ---- files ----


def test_the_shipped_space_is_the_default() -> None:
    assert read_space(SHIPPED).ranges == DEFAULT_SPACE == read_space(None).ranges


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_space_fits_the_default_settings(path: Path) -> None:
    space = read_space(path)
    space.check(DetectorSettings())
    assert set(space.start(DetectorSettings())) == set(space.ranges) - {"fusion_weight"}


def test_trials_are_compared_on_their_way_if_each_trains_on_its_own() -> None:
    assert Space(DEFAULT_SPACE).rungs(DetectorSettings()) == []
    rate = {"finetune.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}
    assert Space(DEFAULT_SPACE | rate).rungs(DetectorSettings()) == [4, 8, 12]
    cosine = dataclasses.replace(DetectorSettings(), finetune=FinetuneSettings(schedule="cosine"))
    assert Space(rate).rungs(cosine) == [], (
        "runs of different length are not comparable on their way"
    )
    assert (
        Space({"flow.passes": {"type": "choice", "values": [1.0, 2.0]}}).rungs(DetectorSettings())
        == []
    )


def test_a_file_may_search_any_setting_by_its_full_name(tmp_path: Path) -> None:
    space = read_space(
        written(
            tmp_path,
            "fusion_weight: {type: float, low: 0.0, high: 0.5}\n"
            "flow.passes: {type: float, low: 0.5, high: 4, log: true}\n"
            "finetune.learning_rate: {type: float, low: 1e-5, high: 1e-3, log: true}\n"
            "defects.object_mask: {type: choice, values: [auto, 'off']}\n"
            "image.height: {type: int, low: 64, high: 256, step: 32}\n",
        )
    )
    assert list(space.distributions()) == [  # the fusion weight is swept
        "flow.passes",
        "finetune.learning_rate",
        "defects.object_mask",
        "image.height",
    ]
    learning_rate = space.distributions()["finetune.learning_rate"]
    assert (learning_rate.low, learning_rate.high, learning_rate.log) == (1e-5, 1e-3, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "fusion_wieght: {type: float, low: 0, high: 1}",
            "There is no setting 'fusion_wieght'. Did you mean 'fusion_weight'?",
        ),
        (
            "flow.pases: {type: float, low: 1, high: 2}",
            "There is no setting 'flow.pases'. Did you mean 'flow.passes'?",
        ),
        ("flow: {type: choice, values: [1]}", "There is no setting 'flow'."),
        ("seed.x: {type: choice, values: [1]}", "There is no setting 'seed.x'."),
        (
            "flow_depth: {type: choise, values: [1]}",
            "flow_depth: type is 'choise'. Did you mean 'choice'?",
        ),
        ("flow_depth: {values: [1]}", "flow_depth: type is None. Valid: choice, float, int."),
        ("flow_depth: {type: [1], low: 1}", "flow_depth: type is [1]. Valid: choice, float, int."),
        (
            "flow_depth: {type: int, low: 1, hgih: 2}",
            "flow_depth: unknown key 'hgih'. Did you mean 'high'?",
        ),
        ("flow_depth: {type: int, low: 1, 3: 2}", "flow_depth: unknown key '3'."),
        (
            "flow_depth: {type: choice, values: []}",
            "flow_depth: a choice needs values: [a, b, ...].",
        ),
        (
            "flow_depth: {type: choice, values: 3}",
            "flow_depth: a choice needs values: [a, b, ...].",
        ),
        (
            "flow_depth: {type: choice, values: [2, 2]}",
            "flow_depth: the value 2 stands there twice.",
        ),
        (
            "flow_depth: {type: choice, values: [0, -1]}",
            "FlowSettings.depth is -1: it must be from 0 to 128",
        ),
        (
            "flow_depth: {type: choice, values: [0, two]}",
            "settings.flow.depth is 'two': it must be of type int.",
        ),
        (
            "flow_depth: {type: int, low: 4, high: 2}",
            "low is 4 and high is 2: a range of type int needs numbers with low <= high.",
        ),
        (
            "flow_depth: {type: int, low: 0, high: 2.5}",
            "low is 0 and high is 2.5: a range of type int needs numbers",
        ),
        (
            "flow_depth: {type: int, low: 0, high: true}",
            "low is 0 and high is True: a range of type int needs numbers",
        ),
        ("flow_depth: {type: int, low: 0}", "low is 0 and high is None"),
        (
            "fusion_weight: {type: float, low: .nan, high: 1}",
            "low is nan and high is 1: a range of type float needs numbers",
        ),
        ("flow.passes: {type: float, low: 1, high: .inf}", "FlowSettings.passes is inf"),
        (
            "fusion_weight: {type: float, low: 0, high: 1.5}",
            "DetectorSettings.fusion_weight is 1.5: it must be in [0, 1].",
        ),
        (
            "flow.passes: {type: float, low: 0, high: 1, log: true}",
            "flow.passes: log needs low above 0 and no step.",
        ),
        (
            "flow.passes: {type: float, low: 1, high: 2, log: true, step: 0.5}",
            "flow.passes: log needs low above 0 and no step.",
        ),
        (
            "flow.passes: {type: float, low: 1, high: 2, log: 'yes'}",
            "flow.passes: log is 'yes': it must be true or false.",
        ),
        (
            "flow.passes: {type: float, low: 1, high: 2, step: 0}",
            "flow.passes: step is 0: it must be above 0 and finite, or left out.",
        ),
        (
            "flow.passes: {type: float, low: 1, high: 2, step: .nan}",
            "flow.passes: step is nan: it must be above 0 and finite, or left out.",
        ),
        (
            "flow_depth: {type: int, low: 1, high: 2, step: 0.5}",
            "flow_depth: step is 0.5: it must be a whole number above 0, or left out.",
        ),
        # A float range for a setting that takes whole numbers would fail in every trial but at its
        # ends.
        (
            "flow_depth: {type: float, low: 0, high: 4}",
            "settings.flow.depth is 0.0: it must be of type int.",
        ),
        (
            "image.height: {type: int, low: 16, high: 128}",
            "ImageSettings.height is 16: it must be from 32 to 4096",
        ),
        (
            "flow_depth: {type: int, low: 0, high: 2}\nflow.depth: {type: choice, values: [1]}",
            "flow_depth and flow.depth are the same setting: keep one.",
        ),
        ("", "holds no names with values"),
        ("- flow_depth", "holds no names with values"),
        (
            "flow_depth: 3",
            "flow_depth: 3 is no range: expected one such as {type: choice, values: [2, 4]}.",
        ),
        ("flow_depth: {type: choice, values: [1", "is no YAML"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_file_and_the_nearest_name(
    tmp_path: Path, text: str, said: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        read_space(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"none.yaml can't be read \(No such file or directory\)"
    ):
        read_space(tmp_path / "none.yaml")


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(SettingsError, match="The search space is empty"):
        Space({})


# ---- against the study's own settings ----


def test_the_default_space_fits_the_default_settings() -> None:
    Space(DEFAULT_SPACE).check(DetectorSettings())


def test_a_value_that_the_studys_settings_do_not_allow_is_refused_before_any_trial() -> None:
    random_start = DetectorSettings(flow=FlowSettings(start="random"))
    with pytest.raises(
        SettingsError,
        match=r"The search space's flow_depth: FlowSettings.depth is 0: it must be from 0 to 128",
    ):
        Space(DEFAULT_SPACE).check(random_start)


def choice(*values: Any) -> dict[str, Any]:
    return {"type": "choice", "values": list(values)}


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        ("score_weight", [0.1, 0.5], "the study chooses it for the winner alone, by image AUROC"),
        (
            "validation.fraction",
            [0.1, 0.2],
            "validation images are held out once, before the first trial",
        ),
        (
            "validation.images_per_family",
            [8, 16],
            "validation defects are made once, before the first trial",
        ),
        (
            "validation.false_reject_rate",
            [0.01, 0.1],
            "the threshold of the winner alone depends on it",
        ),
    ],
)
def test_a_setting_that_no_trial_reads_is_refused_in_a_new_study(
    name: str, values: list[Any], why: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        Space({name: choice(*values)}).check_new(DetectorSettings())
    assert str(caught.value) == (
        f"The search space's {name} changes nothing in a trial: {why}. Take it out of the space; "
        f"give one value with --set {name}=VALUE."
    )


def test_every_setting_of_validation_is_refused() -> None:
    settings = DetectorSettings()
    for name, value in to_dict(settings.validation).items():
        with pytest.raises(SettingsError, match="changes nothing in a trial"):
            Space({f"validation.{name}": choice(value)}).check_new(settings)


# ---- backbones ----


def with_weights(file: Path | None, **backbone: Any) -> DetectorSettings:
    weights = None if file is None else str(file)
    return DetectorSettings(
        image=ImageSettings(64, 64), backbone=BackboneSettings(**{"weights": weights} | backbone)
    )


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["demo", "resnet19"],
            "The search space's backbone.name=resnet19: There is no timm model 'resnet19'. Did you",
        ),
        (
            ["resnet18", "resnet34"],
            "The search space's backbone.name has 2 backbones (resnet18, resnet34), and --weights "
            "is one file, {file}, which fits one of them: give a file for each with --weights "
            "NAME=FILE, or a folder of files that are named after their models, leave --weights "
            "out to use timm's pretrained weights, or search one backbone.",
        ),
        (["resnet34"], "The search space's backbone.name=resnet34: {file} does not fit 'resnet34'"),
    ],
)
def test_a_backbone_that_would_fail_in_every_trial_is_refused(
    names: list[str], said: str, resnet18_weights: Path
) -> None:
    space = Space({"backbone.name": choice(*names)})
    with pytest.raises(ClsnfError) as caught:
        space.check_new(with_weights(resnet18_weights))
    assert str(caught.value).startswith(said.format(file=resnet18_weights))
    assert "\n" not in str(caught.value)


def test_backbones_without_weights_files_are_loaded_as_trials_would(tmp_path: Path) -> None:
    settings = with_weights(None, name="demo")
    Space({"backbone.name": choice("demo")}).check_new(settings)
    gone = Space({"backbone.weights": choice(None, str(tmp_path / "none.pth"))})
    with pytest.raises(WeightsError, match=r"^The search space's backbone.weights=.*none.pth: "):
        gone.check_new(settings)


def test_levels_and_image_sizes_are_tried_in_all_combinations(resnet18_weights: Path) -> None:
    settings = with_weights(resnet18_weights)
    sizes = {"image.height": {"type": "int", "low": 32, "high": 96, "step": 32}}
    Space({"backbone.levels": choice([1, 2], [2, 3])} | sizes).check_new(settings)
    with pytest.raises(
        SettingsError,
        match=r"^The search space's backbone.levels=\[1, 9\], image.height=32: Backbone "
        r"'resnet18' has levels 0 to 4, not 9",
    ):
        Space({"backbone.levels": choice([1, 2], [1, 9])} | sizes).check_new(settings)


# ---- a trial's values ----


def test_short_names_are_put_where_they_belong_and_nothing_else_changes() -> None:
    changed = apply_config(
        DetectorSettings(),
        {"fusion_weight": 0.1, "finetune_epochs": 5, "flow_depth": 3, "flow.passes": 7},
    )
    default = DetectorSettings()
    assert changed == dataclasses.replace(
        default,
        fusion_weight=0.1,
        finetune=dataclasses.replace(default.finetune, joint_epochs=5),
        flow=dataclasses.replace(default.flow, depth=3, passes=7.0),
    )


def _paths(content: dict[str, Any], prefix: str = "") -> list[str]:
    nested = [
        _paths(v, f"{prefix}{k}.") if isinstance(v, dict) else [f"{prefix}{k}"]
        for k, v in content.items()
    ]
    return [name for names in nested for name in names]


@pytest.mark.parametrize("name", [*SHORT_NAMES, *_paths(to_dict(DetectorSettings()))])
def test_every_setting_can_be_put_in_by_name(name: str) -> None:
    value: Any = to_dict(DetectorSettings())
    for part in SHORT_NAMES.get(name, name).split("."):
        value = value[part]
    assert apply_config(DetectorSettings(), {name: value}) == DetectorSettings()


@pytest.mark.parametrize("name", ["", ".", "flow.", "flow", "flow.depth.x", "depth", "Flow.depth"])
def test_names_that_do_not_exist_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="There is no setting"):
        apply_config(DetectorSettings(), {name: 1})


# ---- the first trial ----


def test_the_first_trial_is_the_settings_as_they_stand_where_the_space_holds_them() -> None:
    space = Space(DEFAULT_SPACE)
    assert space.start(DetectorSettings()) == {
        "finetune_epochs": 8,
        "flow_depth": 2,
    }


def test_the_first_trial_has_the_choice_that_the_settings_have_by_its_old_name_too() -> None:
    space = Space({"finetune.schedule": {"type": "choice", "values": ["cosine", "trunk"]}})
    assert space.start(DetectorSettings()) == {"finetune.schedule": "trunk"}


def test_else_the_first_trial_is_the_nearest_point() -> None:
    space = Space(
        {
            "flow.passes": {"type": "float", "low": 0.3, "high": 0.5},
            "finetune_epochs": {"type": "choice", "values": [0, 5, 20]},
            "flow_depth": {"type": "int", "low": 1, "high": 9, "step": 4},
            "defects.object_mask": {"type": "choice", "values": ["dark", "bright"]},
        }
    )
    start = space.start(DetectorSettings(flow=FlowSettings(depth=6)))
    assert start == {
        "flow.passes": 0.5,
        "finetune_epochs": 5,
        "flow_depth": 5,
        "defects.object_mask": "dark",
    }


@given(
    low=st.floats(0.01, 10),
    width=st.floats(0, 10),
    step=st.none() | st.floats(0.01, 5),
    value=st.floats(0.001, 100),
)
def test_a_float_range_starts_inside_itself_on_a_step(
    low: float, width: float, step: float | None, value: float
) -> None:
    given_range = {"type": "float", "low": low, "high": low + width} | (
        {} if step is None else {"step": step}
    )
    space = Space({"flow.passes": given_range})
    start = space.start(DetectorSettings(flow=FlowSettings(passes=value)))["flow.passes"]
    assert isinstance(start, float)
    assert low <= start <= low + width
    if step is not None:
        assert math.isclose((start - low) / step, round((start - low) / step), abs_tol=1e-6)


@given(
    low=st.integers(0, 10),
    width=st.integers(0, 10),
    step=st.integers(1, 7),
    value=st.integers(0, 40),
)
def test_an_int_range_starts_at_the_nearest_of_its_values(
    low: int, width: int, step: int, value: int
) -> None:
    space = Space({"flow_depth": {"type": "int", "low": low, "high": low + width, "step": step}})
    start = space.start(DetectorSettings(flow=FlowSettings(depth=value)))["flow_depth"]
    values = range(low, low + width + 1, step)
    assert start in values
    assert abs(start - value) == min(abs(v - value) for v in values)


def test_a_setting_without_a_value_starts_at_the_low_end_of_its_range() -> None:
    space = Space({"score_weight": {"type": "float", "low": 0.2, "high": 0.5, "step": 0.1}})
    assert space.start(DetectorSettings()) == {"score_weight": 0.2}
    assert space.start(DetectorSettings(score_weight=0.4)) == {"score_weight": pytest.approx(0.4)}


# ---- joint epochs ----


def test_a_step_of_null_is_no_step() -> None:
    whole = Space({"finetune_epochs": {"type": "int", "low": 2, "high": 5, "step": None}})
    assert whole.distributions() == {"finetune_epochs": IntDistribution(2, 5)}
    assert whole.joint_epochs(DetectorSettings()) == [2, 3, 4, 5]
    assert whole.start(DetectorSettings()) == {"finetune_epochs": 5}
    real = Space({"flow.passes": {"type": "float", "low": 0.5, "high": 1, "step": None}})
    assert real.distributions() == {"flow.passes": FloatDistribution(0.5, 1)}


@pytest.mark.parametrize("name", ["finetune_epochs", "finetune.joint_epochs"])
def test_joint_epochs_are_all_that_a_trial_can_have(name: str) -> None:
    settings = DetectorSettings(finetune=FinetuneSettings(joint_epochs=7))
    choice = Space({name: {"type": "choice", "values": [8, 0, 4]}})
    assert choice.joint_epochs(settings) == [0, 4, 8]
    steps = Space({name: {"type": "int", "low": 2, "high": 9, "step": 3}})
    assert steps.joint_epochs(settings) == [2, 5, 8]


def test_joint_epochs_that_no_trial_changes_are_those_of_the_settings() -> None:
    settings = DetectorSettings(finetune=FinetuneSettings(joint_epochs=7))
    assert Space({"flow_depth": {"type": "choice", "values": [2]}}).joint_epochs(settings) == [7]


# ---- fusion weights ----


def test_fusion_weights_outside_the_space_are_not_swept() -> None:
    settings = DetectorSettings()
    assert Space(DEFAULT_SPACE).fusion_weights(settings) == FUSION_WEIGHTS
    part = Space({"fusion_weight": {"type": "float", "low": 0.1, "high": 0.25}})
    assert part.fusion_weights(settings) == (0.1, 0.15, 0.2, 0.25)
    choice = Space({"fusion_weight": {"type": "choice", "values": [0.7, 0.2]}})
    assert choice.fusion_weights(settings) == (0.2, 0.7)
    narrow = Space({"fusion_weight": {"type": "float", "low": 0.31, "high": 0.39}})
    assert narrow.fusion_weights(settings) == (0.31, 0.39), "its ends, where nothing else is inside"
    steps = Space({"fusion_weight": {"type": "float", "low": 0.1, "high": 0.4, "step": 0.1}})
    assert steps.fusion_weights(settings) == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert Space({"fusion_weight": {"type": "int", "low": 0, "high": 1}}).fusion_weights(
        settings
    ) == (0.0, 1.0)


def test_the_settings_own_fusion_weight_is_swept_too() -> None:
    settings = DetectorSettings(fusion_weight=0.33)
    assert 0.33 in Space(DEFAULT_SPACE).fusion_weights(settings)
    assert Space({"flow_depth": {"type": "choice", "values": [2]}}).fusion_weights(settings) == (
        0.33,
    )


def test_the_size_of_a_space_is_the_number_of_trials_that_differ() -> None:
    assert Space(DEFAULT_SPACE).size == 9, "the fusion weight is swept in each"
    assert Space(DEFAULT_SPACE).limited(StudySettings(trials=40)).trials == 9
    assert paper_space().size == 1
    whole = Space({"flow_depth": {"type": "int", "low": 0, "high": 6, "step": 2}})
    assert whole.size == 4
    steps = Space({"flow.passes": {"type": "float", "low": 0.5, "high": 1.5, "step": 0.25}})
    assert steps.size == 5
    real = Space({"flow.passes": {"type": "float", "low": 0.5, "high": 1.5}})
    assert real.size == math.inf
    assert real.limited(StudySettings(trials=40)).trials == 40
    assert Space(DEFAULT_SPACE).limited(StudySettings(trials=None)).trials is None


def test_the_default_file_is_documented_and_plain() -> None:
    assert SHIPPED.read_text().startswith("#")
    assert yaml.safe_load(SHIPPED.read_text()) == DEFAULT_SPACE


# ---- joint choices ----

LARGE = {"backbone.name": "resnet18", "backbone.levels": [1, 2, 3], "image.height": 96}
SMALL = {"backbone.name": "demo", "backbone.levels": [1, 2]}
NETWORK = {"network": choice(LARGE, SMALL)}


def test_a_joint_choice_gives_all_its_settings_at_once(tmp_path: Path) -> None:
    text = (
        "network:\n  type: choice\n  values:\n"
        "    - {backbone.name: resnet18, backbone.levels: [1, 2, 3], image.height: 96}\n"
        "    - {backbone.name: demo, backbone.levels: [1, 2]}\n"
        "flow_depth: {type: choice, values: [0, 2]}\n"
    )
    space = read_space(written(tmp_path, text))
    assert space.ranges["network"] == NETWORK["network"]
    assert (space.size, list(space.distributions())) == (4, ["network", "flow_depth"])
    assert space.settings == ["backbone.name", "backbone.levels", "image.height", "flow.depth"]
    settings = apply_config(DetectorSettings(), {"network": LARGE, "flow_depth": 0})
    assert settings.backbone == BackboneSettings("resnet18", (1, 2, 3))
    assert (settings.image.size, settings.flow.depth) == ((96, 256), 0)


def test_what_a_mapping_does_not_name_is_as_the_settings_have_it() -> None:
    epochs = {"training": choice({"finetune_epochs": 2}, {"finetune.learning_rate": 1e-3})}
    settings = DetectorSettings(finetune=FinetuneSettings(joint_epochs=7))
    assert Space(epochs).joint_epochs(settings) == [2, 7]
    assert Space(epochs).rungs(settings) == [4, 8, 12]


def test_a_joint_choice_starts_at_the_settings_or_at_its_first_mapping() -> None:
    demo = DetectorSettings(backbone=BackboneSettings("demo", (1, 2)))
    assert Space(NETWORK).start(demo) == {"network": SMALL}
    assert Space(NETWORK).start(DetectorSettings()) == {"network": LARGE}


def test_only_the_backbones_and_sizes_of_the_mappings_are_loaded(resnet18_weights: Path) -> None:
    settings = with_weights(None, name="demo", levels=(1, 2))
    large = LARGE | {"backbone.weights": str(resnet18_weights)}
    space = Space({"network": choice(large, SMALL)})
    space.check_new(settings)
    found = [(one.backbone.name, one.image.size) for one in space.networks(settings)]
    assert found == [("resnet18", (96, 64)), ("demo", (64, 64))]
    wrong = Space({"network": choice(large, SMALL | {"backbone.levels": [1, 9]})})
    said = (
        r"The search space's backbone.name=demo, backbone.levels=\[1, 9\]: Backbone .* has levels 0"
    )
    with pytest.raises(SettingsError, match=said):
        wrong.check_new(settings)


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (
            NETWORK | {"backbone.name": choice("demo")},
            "Both network and backbone.name give backbone.name a value: keep one.",
        ),
        (
            NETWORK | {"size": choice({"image.height": 64})},
            "Both network and size give image.height a value: keep one.",
        ),
        (
            {"network": choice({"flow_depth": 1, "flow.depth": 2})},
            "network: {'flow_depth': 1, 'flow.depth': 2} gives flow.depth two values: keep one.",
        ),
        (
            {"flow_depth": choice({"flow.depth": 2})},
            "flow_depth: the label of a joint choice is no setting's name: take another, such as "
            "network.",
        ),
        ({"category": choice({"flow.depth": 2})}, "category: the label of a joint choice"),
        ({"network": choice(SMALL, 3)}, "network: 3 is no mapping of settings, as other values"),
        ({"network": choice({})}, "network: {} is no mapping of settings"),
        ({"network": choice(SMALL, SMALL)}, "network: the value {'backbone.name': 'demo', "),
        (
            {"network": choice({"backbone.nmae": "demo"})},
            "network, {'backbone.nmae': 'demo'}: There is no setting 'backbone.nmae'. Did you mean",
        ),
        (
            {"network": choice({"image.height": 16})},
            "network, {'image.height': 16}: ImageSettings.height is 16: it must be from 32 to 4096",
        ),
        (
            {"network": choice({"fusion_weight": 0.5})},
            "network: every trial sweeps fusion_weight: give it a range of its own.",
        ),
    ],
)
def test_a_joint_choice_that_makes_no_sense_is_refused(space: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Space(space)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_no_mapping_may_have_a_setting_that_no_trial_reads() -> None:
    space = Space({"judge": choice({"validation.fraction": 0.2, "flow.depth": 1})})
    with pytest.raises(SettingsError, match=r"space's validation.fraction changes nothing"):
        space.check_new(DetectorSettings())


# ---- a weights file for each backbone ----


def test_each_backbone_has_its_own_weights_file(tmp_path: Path, resnet18_weights: Path) -> None:
    space = Space({"backbone.name": choice("demo", "resnet18")})
    given = weights_of_models({"resnet18": str(resnet18_weights)})
    settings = with_weights(None, weights=given, levels=(1, 2))
    space.check_new(settings)
    lacking = Space({"backbone.name": choice("demo", "resnet34")})
    with pytest.raises(SettingsError) as caught:
        lacking.check_new(settings)
    assert str(caught.value) == (
        "--weights names a file of 'resnet18', and the backbones are demo, resnet34: leave it out, "
        "or name the backbone as --backbone or the search space does."
    )
    more = Space({"backbone.name": choice("resnet18", "resnet34")})
    with pytest.raises(WeightsError, match="and none of 'resnet34': give --weights resnet34=FILE"):
        more.check_new(settings)
    both = {"resnet18": str(resnet18_weights), "resnet34": str(tmp_path / "gone.safetensors")}
    with pytest.raises(WeightsError, match=r"There is no weights file .*gone\.safetensors"):
        more.check_new(with_weights(None, weights=weights_of_models(both), levels=(1, 2)))
    unfit = weights_of_models(dict.fromkeys(("resnet18", "resnet34"), str(resnet18_weights)))
    with pytest.raises(WeightsError, match="does not fit 'resnet34'"):
        more.check_new(with_weights(None, weights=unfit, levels=(1, 2)))
