"""Charts of a product's trials: the objective over the fusion weight, all settings beside each
other, the Pareto front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from clsnf.reporting.blocks import Chart
from clsnf.reporting.chart_parts import axis, rule, shown, style
from clsnf.reporting.formats import figure_name, is_finite, setting
from clsnf.reporting.study_files import Product, Record
from clsnf.reporting.trials import pareto

_SHORTER = {"finetune_epochs": "epochs", "flow_depth": "depth"}


def weight_chart(product: Product, objective: str) -> Chart | None:
    """The objective over the fusion weight: a line for each (backbone, depth) that was swept, a
    marker for every trial.
    """
    sweeps = product.result.get("sweeps") or []
    trials = [
        t
        for t in product.finished_trials
        if is_finite(t.get("config/fusion_weight")) and is_finite(t["objective"])
    ]
    groups: dict[str, list[Record]] = {}
    for trial in trials:
        groups.setdefault(
            _without_weight({n: trial.get(f"config/{n}") for n in product.parameters}), []
        ).append(trial)
    lines = {_without_weight(sweep["config"]): sweep["weights"] for sweep in sweeps}
    data: list[dict[str, Any]] = []
    for index, name in enumerate(dict.fromkeys([*lines, *groups])):
        look = style(index)
        legend = {"name": shown(name), "legendgroup": str(index)}
        pairs = [pair for pair in lines.get(name, []) if is_finite(pair[1])]
        if pairs:
            data.append(
                legend
                | {
                    "type": "scatter",
                    "mode": "lines",
                    "x": [weight for weight, _ in pairs],
                    "y": [value for _, value in pairs],
                    "line": {"color": look["colour"], "dash": look["dash"], "width": 2},
                    "hovertemplate": "w %{x:.3f}: %{y:.4f}<extra>swept</extra>",
                }
            )
        if groups.get(name):
            data.append(
                legend
                | {
                    "type": "scatter",
                    "mode": "markers",
                    "showlegend": not pairs,
                    "x": [trial["config/fusion_weight"] for trial in groups[name]],
                    "y": [trial["objective"] for trial in groups[name]],
                    "text": [f"trial {trial['trial']}" for trial in groups[name]],
                    "marker": {"color": look["colour"], "symbol": look["marker"], "size": 8},
                    "hovertemplate": "%{text}, w %{x:.3f}: %{y:.4f}<extra></extra>",
                }
            )
    if not data:
        return None
    layout: dict[str, Any] = {
        "xaxis": axis("fusion weight: 0 density alone, 1 classifier alone", range=[-0.03, 1.03]),
        "yaxis": axis(f"{figure_name(objective)} on validation defects"),
    }
    weight = (product.result.get("chosen") or {}).get("fusion_weight")
    if is_finite(weight):
        layout["shapes"] = [rule("x", weight)]
        layout["annotations"] = [
            {
                "x": weight,
                "y": 1.02,
                "yref": "paper",
                "text": "chosen",
                "showarrow": False,
                "yanchor": "bottom",
            }
        ]
    reading = (
        "Lines: swept exactly at the end, for the best few backbones and depths. Markers: single "
        "trials. A flat top forgives a wrong "
        "weight."
    )
    return Chart(
        "The objective over the fusion weight", {"data": data, "layout": layout}, reading, 380
    )


def _without_weight(config: Record) -> str:
    values = [
        f"{_SHORTER.get(name, name)} {setting(value)}"
        for name, value in sorted(config.items())
        if name != "fusion_weight"
    ]
    return ", ".join(values) or "all trials"


def parallel_chart(product: Product, objective: str) -> Chart | None:
    """Every finished trial as a line over the axes of its settings and its objective: plain lines,
    which print and need no WebGL.
    """
    trials = [t for t in product.finished_trials if is_finite(t.get("objective"))]
    if len(trials) < 2:
        return None
    axes = [*(f"config/{name}" for name in product.parameters), "objective"]
    scales = {name: _scale([trial.get(name) for trial in trials]) for name in axes}
    ranked = sorted(trials, key=lambda trial: trial["objective"])
    winner = product.result.get("trial")
    data: list[dict[str, Any]] = []
    for rank, trial in enumerate(ranked):
        third = min(2, 3 * rank // len(ranked))
        is_winner = trial["trial"] == winner
        look = ("@muted", "dot", 1), ("@5", "dash", 1.2), ("@1", "solid", 1.8)
        colour, dash, width = ("@2", "solid", 4) if is_winner else look[third]
        title = ("winner", "best third", "middle third", "worst third")[
            0 if is_winner else 3 - third
        ]
        values = [scales[name][0](trial.get(name)) for name in axes]
        about = "<br>".join(
            f"{shown(_axis_name(name, objective))}: {shown(setting(trial.get(name)))}"
            for name in axes
        )
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": title,
                "legendgroup": title,
                "showlegend": title not in {trace["name"] for trace in data},
                "x": list(range(len(axes))),
                "y": values,
                "line": {"color": colour, "dash": dash, "width": width},
                "marker": {
                    "size": 9 if is_winner else 4,
                    "color": colour,
                    "symbol": "diamond" if is_winner else "circle",
                },
                "text": [f"trial {trial['trial']}<br>{about}"] * len(axes),
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    marks = [
        {
            "x": place,
            "y": height,
            "text": shown(label),
            "showarrow": False,
            "xanchor": "left",
            "xshift": 6,
            "font": {"size": 10},
        }
        for place, name in enumerate(axes)
        for label, height in scales[name][1]
    ]
    layout = {
        "xaxis": {
            "tickvals": list(range(len(axes))),
            "ticktext": [shown(_axis_name(name, objective)) for name in axes],
            "range": [-0.15, len(axes) - 0.6],
            "side": "top",
            "showgrid": True,
        },
        "yaxis": {"visible": False, "range": [-0.06, 1.06]},
        "annotations": marks,
        "legend": {"orientation": "h", "y": -0.05},
    }
    left_out = len(product.finished_trials) - len(trials)
    reading = (
        "Each line is a trial; lines that end high on the right came out well. Follow the thick "
        "ones back to see what they share."
    )
    if left_out:
        reading += f" {left_out} trials without a finite objective are not drawn."
    return Chart(
        "Every trial, from its settings to its objective",
        {"data": data, "layout": layout},
        reading,
        380,
    )


def _axis_name(name: str, objective: str) -> str:
    return figure_name(objective) if name == "objective" else name.removeprefix("config/")


def _scale(values: Sequence[Any]) -> tuple[Any, list[tuple[str, float]]]:
    """From values to heights in [0, 1], and a few labels with theirs."""
    numbers = [v for v in values if is_finite(v)]
    if len(numbers) == len(values) and len(set(numbers)) > 3:
        low, high = min(numbers), max(numbers)
        return lambda v: (v - low) / (high - low), [
            (setting(float(low + s * (high - low))), s) for s in (0.0, 0.5, 1.0)
        ]
    choices = sorted(
        {setting(v) for v in values},
        key=lambda text: (not _is_number(text), float(text) if _is_number(text) else 0, text),
    )
    heights = {
        text: (index / (len(choices) - 1) if len(choices) > 1 else 0.5)
        for index, text in enumerate(choices)
    }
    return lambda v: heights[setting(v)], list(heights.items())


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def front_chart(product: Product, objectives: Sequence[str]) -> Chart | None:
    """The trials in two figures, and the line of those that no other trial beats in both."""
    names = [n if n == "latency" else f"validation_{n}" for n in objectives][:2]
    if len(names) < 2:
        names = [
            *names,
            next(n for n in ("validation_image_auroc", "validation_pixel_ap") if n not in names),
        ]
    signs = {name: -1 if name == "latency" else 1 for name in names}
    trials = [t for t in product.finished_trials if all(is_finite(t.get(name)) for name in names)]
    if len(trials) < 2:
        return None
    best = sorted(pareto(trials, signs), key=lambda trial: trial[names[1]])
    winner = [trial for trial in trials if trial["trial"] == product.result.get("trial")]

    def points(rows: list[Record], title: str, **more: Any) -> dict[str, Any]:
        return {
            "type": "scatter",
            "name": title,
            "x": [row[names[1]] for row in rows],
            "y": [row[names[0]] for row in rows],
            "text": [f"trial {row['trial']}" for row in rows],
            "hovertemplate": "%{text}: %{x:.4g}, %{y:.4g}<extra></extra>",
            **more,
        }

    dots = {"color": "@muted", "symbol": "circle-open", "size": 8}
    ends = {"color": "@1", "symbol": "square", "size": 9}
    star = {"color": "@2", "symbol": "star", "size": 15, "line": {"color": "@ink", "width": 1}}
    data = [
        points(trials, "trials", mode="markers", marker=dots),
        points(
            best,
            "front",
            mode="lines+markers",
            marker=ends,
            line={"color": "@1", "width": 1.5, "dash": "dot"},
        ),
        points(winner, "winner's trial", mode="markers", marker=star),
    ]
    titles = [
        figure_name(n.removeprefix("validation_"))
        + (" (ms a picture)" if n == "latency" else " on validation")
        for n in names
    ]
    layout = {"xaxis": axis(titles[1]), "yaxis": axis(titles[0])}
    reading = (
        f"{len(best)} of {len(trials)} trials are on the front: no other is better in one figure "
        "without being worse in the other."
    )
    if len(objectives) < 2:
        reading += " The study raised the upright figure alone; the other one shows what that cost."
    return Chart("The Pareto front of the trials", {"data": data, "layout": layout}, reading, 360)
