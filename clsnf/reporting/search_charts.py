"""Charts of a product's trials: the fusion weight, all settings side by side, the Pareto front.

``optuna.visualization`` has charts of the same names. They are not used: its parallel coordinates
need WebGL, which does not print, and it tells trials apart by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from clsnf.evaluation.pareto import pareto_front
from clsnf.reporting.blocks import Chart
from clsnf.reporting.chart_style import axis, escape, scatter, style_of, vertical_line
from clsnf.reporting.formats import is_finite, metric_name, setting
from clsnf.reporting.study_files import Product
from clsnf.results import TrialResult

_SHORTER = {"finetune_epochs": "epochs", "flow_depth": "depth"}

# ---- the objective over the fusion weight ----


def weight_chart(product: Product, objective: str) -> Chart | None:
    """The objective over the fusion weight: a line for each sweep, a marker for each trial.

    A sweep evaluates many weights on the maps of one trial. Trials and sweeps that share all other
    settings share their colour.
    """
    winner = product.winner
    groups: dict[str, list[TrialResult]] = {}
    for trial in product.finished_trials:
        if is_finite(trial.config.get("fusion_weight")) and is_finite(trial.objective):
            groups.setdefault(_without_weight(trial, product.parameters), []).append(trial)
    sweeps = {_in_short(sweep.config): sweep.weights for sweep in (winner.sweeps if winner else [])}
    data: list[dict[str, Any]] = []
    for index, name in enumerate(dict.fromkeys([*sweeps, *groups])):
        pairs = [pair for pair in sweeps.get(name, []) if is_finite(pair[1])]
        data += _weight_traces(index, name, pairs, groups.get(name, []))
    if not data:
        return None
    layout: dict[str, Any] = {
        "xaxis": axis("fusion weight: 0 density alone, 1 classifier alone", range=[-0.03, 1.03]),
        "yaxis": axis(f"{metric_name(objective)} on validation defects"),
    }
    weight = winner.chosen.get("fusion_weight") if winner is not None else None
    if is_finite(weight):
        layout |= vertical_line(weight, "chosen")
    reading = (
        "Lines: sweeps on the maps of the best few trials. Markers: each trial at its best weight, "
        "or at the one that it drew in a study of an earlier version. Where the top is flat, the "
        "exact weight matters little."
    )
    figure = {"data": data, "layout": layout}
    return Chart("The objective over the fusion weight", figure, reading, 380)


def _weight_traces(
    index: int, name: str, pairs: Sequence[tuple[float, float]], trials: Sequence[TrialResult]
) -> list[dict[str, Any]]:
    """The line of a sweep and the markers of the trials that belong to it."""
    style, group = style_of(index), str(index)
    line = scatter(
        escape(name),
        [weight for weight, _ in pairs],
        [value for _, value in pairs],
        mode="lines",
        legendgroup=group,
        line={"color": style.colour, "dash": style.dash, "width": 2},
        hovertemplate="w %{x:.3f}: %{y:.4f}<extra>swept</extra>",
    )
    markers = scatter(
        escape(name),
        [trial.config["fusion_weight"] for trial in trials],
        [trial.objective for trial in trials],
        legendgroup=group,
        showlegend=not pairs,
        text=[f"trial {trial.number}" for trial in trials],
        marker={"color": style.colour, "symbol": style.marker, "size": 8},
        hovertemplate="%{text}, w %{x:.3f}: %{y:.4f}<extra></extra>",
    )
    return [trace for trace in (line, markers) if trace["x"]]


def _without_weight(trial: TrialResult, parameters: Sequence[str]) -> str:
    return _in_short({name: trial.config.get(name) for name in parameters})


def _in_short(config: dict[str, Any]) -> str:
    """A config in one line, without the fusion weight."""
    values = [
        f"{_SHORTER.get(name, name)} {setting(value)}"
        for name, value in sorted(config.items())
        if name != "fusion_weight"
    ]
    return ", ".join(values) or "all trials"


# ---- all settings side by side ----


class _Look(NamedTuple):
    """How a trial's line is drawn."""

    title: str
    colour: str
    dash: str
    width: float


_WINNER = _Look("winner", "@2", "solid", 4)
_THIRDS = (  # of the trials, from the lowest objective to the highest
    _Look("worst third", "@muted", "dot", 1),
    _Look("middle third", "@5", "dash", 1.2),
    _Look("best third", "@1", "solid", 1.8),
)


class _Axis(NamedTuple):
    """An axis of the chart.

    Attributes:
        title: for people.
        value_of: a trial's value.
        height_of: a value's height in [0, 1].
        labels: a few values as texts, with their heights.
    """

    title: str
    value_of: Callable[[TrialResult], Any]
    height_of: Callable[[Any], float]
    labels: list[tuple[str, float]]


def parallel_chart(product: Product, objective: str) -> Chart | None:
    """Parallel coordinates: each finished trial is a line over its settings and its objective."""
    trials = [trial for trial in product.finished_trials if is_finite(trial.objective)]
    if len(trials) < 2:
        return None
    axes = [_axis_of(trials, name, _setting_of(name)) for name in product.parameters]
    title = f"{metric_name(objective)} on validation defects"
    axes.append(_axis_of(trials, title, lambda trial: trial.objective))
    data: list[dict[str, Any]] = []
    ranked = sorted(trials, key=lambda trial: trial.objective or 0.0)
    for rank, trial in enumerate(ranked):
        is_winner = trial.number == product.winner_trial
        look = _WINNER if is_winner else _THIRDS[min(2, 3 * rank // len(ranked))]
        is_new = look.title not in {trace["name"] for trace in data}
        data.append(_parallel_trace(trial, axes, look, is_new))
    layout = {
        "xaxis": {
            "tickvals": list(range(len(axes))),
            "ticktext": [escape(one.title) for one in axes],
            "range": [-0.15, len(axes) - 0.6],
            "side": "top",
            "showgrid": True,
        },
        "yaxis": {"visible": False, "range": [-0.06, 1.06]},
        "annotations": [
            _axis_label(place, label, height)
            for place, one in enumerate(axes)
            for label, height in one.labels
        ],
        "legend": {"orientation": "h", "y": -0.05},
    }
    reading = (
        "Each line is a trial, at its best fusion weight; lines that end high on the right have a "
        "high objective. Follow the "
        "thick ones back to see what they share."
    )
    left_out = len(product.finished_trials) - len(trials)
    if left_out:
        reading += f" {left_out} trials without a finite objective are not drawn."
    figure = {"data": data, "layout": layout}
    return Chart("Every trial, from its settings to its objective", figure, reading, 380)


def _setting_of(name: str) -> Callable[[TrialResult], Any]:
    return lambda trial: trial.config.get(name)


def _parallel_trace(
    trial: TrialResult, axes: Sequence[_Axis], look: _Look, in_legend: bool
) -> dict[str, Any]:
    """A trial's line."""
    values = [(one, one.value_of(trial)) for one in axes]
    about = "<br>".join(f"{escape(one.title)}: {escape(setting(value))}" for one, value in values)
    is_winner = look is _WINNER
    return scatter(
        look.title,
        list(range(len(axes))),
        [one.height_of(value) for one, value in values],
        mode="lines+markers",
        legendgroup=look.title,
        showlegend=in_legend,
        line={"color": look.colour, "dash": look.dash, "width": look.width},
        marker={
            "size": 9 if is_winner else 4,
            "color": look.colour,
            "symbol": "diamond" if is_winner else "circle",
        },
        text=[f"trial {trial.number}<br>{about}"] * len(axes),
        hovertemplate="%{text}<extra></extra>",
    )


def _axis_label(place: int, label: str, height: float) -> dict[str, Any]:
    return {
        "x": place,
        "y": height,
        "text": escape(label),
        "showarrow": False,
        "xanchor": "left",
        "xshift": 6,
        "font": {"size": 10},
    }


def _axis_of(
    trials: Sequence[TrialResult], title: str, value_of: Callable[[TrialResult], Any]
) -> _Axis:
    """A linear axis for more than three numbers, else one with a place for each value."""
    values = [value_of(trial) for trial in trials]
    numbers = [value for value in values if is_finite(value)]
    if len(numbers) == len(values) and len(set(numbers)) > 3:
        low, high = min(numbers), max(numbers)
        labels = [(setting(float(low + s * (high - low))), s) for s in (0.0, 0.5, 1.0)]
        return _Axis(title, value_of, lambda value: (value - low) / (high - low), labels)
    choices = sorted({setting(value) for value in values}, key=_choice_order)
    heights = {
        text: (index / (len(choices) - 1) if len(choices) > 1 else 0.5)
        for index, text in enumerate(choices)
    }
    return _Axis(title, value_of, lambda value: heights[setting(value)], list(heights.items()))


def _choice_order(text: str) -> tuple[bool, float, str]:
    """Numbers first, by their values; then other texts."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    return (not math.isfinite(value), value if math.isfinite(value) else 0.0, text)


# ---- the Pareto front ----


def front_chart(product: Product, objectives: Sequence[str]) -> Chart | None:
    """The trials in two metrics, with the Pareto front."""
    upright, across = _front_metrics(objectives)
    points = [
        (trial, x, y)
        for trial in product.finished_trials
        if (x := _value_of(trial, across)) is not None
        and (y := _value_of(trial, upright)) is not None
    ]
    if len(points) < 2:
        return None
    signs = [-1 if name == "latency" else 1 for name in (across, upright)]
    front = pareto_front([[signs[0] * x, signs[1] * y] for _, x, y in points])
    best = sorted((points[index] for index in front), key=lambda point: point[1])
    winner = [point for point in points if point[0].number == product.winner_trial]

    def trace(rows: Sequence[tuple[TrialResult, float, float]], title: str, **more: Any) -> Any:
        return scatter(
            title,
            [x for _, x, _ in rows],
            [y for _, _, y in rows],
            text=[f"trial {trial.number}" for trial, _, _ in rows],
            hovertemplate="%{text}: %{x:.4g}, %{y:.4g}<extra></extra>",
            **more,
        )

    dots = {"color": "@muted", "symbol": "circle-open", "size": 8}
    ends = {"color": "@1", "symbol": "square", "size": 9}
    line = {"color": "@1", "width": 1.5, "dash": "dot"}
    star = {"color": "@2", "symbol": "star", "size": 15, "line": {"color": "@ink", "width": 1}}
    data = [
        trace(points, "trials", marker=dots),
        trace(best, "front", mode="lines+markers", marker=ends, line=line),
        trace(winner, "winner's trial", marker=star),
    ]
    layout = {"xaxis": axis(_front_title(across)), "yaxis": axis(_front_title(upright))}
    reading = (
        f"{len(best)} of {len(points)} trials are on the front: no other trial is better in one "
        "metric without being worse in the other."
    )
    if len(objectives) < 2:
        reading += " The study maximized the vertical metric alone; the other shows the cost."
    figure = {"data": data, "layout": layout}
    return Chart("The Pareto front of the trials", figure, reading, 360)


def _front_metrics(objectives: Sequence[str]) -> tuple[str, str]:
    """The first two objectives; beside a single one, image AUROC or pixel AP."""
    if len(objectives) > 1:
        return objectives[0], objectives[1]
    other = next(name for name in ("image_auroc", "pixel_ap") if name != objectives[0])
    return objectives[0], other


def _value_of(trial: TrialResult, objective: str) -> float | None:
    """An objective's value; None where it is not known or not finite."""
    try:
        value = trial.value_of(objective)
    except KeyError:
        return None
    return value if is_finite(value) else None


def _front_title(name: str) -> str:
    return metric_name(name) + (" (ms an image)" if name == "latency" else " on validation")
