"""Charts of a winner's answers: scores, recall, calibration, validation families; and of how it
learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import beta

from clsnf.metrics import METRICS
from clsnf.reporting.blocks import Chart
from clsnf.reporting.chart_parts import axis, rule, shown, style
from clsnf.reporting.formats import figure_name, is_finite
from clsnf.reporting.study_files import Product, Record


def score_chart(product: Product) -> Chart | None:
    """Every image's score by kind, with the threshold."""
    if not product.images:
        return None
    groups: dict[str, list[Record]] = {}
    for row in product.images:
        title = {"validation": "validation", "test": "test"}[row["split"]]
        groups.setdefault(
            f"{title}: {'normals' if not row['label'] else row['defect_type']}", []
        ).append(row)
    order = sorted(
        groups,
        key=lambda name: (not name.endswith(": normals"), name.startswith("validation"), name),
    )
    data = []
    for name in order:
        rows = [row for row in groups[name] if is_finite(row["score"])]
        kind = 0 if name.endswith(": normals") else 1 if name.startswith("test") else 2
        look = (("@1", "circle-open"), ("@2", "diamond"), ("@5", "x"))[kind]
        data.append(
            {
                "type": "box",
                "name": shown(name),
                "orientation": "h",
                "x": [row["score"] for row in rows],
                "boxpoints": "all",
                "jitter": 0.5,
                "pointpos": 0,
                "fillcolor": "@clear",
                "line": {"width": 1, "color": look[0]},
                "marker": {"color": look[0], "symbol": look[1], "size": 5, "opacity": 0.75},
                "text": [shown(str(row["path"]).rpartition("/")[2]) for row in rows],
                "hovertemplate": "%{text}: %{x:.4f}<extra></extra>",
                "showlegend": False,
            }
        )
    threshold = (product.result.get("threshold") or {}).get("value")
    layout: dict[str, Any] = {
        "xaxis": axis("score"),
        "yaxis": {"autorange": "reversed", "type": "category"},
    }
    if is_finite(threshold):
        layout["shapes"] = [rule("x", threshold)]
        layout["annotations"] = [
            {
                "x": threshold,
                "y": 1.01,
                "yref": "paper",
                "text": f"threshold {threshold:.4f}",
                "showarrow": False,
                "yanchor": "bottom",
            }
        ]
    strange = sum(not is_finite(row["score"]) for row in product.images)
    reading = (
        "Left of the line passes, right of it is rejected. Validation defects are synthetic: they "
        "chose the winner only."
    )
    if strange:
        reading += f" {strange} scores are not finite and not drawn."
    return Chart(
        "Scores of every picture", {"data": data, "layout": layout}, reading, 130 + 42 * len(order)
    )


def recall_chart(product: Product, key: str, title: str, unit: str, scale: float) -> Chart | None:
    """Share of the defect regions found, by a property of theirs in bins of equal counts.

    Args:
        key: of the regions' rows, a number in [0, 1].
        title, unit: for people.
        scale: what values are multiplied by for the axis.
    """
    regions = [row for row in product.regions if is_finite(row.get(key))]
    if len(regions) < 4:
        return None
    values = np.array([row[key] for row in regions])
    count = min(6, len(regions) // 4)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, count + 1)))
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, max(0, len(edges) - 2))
    names, found, low, high, overlap, sizes = [], [], [], [], [], []
    for place in range(max(1, len(edges) - 1)):
        chosen = [row for row, b in zip(regions, bins, strict=True) if b == place]
        if not chosen:
            continue
        n, k = len(chosen), sum(row["found"] for row in chosen)
        names.append(
            f"{_short(scale * edges[place])} to "
            f"{_short(scale * edges[min(place + 1, len(edges) - 1)])}"
        )
        found.append(k / n)
        low.append(k / n - (float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0))
        high.append((float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0) - k / n)
        overlap.append(float(np.mean([row["overlap"] for row in chosen])))
        sizes.append(f"{n} regions")
    data = [
        {
            "type": "scatter",
            "mode": "markers+lines",
            "name": "regions found",
            "x": names,
            "y": found,
            "error_y": {
                "type": "data",
                "symmetric": False,
                "array": high,
                "arrayminus": low,
                "color": "@1",
                "thickness": 1.5,
            },
            "marker": {"color": "@1", "symbol": "circle", "size": 9},
            "line": {"color": "@1", "width": 1},
            "text": sizes,
            "hovertemplate": "%{x}: %{y:.0%} of %{text}<extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "markers+lines",
            "name": "of their pixels",
            "x": names,
            "y": overlap,
            "marker": {"color": "@2", "symbol": "square-open", "size": 8},
            "line": {"color": "@2", "width": 1, "dash": "dash"},
            "hovertemplate": "%{x}: %{y:.0%} of the pixels<extra></extra>",
        },
    ]
    layout = {
        "xaxis": axis(unit, type="category"),
        "yaxis": axis("share found", range=[-0.03, 1.05], tickformat=".0%"),
    }
    share = np.mean([row["found"] for row in regions])
    reading = (
        f"{len(regions)} defect regions of the test images in bins of equal counts; {share:.0%} "
        "have a pixel above the line that pictures "
        "draw. Bars: 95 % intervals (Clopper and Pearson)."
    )
    return Chart(title, {"data": data, "layout": layout}, reading, 320)


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def calibration_chart(product: Product) -> Chart | None:
    """False-reject rates promised by validation normals against those seen on test normals, and the
    recall that each buys.
    """
    scores = {
        kind: np.array(
            [
                r["score"]
                for r in product.images
                if (r["split"], bool(r["label"])) == kind and is_finite(r["score"])
            ]
        )
        for kind in (("validation", False), ("test", False), ("test", True))
    }
    held_out, normals, defects = (
        scores["validation", False],
        scores["test", False],
        scores["test", True],
    )
    if not len(held_out) or not len(normals):
        return None
    n = len(held_out)
    ranked = np.sort(held_out)
    ranks = np.arange(1, n + 1)
    promised = [float(p) for p in 1 - ranks / (n + 1)]
    seen = [float((normals > ranked[k - 1]).mean()) for k in ranks]
    band = [beta.ppf(q, n + 1 - ranks, ranks) for q in (0.025, 0.975)]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "95 % band",
            "x": [*promised, *promised[::-1]],
            "y": [*band[0].tolist(), *band[1][::-1].tolist()],
            "fill": "toself",
            "fillcolor": "@shade",
            "line": {"width": 0, "color": "@shade"},
            "hoverinfo": "skip",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "as promised",
            "x": [0, 1],
            "y": [0, 1],
            "line": {"color": "@ink", "dash": "dot", "width": 1},
            "hoverinfo": "skip",
        },
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": "test normals rejected",
            "x": promised,
            "y": seen,
            "line": {"color": "@1", "width": 1.5},
            "marker": {"color": "@1", "symbol": "circle", "size": 5},
            "hovertemplate": "promised %{x:.1%}, seen %{y:.1%}<extra></extra>",
        },
    ]
    if len(defects):
        recall = [float((defects > ranked[k - 1]).mean()) for k in ranks]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": "test defects rejected",
                "x": promised,
                "y": recall,
                "line": {"color": "@2", "width": 1.5, "dash": "dash"},
                "marker": {"color": "@2", "symbol": "square-open", "size": 5},
                "hovertemplate": "promised %{x:.1%}, recall %{y:.1%}<extra></extra>",
            }
        )
    most = max(0.3, 4 / (n + 1))
    layout = {
        "xaxis": axis(
            "false-reject rate that the threshold stands for", tickformat=".0%", range=[0, most]
        ),
        "yaxis": axis("share rejected", tickformat=".0%", range=[-0.02, 1.02]),
    }
    reading = (
        f"Each point is a threshold that {n} held-out normals allow. Inside the band, test "
        "normals behave as promised; above it, they "
        "are not like those it was calibrated on. The dashed line says what a laxer threshold "
        "would buy."
    )
    return Chart("Calibration: promised and seen", {"data": data, "layout": layout}, reading, 340)


def families_chart(product: Product) -> Chart | None:
    """Validation figures of the winner, family by family."""
    families = (product.result.get("validation") or {}).get("families") or {}
    names = [
        n for n in dict.fromkeys(n for found in families.values() for n in found) if n in METRICS
    ]
    if not families or not names:
        return None
    data = []
    for index, name in enumerate(names):
        look = style(index)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": figure_name(name),
                "x": [
                    found.get(name) if is_finite(found.get(name)) else None
                    for found in families.values()
                ],
                "y": [shown(family) for family in families],
                "marker": {"color": look["colour"], "symbol": look["marker"], "size": 10},
                "hovertemplate": "%{y}: %{x:.3f}<extra>" + figure_name(name) + "</extra>",
            }
        )
    layout = {
        "xaxis": axis(
            "figure on the family's defects and all validation normals", range=[-0.03, 1.03]
        ),
        "yaxis": {"type": "category"},
    }
    return Chart(
        "Validation defects, family by family",
        {"data": data, "layout": layout},
        "What the winner was chosen by: synthetic defects of families that training never saw. A "
        "family far to the left is a kind of "
        "defect that this product hides.",
        130 + 34 * len(families),
    )


def learning_charts(product: Product) -> list[Chart]:
    """The loss of the classifier over its epochs, and of the flows over their steps."""
    losses = product.facts.get("losses") or {}
    charts = []
    finetuning = losses.get("finetuning") or []
    if finetuning:
        frozen = product.facts.get("frozen_epochs") or 0
        layout: dict[str, Any] = {"xaxis": axis("epoch"), "yaxis": axis("loss", rangemode="tozero")}
        if 0 < frozen < len(finetuning):
            layout["shapes"] = [rule("x", frozen + 0.5)]
            layout["annotations"] = [
                {
                    "x": frozen + 0.5,
                    "y": 1.01,
                    "yref": "paper",
                    "text": "the backbone joins in",
                    "showarrow": False,
                    "yanchor": "bottom",
                }
            ]
        reading = (
            f"From {finetuning[0]:.4g} to {finetuning[-1]:.4g}. A last stretch that still falls "
            "steeply asks for more epochs."
        )
        charts.append(
            Chart(
                "Stage one: the classifier's loss",
                {"data": [_curve("loss", finetuning, 0)], "layout": layout},
                reading,
                300,
            )
        )
    flows = [curve for curve in losses.get("flows") or [] if curve]
    if flows:
        data = [_curve(f"level {index + 1}", curve, index) for index, curve in enumerate(flows)]
        layout = {
            "xaxis": axis("fiftieth of the steps"),
            "yaxis": axis("−log σ(log-likelihood per dimension)"),
        }
        reading = (
            "One curve a level of the feature pyramid. Flows begin as the Gaussian of the data, "
            "so they have little to lose."
        )
        charts.append(
            Chart("Stage two: the flows' loss", {"data": data, "layout": layout}, reading, 300)
        )
    return charts


def _curve(name: str, values: Sequence[float], index: int) -> dict[str, Any]:
    look = style(index)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(range(1, len(values) + 1)),
        "y": [value if is_finite(value) else None for value in values],
        "line": {"color": look["colour"], "dash": look["dash"], "width": 1.8},
        "marker": {"color": look["colour"], "symbol": look["marker"], "size": 5},
        "hovertemplate": "%{x}: %{y:.4g}<extra>" + name + "</extra>",
    }
