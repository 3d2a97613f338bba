"""Charts over the products of one study, or of several; and bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clsnf.reporting.blocks import Chart
from clsnf.reporting.chart_style import axis, escape, scatter
from clsnf.reporting.formats import is_finite, metric, metric_name
from clsnf.reporting.study_files import Product, StudyFiles
from clsnf.reporting.tables import published
from clsnf.results import Interval


@dataclass(frozen=True)
class Series:
    """How one series of :func:`metric_chart` is called and drawn."""

    title: str
    colour: str
    marker: str


WINNER = Series("winner", "@1", "circle")
BASELINE = Series("baseline (cflow)", "@2", "square-open")
AUTHORS = Series("published by the authors", "@3", "x")


def verdict_chart(study: StudyFiles, name: str) -> Chart | None:
    """A metric of every product with its interval, beside the baseline's and the authors'."""
    products = [product for product in study.products if is_finite(product.metrics.get(name))]
    if not products:
        return None
    data = [winner_points(products, name, WINNER)]
    baselines = [product.baseline for product in products]
    values = [one.metrics.get(name) if one is not None else None for one in baselines]
    if any(is_finite(value) for value in values):
        intervals = [one.intervals.get(name) if one is not None else None for one in baselines]
        data.append(_points(products, values, intervals, BASELINE))
    authors = [published(product, name) for product in products]
    if any(value is not None for value in authors):
        data.append(_points(products, authors, [None] * len(products), AUTHORS))
    worst = min(products, key=lambda product: product.metrics[name])
    reading = (
        f"Test images; bars are 95 % intervals over images. Lowest: {worst.name}, "
        f"{metric(worst.metrics[name])}. Where bars of winner and baseline overlap, the paired "
        "comparison in the table decides, not the bars."
    )
    return metric_chart(f"{metric_name(name)} of every product", name, data, reading)


def winner_points(products: Sequence[Product], name: str, series: Series) -> dict[str, Any]:
    """Winners' test metrics, each with its interval where it is known; all must be finite."""
    values = [product.metrics[name] for product in products]
    return _points(products, values, [p.intervals.get(name) for p in products], series)


def _points(
    products: Sequence[Product],
    values: Sequence[float | None],
    intervals: Sequence[Interval | None],
    series: Series,
) -> dict[str, Any]:
    """A value for each product, with its interval; None for what is not known."""
    above: list[float | None] = []
    below: list[float | None] = []
    known = [value if is_finite(value) else None for value in values]
    for value, bounds in zip(known, intervals, strict=True):
        if value is None:
            above.append(None)
            below.append(None)
            continue
        low, high = bounds if bounds and all(map(is_finite, bounds)) else (value, value)
        above.append(high - value)
        below.append(value - low)
    bars = {"type": "data", "symmetric": False, "color": series.colour, "thickness": 1.5}
    return scatter(
        series.title,
        [escape(product.name) for product in products],
        known,
        error_y={**bars, "array": above, "arrayminus": below},
        marker={
            "color": series.colour,
            "symbol": series.marker,
            "size": 10,
            "line": {"width": 1.5, "color": series.colour},
        },
        hovertemplate=f"%{{x}}: %{{y:.3f}}<extra>{series.title}</extra>",
    )


def metric_chart(title: str, name: str, data: list[dict[str, Any]], reading: str) -> Chart:
    """Points of several series side by side, with an axis from the lowest to the highest."""
    highest = max(value for trace in data for value in trace["y"] if value is not None)
    lowest = min(
        value - below
        for trace in data
        for value, below in zip(trace["y"], trace["error_y"]["arrayminus"], strict=True)
        if value is not None
    )
    margin = 0.06 * max(0.05, 1 - lowest)
    y_axis = axis(metric_name(name), range=[lowest - margin, min(1, highest + 0.3) + margin])
    layout = {"yaxis": y_axis, "xaxis": {"type": "category"}, "scattermode": "group"}
    return Chart(title, {"data": data, "layout": layout}, reading, 360)


def bars(
    title: str, values: Mapping[str, float], unit: str, reading: str, pattern: str = ".2f"
) -> Chart:
    """Horizontal bars, the first on top, each with its number in the format `pattern`."""
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": list(values.values()),
        "y": [escape(name) for name in values],
        "text": [format(value, pattern) for value in values.values()],
        "textposition": "auto",
        "marker": {"color": "@1", "line": {"color": "@ink", "width": 0.5}},
        "hovertemplate": "%{y}: %{x:" + pattern + "}<extra></extra>",
    }
    layout = {
        "xaxis": axis(unit, rangemode="tozero"),
        "yaxis": {"autorange": "reversed", "type": "category"},
    }
    return Chart(title, {"data": [trace], "layout": layout}, reading, 90 + 30 * len(values))
