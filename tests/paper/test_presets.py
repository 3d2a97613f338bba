"""The authors' tables: every row makes valid settings; a damaged table is refused with its line."""

import csv
import dataclasses
import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsnf.core.errors import SettingsError
from clsnf.paper.presets import (
    Preset,
    PublishedMetrics,
    common_preset,
    parse_rows,
    preset_for,
    presets,
    published_metrics,
    sharing,
)

MVTEC = [
    "bottle",
    "cable",
    "capsule",
    "carpet",
    "grid",
    "hazelnut",
    "leather",
    "metal_nut",
    "pill",
    "screw",
    "tile",
    "toothbrush",
]
CATEGORIES = [*MVTEC, "transistor", "wood", "zipper", "01", "02", "03"]

NAMES = st.text("abcdefghij_0123456789-, \"'", min_size=1).map(
    lambda name: f"c{name}"
)  # no note: those start with #
COUNTS = st.integers(1, 10_000)
RATES = st.floats(1e-12, 1e6)
LEVELS = st.tuples(st.integers(0, 5), st.integers(0, 5)).map(
    lambda ends: tuple(range(min(ends), max(ends) + 1))
)
PRESETS = st.builds(
    Preset,
    dataset=NAMES,
    category=NAMES,
    levels=LEVELS,
    loss=NAMES,
    **dict.fromkeys(("finetune_lr", "flow_lr", "w_fe"), RATES),
    **dict.fromkeys(("warmup", "in_domain"), st.booleans()),
    **dict.fromkeys(
        (
            "finetune_batch",
            "freeze_epochs",
            "joint_epochs",
            "passes_per_epoch",
            "repeat",
            "flow_batch",
        ),
        COUNTS,
    ),
    **dict.fromkeys(("flow_epochs", "flow_passes", "base_flow_epochs", "base_flow_passes"), COUNTS),
)
PUBLISHED = st.builds(
    PublishedMetrics,
    dataset=NAMES,
    category=NAMES,
    **dict.fromkeys(list(PublishedMetrics.__dataclass_fields__)[2:], st.floats(0, 100)),
)


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value[0]}-{value[-1]}" if isinstance(value, tuple) else str(value)


def table(rows: list[Any], note: str = "# source: a test") -> str:
    out = io.StringIO()
    out.write(f"{note}\n")
    writer = csv.writer(out)
    writer.writerow([field.name for field in dataclasses.fields(rows[0])])
    writer.writerows([[cell(value) for value in vars(row).values()] for row in rows])
    return out.getvalue()


# ---- the tables that ship ----


def test_the_tables_hold_the_authors_categories() -> None:
    assert list(presets()) == CATEGORIES
    assert all(published_metrics(category) is not None for category in CATEGORIES)
    assert [name for name, preset in presets().items() if preset.dataset == "btad"] == [
        "01",
        "02",
        "03",
    ]


@pytest.mark.parametrize("category", [*CATEGORIES, "something else"])
def test_every_preset_makes_valid_settings(category: str) -> None:
    preset = preset_for(category)
    settings = preset.settings
    assert settings.fusion_weight == pytest.approx(preset.w_fe / (3 + preset.w_fe))
    assert settings.finetune.epochs == preset.freeze_epochs + preset.joint_epochs
    assert preset.warmup is False, (
        "stage one has no setting for a warm-up: no script of the authors' uses one"
    )


def test_screw_by_hand() -> None:
    settings = preset_for("screw").settings
    finetune, flow = settings.finetune, settings.flow
    assert (settings.backbone.name, settings.backbone.levels, settings.image.size) == (
        "wide_resnet50_2",
        (2, 3, 4),
        (256, 256),
    )
    assert (
        finetune.frozen_epochs,
        finetune.joint_epochs,
        finetune.repeats,
        finetune.batch_size,
    ) == (35, 5, 5, 16)
    assert (finetune.learning_rate, finetune.backbone_factor, finetune.weight_decay) == (
        5e-4,
        1.0,
        1e-4,
    )
    assert (finetune.loss, finetune.target, finetune.schedule, finetune.skips) == (
        "soft",
        "signed",
        "cosine",
        True,
    )
    assert (flow.depth, flow.start, flow.passes, flow.vectors_per_step, flow.learning_rate) == (
        6,
        "random",
        200.0,
        256,
        2e-4,
    )
    assert (
        flow.warmup,
        flow.clamp,
        flow.permutation,
        flow.condition_dims,
        flow.level_quantile,
    ) == (0.08, 1.9, "soft", 128, 1.0)
    assert settings.defects.texture_share == 0.5
    assert settings.fusion_weight == 0.25  # 1 / (3 + 1)
    assert preset_for("screw").baseline_passes == 200.0


def test_btad_02_by_hand() -> None:
    preset = preset_for("02")
    settings = preset.settings
    finetune, flow = settings.finetune, settings.flow
    assert (
        finetune.frozen_epochs,
        finetune.joint_epochs,
        finetune.repeats,
        finetune.batch_size,
    ) == (7, 1, 15, 16)
    assert (flow.passes, flow.learning_rate, preset.baseline_passes) == (48.0, 2e-5, 48.0)
    assert settings.fusion_weight == pytest.approx(0.05 / 3.05)


def test_without_in_domain_sources_textures_fill_all_defects() -> None:
    preset = dataclasses.replace(preset_for("screw"), in_domain=False, levels=(2, 3))
    settings = preset.settings
    assert settings.defects.texture_share == 1.0
    assert settings.fusion_weight == pytest.approx(1 / 3)  # of two levels


def test_an_unknown_category_takes_the_row_that_most_share() -> None:
    common = common_preset()
    assert preset_for("something else") == preset_for(None) == common
    assert (common.dataset, common.category) == ("", "")
    assert sharing(common) == ["carpet", "grid", "hazelnut", "leather", "tile", "wood"]
    assert preset_for("carpet").recipe == common
    assert all(len(sharing(preset)) <= len(sharing(common)) for preset in presets().values())


def test_published_metrics_are_shares() -> None:
    screw = {
        "image_auroc": 0.9452,
        "pixel_ap": 0.5243,
        "pixel_auroc": 0.9904,
        "au_pro_200_steps": 0.9538,
    }
    assert published_metrics("screw") == screw
    assert published_metrics("something else") is None


def test_the_means_of_the_published_metrics_are_the_published_means() -> None:
    """METHOD of the paper: MVTec AD's averages."""
    found = [
        published_metrics(category)
        for category, preset in presets().items()
        if preset.dataset == "mvtec"
    ]
    for name, mean in {
        "image_auroc": 0.9809,
        "pixel_ap": 0.7209,
        "pixel_auroc": 0.9859,
        "au_pro_200_steps": 0.9569,
    }.items():
        assert sum(metrics[name] for metrics in found if metrics) / len(found) == pytest.approx(
            mean, abs=2e-4
        ), name


# ---- reading ----


@given(st.lists(PRESETS, min_size=1, max_size=4))
def test_presets_come_back_as_they_were_written(rows: list[Preset]) -> None:
    assert parse_rows(Preset, table(rows), "a table") == rows


@given(st.lists(PUBLISHED, min_size=1, max_size=4))
def test_published_metrics_come_back_as_they_were_written(rows: list[PublishedMetrics]) -> None:
    assert parse_rows(PublishedMetrics, table(rows), "a table") == rows


@given(PRESETS)
def test_a_fusion_weight_is_a_share_that_ranks_as_the_authors_sum(preset: Preset) -> None:
    """w a_cls + (1 - w) mean is the authors' w_fe a_cls + sum, up to a factor."""
    w, levels = preset.fusion_weight, len(preset.levels)
    assert 0 <= w <= 1
    assert w == pytest.approx((1 - w) * preset.w_fe / levels, rel=1e-6, abs=1e-9)


@given(PUBLISHED, st.text(st.characters(blacklist_categories=["Cs"]), max_size=20), st.floats(0, 1))
def test_any_text_is_a_table_or_refused_in_one_line(
    row: PublishedMetrics, new: str, place: float
) -> None:
    """Random text somewhere in a table."""
    text = table([row, row])
    cut = int(place * len(text))
    refused = ""
    try:
        rows = parse_rows(PublishedMetrics, text[:cut] + new + text[cut:], "a table")
    except SettingsError as error:
        refused = str(error)
    else:
        assert all(isinstance(found, PublishedMetrics) for found in rows)
    assert not refused or (refused.startswith("a table") and "\n" not in refused)


ROW = preset_for("screw")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (",finetune_lr,", ",finetune_rate,", ["the column 'finetune_lr' is missing"]),
        ("w_fe\r\n", "w_fe,extra\r\n", ["the column 'extra' is unknown"]),
        (",0.0005,", ",fast,", ["line 3", "finetune_lr is 'fast': it must be a number"]),
        (",0.0005,", ",nan,", ["line 3", "finetune_lr is nan"]),
        (",0.0005,", ",-0.0005,", ["line 3", "finetune_lr is -0.0005: it must be above 0"]),
        (",35,", ",3.5,", ["line 3", "freeze_epochs is '3.5': it must be a whole number"]),
        (",35,", ",0,", ["line 3", "freeze_epochs is 0: it must be 1 or more"]),
        (",yes,", ",maybe,", ["line 3", "in_domain is 'maybe': it must be yes or no"]),
        (",2-4,", ",deep,", ["line 3", "levels is 'deep': it must be levels such as 2-4"]),
        (",2-4,", ",4-2,", ["line 3", "levels is ()"]),
        ("mvtec,screw", "mvtec", ["line 3", "it must have 19 cells"]),
        ("mvtec,screw", "mvtec,screw,nut", ["line 3", "it must have 19 cells"]),
    ],
)
def test_a_damaged_table_is_refused_with_its_line(old: str, new: str, words: list[str]) -> None:
    text = table([ROW])
    assert old in text
    with pytest.raises(SettingsError) as caught:
        parse_rows(Preset, text.replace(old, new, 1), "t.csv")
    assert str(caught.value).startswith("t.csv")
    for word in words:
        assert word in str(caught.value)


def test_a_line_s_number_counts_notes_and_empty_lines() -> None:
    text = table([ROW, ROW], note="# one\n\n# two")
    lines = text.splitlines()
    lines[-1] = lines[-1].replace(",35,", ",x,")
    with pytest.raises(SettingsError, match=rf"line {len(lines)}: freeze_epochs"):
        parse_rows(Preset, "\n".join(lines), "t.csv")
