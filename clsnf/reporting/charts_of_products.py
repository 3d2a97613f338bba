"""Charts over the products of one study, or of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clsnf.reporting.blocks import Chart
from clsnf.reporting.chart_parts import axis, shown
from clsnf.reporting.formats import figure, figure_name, is_finite
from clsnf.reporting.study_files import Product, StudyFiles
from clsnf.reporting.tables import published

WINNER, BASELINE, AUTHORS = "@1", "@2", "@3"


def verdict_chart(study: StudyFiles, name: str) -> Chart | None:
    """A figure of every product with its interval, beside the baseline's and the authors'."""
    products = [p for p in study.products if is_finite(p.figures.get(name))]
    if not products:
        return None
    data = [figure_points(products, name, "winner", WINNER, "circle")]
    beside = [(p.baseline.get("figures") or {}).get(name) for p in products]
    if any(is_finite(value) for value in beside):
        intervals = [(p.baseline.get("intervals") or {}).get(name) for p in products]
        data.append(
            points(products, beside, intervals, "baseline (cflow)", BASELINE, "square-open")
        )
    authors = [published(p, name) for p in products]
    if any(value is not None for value in authors):
        data.append(
            points(
                products, authors, [None] * len(products), "published by the authors", AUTHORS, "x"
            )
        )
    worst = min(products, key=lambda p: p.figures[name])
    reading = (
        f"Test images; bars are 95 % intervals over images. Lowest: {worst.name}, "
        f"{figure(worst.figures[name])}. "
        "Where bars of winner and baseline overlap, the paired comparison in the table decides, "
        "not the bars."
    )
    return figure_chart(f"{figure_name(name)} of every product", name, data, reading)


def figure_points(
    products: Sequence[Product], name: str, title: str, colour: str, symbol: str
) -> dict[str, Any]:
    """Winners' test figures, each with its interval where the study kept one; all of them must be
    finite.
    """
    intervals = [(p.evidence.get("intervals") or {}).get(name) for p in products]
    return points(products, [p.figures[name] for p in products], intervals, title, colour, symbol)


def points(
    products: Sequence[Product],
    values: Sequence[Any],
    intervals: Sequence[Any],
    title: str,
    colour: str,
    symbol: str,
) -> dict[str, Any]:
    """A value a product, None for none, each with its (low, high), None for none."""
    known: list[Any] = [value if is_finite(value) else None for value in values]
    pairs = [
        pair if pair and all(map(is_finite, pair)) else (value, value)
        for pair, value in zip(intervals, known, strict=True)
    ]
    bars = {
        "array": [None if v is None else pair[1] - v for pair, v in zip(pairs, known, strict=True)],
        "arrayminus": [
            None if v is None else v - pair[0] for pair, v in zip(pairs, known, strict=True)
        ],
    }
    return {
        "type": "scatter",
        "mode": "markers",
        "name": title,
        "x": [shown(p.name) for p in products],
        "y": known,
        "error_y": {"type": "data", "symmetric": False, "color": colour, "thickness": 1.5, **bars},
        "marker": {
            "color": colour,
            "symbol": symbol,
            "size": 10,
            "line": {"width": 1.5, "color": colour},
        },
        "hovertemplate": "%{x}: %{y:.3f}<extra>" + title + "</extra>",
    }


def figure_chart(title: str, name: str, data: list[dict[str, Any]], reading: str) -> Chart:
    """Points of :func:`points` beside each other, the axis as long as they need."""
    highest = max(value for trace in data for value in trace["y"] if value is not None)
    lowest = min(
        v - d
        for t in data
        for v, d in zip(t["y"], t["error_y"]["arrayminus"], strict=True)
        if v is not None
    )
    room = 0.06 * max(0.05, 1 - lowest)
    upright = axis(figure_name(name), range=[lowest - room, min(1, highest + 0.3) + room])
    layout = {"yaxis": upright, "xaxis": {"type": "category"}, "scattermode": "group"}
    return Chart(title, {"data": data, "layout": layout}, reading, 360)


def bars(
    title: str, values: Mapping[str, float], unit: str, reading: str, pattern: str = ".2f"
) -> Chart:
    """Lying bars, the first on top, each with its number."""
    names = [shown(name) for name in values]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": list(values.values()),
        "y": names,
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
