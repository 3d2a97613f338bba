"""Charts: what they draw, and how they tell its parts apart."""

import dataclasses
import math
from pathlib import Path

import pytest

from clsnf.reporting.blocks import Chart
from clsnf.reporting.chart_style import escape
from clsnf.reporting.pictures import PictureBudget
from clsnf.reporting.search_charts import front_chart
from clsnf.reporting.sections import Context, product_sections, study_sections
from clsnf.reporting.study_files import Product, read_study
from clsnf.reporting.tables import all_tables
from clsnf.reporting.winner_charts import calibration_chart, size_chart
from clsnf.results import CategoryResult, ImageEvidence, Measurements, RegionEvidence, TrialResult
from tests.support.made_up_study import write_study


def finished(number: int, pixel_ap: float, latency: float) -> TrialResult:
    measured = Measurements(validation={"pixel_ap": pixel_ap}, latency=latency)
    return TrialResult("p", number, "finished", objective=pixel_ap, measured=measured)


def test_the_front_of_two_objectives_is_drawn_over_both_and_marks_the_winner(
    tmp_path: Path,
) -> None:
    (made_up,) = read_study(write_study(tmp_path / "run", ["p"])).products
    assert made_up.winner is not None
    result = CategoryResult(winner=dataclasses.replace(made_up.winner, trial=1))
    values = [(0.5, 10.0), (0.6, 20.0), (0.4, 30.0), (0.7, math.nan)]
    own = [finished(number, *pair) for number, pair in enumerate(values)]
    chart = front_chart(Product("p", result, own), ["pixel_ap", "latency"])
    assert chart is not None
    trials, best, winner = chart.figure["data"]
    assert (trials["x"], trials["y"]) == ([10.0, 20.0, 30.0], [0.5, 0.6, 0.4])
    assert sorted(best["text"]) == ["trial 0", "trial 1"]
    assert winner["text"] == ["trial 1"]
    assert "2 of 3 trials" in chart.reading


def test_recall_in_bins_counts_every_region_once() -> None:
    regions = [
        RegionEvidence("x.png", "dent", 1, i / 100, None, 0.5, i % 2 == 0, True) for i in range(23)
    ]
    chart = size_chart(Product("p", regions=regions))
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
        ImageEvidence(split, "x.png", "good", 0, score, False)
        for split, scores in (("validation", held_out), ("test", test))
        for score in scores
    ]
    chart = calibration_chart(Product("p", images=images))
    assert chart is not None
    seen = chart.figure["data"][2]
    assert seen["x"] == pytest.approx([0.75, 0.5, 0.25])
    assert seen["y"] == [0.75, 0.5, 0.25]


def test_what_a_chart_tells_apart_by_colour_it_tells_apart_by_marker_dash_or_width_too(
    tmp_path: Path,
) -> None:
    study = read_study(write_study(tmp_path / "run", ["alpha", "bottle"], trials=12))
    context = Context(study, all_tables(study), PictureBudget(study.products))
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
    assert escape("<b>&amp;</b>") == "&lt;b&gt;&amp;amp;&lt;/b&gt;"
