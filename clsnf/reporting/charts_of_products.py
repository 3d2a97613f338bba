"""Charts over the products of a study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clsnf.published import figures_for
from clsnf.reporting.blocks import Chart
from clsnf.reporting.chart_parts import axis, shown
from clsnf.reporting.formats import figure, figure_name, is_finite
from clsnf.reporting.study_files import StudyFiles

WINNER, BASELINE, AUTHORS = "@1", "@2", "@3"


def verdict_chart(study: StudyFiles, name: str) -> Chart | None:
    """A figure of every product with its interval, beside the baseline's and the authors'."""
    products = [p for p in study.products if is_finite(p.figures.get(name))]
    if not products:
        return None
    places = [shown(p.name) for p in products]

    def points(values: list[Any], intervals: list[Any], title: str, colour: str, symbol: str) -> dict[str, Any]:
        pairs = [pair or (value, value) for pair, value in zip(intervals, values, strict=True)]
        up = [None if v is None else p[1] - v for p, v in zip(pairs, values, strict=True)]
        down = [None if v is None else v - p[0] for p, v in zip(pairs, values, strict=True)]
        return {
            "type": "scatter",
            "mode": "markers",
            "name": title,
            "x": places,
            "y": values,
            "error_y": {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": colour, "thickness": 1.5},
            "marker": {"color": colour, "symbol": symbol, "size": 10, "line": {"width": 1.5, "color": colour}},
            "hovertemplate": "%{x}: %{y:.3f}<extra>" + title + "</extra>",
        }

    own = points(
        [p.figures[name] for p in products],
        [(p.evidence.get("intervals") or {}).get(name) for p in products],
        "winner",
        WINNER,
        "circle",
    )
    data = [own]
    beside = [(p.baseline.get("figures") or {}).get(name) for p in products]
    if any(is_finite(value) for value in beside):
        intervals = [(p.baseline.get("intervals") or {}).get(name) for p in products]
        data.append(points(beside, intervals, "baseline (cflow)", BASELINE, "square-open"))
    key = {"au_pro": "au_pro_200_steps"}.get(name, name)
    published = [(figures_for(p.name) or {}).get(key) for p in products]
    if any(value is not None for value in published):
        data.append(points(published, [None] * len(products), "published by the authors", AUTHORS, "x"))
    known = [value for trace in data for value in trace["y"] if is_finite(value)]
    lows = [v - d for t in data for v, d in zip(t["y"], t["error_y"]["arrayminus"], strict=True) if is_finite(v) and is_finite(d)]
    room = 0.06 * max(0.05, 1 - min(known + lows))
    upright = axis(figure_name(name), range=[min(known + lows) - room, min(1, max(known) + 0.3) + room])
    layout = {"yaxis": upright, "xaxis": {"type": "category"}, "scattermode": "group"}
    worst = min(products, key=lambda p: p.figures[name])
    reading = (
        f"Test images; bars are 95 % intervals over images. Lowest: {worst.name}, {figure(worst.figures[name])}. "
        "Where bars of winner and baseline overlap, the paired comparison in the table decides, not the bars."
    )
    return Chart(f"{figure_name(name)} of every product", {"data": data, "layout": layout}, reading, 360)


def bars(title: str, values: Mapping[str, float], unit: str, reading: str, pattern: str = ".2f") -> Chart:
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
    layout = {"xaxis": axis(unit, rangemode="tozero"), "yaxis": {"autorange": "reversed", "type": "category"}}
    return Chart(title, {"data": [trace], "layout": layout}, reading, 90 + 30 * len(values))
