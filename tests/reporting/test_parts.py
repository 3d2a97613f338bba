"""The report's parts: tables as text, numbers for people, fronts, importances, savings,
comparisons.
"""

import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsnf.reporting import formats
from clsnf.reporting.blocks import Chart, Column, Table
from clsnf.reporting.chart_parts import shown
from clsnf.reporting.charts_of_answers import calibration_chart, recall_chart
from clsnf.reporting.charts_of_search import front_chart
from clsnf.reporting.compare import build_comparison
from clsnf.reporting.pictures import Budget
from clsnf.reporting.sections import Context, product_sections, study_sections
from clsnf.reporting.study_files import Product, read_study
from clsnf.reporting.tables import TABLES, all_tables
from clsnf.reporting.trials import importances, pareto, saved_seconds
from tests.support.made_up_study import change, write_study

# ---- tables and numbers ----


def one(text: str) -> Table:
    return Table("t", "T", [Column("a", "A"), Column("b", "B", "figure")], [{"a": text, "b": 0.5}])


@given(st.text())
def test_any_text_survives_csv_and_is_no_formula(text: str) -> None:
    (_, (cell, value)) = csv.reader(io.StringIO(one(text).csv(), newline=""))
    kept = text.replace("\r", " ")
    assert cell in (kept, f"'{kept}")
    assert not cell.startswith(("=", "+", "-", "@", "\t"))
    assert value == "0.5"


@given(st.text())
def test_any_text_is_one_cell_of_a_markdown_table_without_markup(text: str) -> None:
    table = [line for line in one(text).markdown().split("\n") if line.startswith("|")]
    assert len(table) == 3
    cell = table[2].removeprefix("| ").removesuffix(" | 0.500 |")
    unescaped = cell.replace("\\\\", "")
    for mark in "|<>`*_[]":
        assert unescaped.count(mark) == unescaped.count("\\" + mark)


@given(st.one_of(st.floats(), st.none(), st.integers(-(10**9), 10**9)))
def test_no_number_that_is_not_finite_looks_like_one(value: float | None) -> None:
    for name, how in formats.FORMATS.items():
        text = how(value)
        assert text
        if name not in ("text", "setting") and (value is None or not math.isfinite(value)):
            assert not any(character.isdigit() for character in text), name


def test_numbers_read_as_people_write_them() -> None:
    assert [formats.percent(share) for share in (0.0384, 0.01, 0.0013)] == [
        "3.8 %",
        "1 %",
        "0.13 %",
    ]
    assert formats.percent(0.917) == "92 %"
    assert formats.percent(0) == "0 %"
    assert formats.gain(-0.0123) == "−0.012"
    assert [formats.duration(s) for s in (0.31, 42, 600, 9000)] == [
        "0.3 s",
        "42 s",
        "10 min",
        "2.5 h",
    ]


@pytest.mark.parametrize("name", TABLES)
def test_every_table_names_its_product_and_has_what_its_columns_ask_for(
    name: str, tmp_path: Path
) -> None:
    table = TABLES[name](read_study(write_study(tmp_path / "run", ["alpha", "beta"])))
    assert table.name == name
    assert "category" in {column.key for column in table.columns}
    if name != "suspects":
        assert {row["category"] for row in table.rows} == {"alpha", "beta"}
        for column in table.columns:
            if column.key not in ("cause", "winner", "authors", "next") and not column.key.endswith(
                "_authors"
            ):
                assert any(row.get(column.key) is not None for row in table.rows), column.key


# ---- trials ----

ROWS = st.lists(
    st.fixed_dictionaries({"a": st.integers(0, 5).map(float), "b": st.integers(0, 5).map(float)}),
    min_size=1,
    max_size=12,
)


@given(ROWS)
def test_on_the_front_is_exactly_who_is_beaten_by_nobody(rows: list[dict[str, Any]]) -> None:
    best = pareto(rows, {"a": 1, "b": -1})

    def beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return (
            one["a"] >= other["a"]
            and one["b"] <= other["b"]
            and (one["a"], one["b"]) != (other["a"], other["b"])
        )

    assert best == [row for row in rows if not any(beats(other, row) for other in rows)]
    assert best


def test_values_that_are_not_finite_are_on_no_front() -> None:
    assert pareto([{"a": math.nan, "b": 9.0}, {"a": 1.0, "b": 1.0}], {"a": 1, "b": 1}) == [
        {"a": 1.0, "b": 1.0}
    ]


def trials(count: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "trial": i,
            "status": "finished",
            "objective": float(i % 7),
            "config/decides": i % 7 / 7,
            "config/idle": i * 5 % 11 / 11,
        }
        | more
        for i in range(count)
    ]


def test_the_parameter_that_decides_has_the_importance() -> None:
    space = {name: {"type": "float", "low": 0.0, "high": 1.0} for name in ("decides", "idle")}
    found = importances(Product("p", trials=trials(40)), space)
    assert found["decides"] > 0.9
    assert sum(found.values()) == pytest.approx(1)
    assert found == importances(Product("p", trials=trials(40)), space), (
        "the same trials, the same importances"
    )


def test_importances_take_lists_and_words_and_leave_out_what_never_changed() -> None:
    own = [
        t | {"config/levels": [[1, 2], [2, 3]][t["trial"] % 2], "config/loss": "soft"}
        for t in trials(12)
    ]
    found = importances(
        Product("p", trials=own), {"levels": {"type": "choice", "values": [[1, 2], [2, 3]]}}
    )
    assert set(found) == {"decides", "idle", "levels"}


def test_too_few_trials_have_no_importances() -> None:
    assert importances(Product("p", trials=trials(3)), {}) == {}
    assert importances(Product("p", trials=trials(9, objective=0.5)), {}) == {}
    assert importances(Product("p", trials=trials(9, objective=math.nan)), {}) == {}


def test_what_sharing_saved_is_the_work_that_trials_found_done() -> None:
    own = trials(4, stages_reused=1)
    for trial, seconds in zip(own, (10.0, 0.0, 0.0, 20.0), strict=True):
        trial |= {"seconds_trunk": seconds, "seconds_scoring": 0.5}
    assert saved_seconds(own) == 30.0  # two trials, at the median of 10 and 20
    assert saved_seconds(trials(4, stages_reused=0)) is None


# ---- charts ----


def test_the_front_of_two_objectives_is_drawn_over_both_and_marks_the_winner() -> None:
    values = [(0.5, 10.0), (0.6, 20.0), (0.4, 30.0), (0.7, math.nan)]
    own = [
        {
            "trial": i,
            "status": "finished",
            "objective": ap,
            "validation_pixel_ap": ap,
            "latency": ms,
        }
        for i, (ap, ms) in enumerate(values)
    ]
    chart = front_chart(Product("p", {"trial": 1}, own), ["pixel_ap", "latency"])
    assert chart is not None
    trials, best, winner = chart.figure["data"]
    assert (trials["x"], trials["y"]) == ([10.0, 20.0, 30.0], [0.5, 0.6, 0.4])
    assert sorted(best["text"]) == ["trial 0", "trial 1"]
    assert winner["text"] == ["trial 1"]
    assert "2 of 3 trials" in chart.reading


def test_recall_in_bins_counts_every_region_once() -> None:
    regions = [{"share": i / 100, "found": i % 2 == 0, "overlap": 0.5} for i in range(23)]
    chart = recall_chart(Product("p", regions=regions), "share", "t", "u", 100)
    assert chart is not None
    found, overlap = chart.figure["data"]
    sizes = [int(text.split()[0]) for text in found["text"]]
    assert sum(sizes) == 23
    assert sum(
        size * share for size, share in zip(sizes, found["y"], strict=True)
    ) == pytest.approx(12)
    assert set(overlap["y"]) == {0.5}
    for share, up, down in zip(
        found["y"], found["error_y"]["array"], found["error_y"]["arrayminus"], strict=True
    ):
        assert 0 <= share - down <= share <= share + up <= 1


def test_calibration_points_are_the_thresholds_that_the_normals_allow() -> None:
    held_out, test = [0.1, 0.2, 0.3], [0.15, 0.25, 0.35, 0.05]
    images = [
        {"split": "validation", "label": 0, "score": score, "verdict": False} for score in held_out
    ]
    images += [{"split": "test", "label": 0, "score": score, "verdict": False} for score in test]
    chart = calibration_chart(Product("p", images=images))
    assert chart is not None
    seen = chart.figure["data"][2]
    assert seen["x"] == pytest.approx([0.75, 0.5, 0.25])
    assert seen["y"] == [0.75, 0.5, 0.25]


def test_what_a_chart_tells_apart_by_colour_it_tells_apart_by_marker_dash_or_width_too(
    tmp_path: Path,
) -> None:
    study = read_study(write_study(tmp_path / "run", ["alpha", "bottle"], trials=12))
    context = Context(study, all_tables(study), Budget(study.products))
    sections = [*study_sections(context), *product_sections(context, study.products[0])]
    drawn = [block for section in sections for block in section.blocks if isinstance(block, Chart)]
    assert len(drawn) >= 12
    for chart in drawn:
        looks: dict[str, tuple[object, ...]] = {}
        for trace in chart.figure["data"]:
            marker, line = trace.get("marker", {}), trace.get("line", {})
            look = (
                trace["type"],
                trace.get("mode"),
                marker.get("symbol"),
                line.get("dash"),
                line.get("width"),
                trace.get("fill"),
            )
            looks.setdefault(trace.get("legendgroup") or trace.get("name"), look)
        if all(trace["type"] == "box" for trace in chart.figure["data"]):
            continue  # told apart by their place
        assert len(set(looks.values())) == len(looks), chart.title


def test_texts_from_outside_are_no_markup_in_charts() -> None:
    assert shown("<b>&amp;</b>") == "&lt;b&gt;&amp;amp;&lt;/b&gt;"


# ---- comparisons ----


def test_a_comparison_says_category_by_category_what_changed(tmp_path: Path) -> None:
    before = write_study(tmp_path / "before", ["gone", "same", "moved"])
    now = write_study(tmp_path / "now", ["same", "moved", "new"])
    figures = read_study(before).products[1].figures
    for run, lower in ((before, 0.0), (now, 0.2)):
        names = [product.name for product in read_study(run).products]
        for name in names:
            less = lower if name == "moved" else 0.0
            test = read_study(run).products[names.index(name)].result["test"]
            change(
                run,
                name,
                test=test | {"figures": {key: value - less for key, value in figures.items()}},
            )
    change(
        now,
        "moved",
        settings=read_study(now).products[0].result["settings"] | {"fusion_weight": 0.9},
    )
    built = build_comparison([before, now], tmp_path / "out")
    with (built.tables / "changes.csv").open() as file:
        found = {row["category"]: row for row in csv.DictReader(file)}
    assert {name: row["change"] for name, row in found.items()} == {
        "gone": "gone",
        "new": "new",
        "same": "about the same",
        "moved": "worse",
    }
    assert float(found["moved"]["pixel_ap_change"]) == pytest.approx(-0.2)
    with (built.tables / "settings.csv").open() as file:
        differing = {row["category"]: row["difference"] for row in csv.DictReader(file)}
    assert differing == {"moved": "fusion_weight was 0.25, is 0.9", "same": "nothing"}
    assert built.page.is_file()


def test_a_change_of_image_auroc_is_paired_on_the_same_test_images(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    before, now = (write_study(tmp_path / name, ["alpha"]) for name in ("before", "now"))
    path = before / "evidence" / "alpha" / "images.parquet"
    rows = pq.read_table(path).to_pylist()
    for (
        row
    ) in rows:  # in the earlier study every other defect was missed, and its data lay elsewhere
        row["path"] = "/elsewhere" + row["path"]
        if row["label"] and row["path"].endswith(("0.png", "2.png", "4.png")):
            row["score"] = 0.0
    pq.write_table(pa.Table.from_pylist(rows), path)
    built = build_comparison([before, now], tmp_path / "out")
    with (built.tables / "changes.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["significance"] == "significantly better"
    assert 0 < float(row["low"]) < float(row["high"])
    pq.write_table(pa.Table.from_pylist(rows[:-3]), path)
    built = build_comparison([before, now], tmp_path / "out")
    assert "not the same test images" in (built.tables / "changes.md").read_text()


def test_all_tables_are_those_of_the_registry(tmp_path: Path) -> None:
    assert list(all_tables(read_study(write_study(tmp_path / "run", ["a"])))) == list(TABLES)
