"""Charts of a winner: its scores, recall, calibration, validation families, learning curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import beta

from clsnf.metrics import METRICS
from clsnf.reporting.blocks import Chart
from clsnf.reporting.chart_style import axis, escape, scatter, style_of, vertical_line
from clsnf.reporting.formats import is_finite, metric_name
from clsnf.reporting.study_files import Product
from clsnf.results import ImageEvidence, RegionEvidence

_FEWEST_REGIONS = 4  # of a bin, and so of the chart of recall
_MOST_BINS = 6

# ---- scores ----


def score_chart(product: Product) -> Chart | None:
    """Every image's score by split and defect type, with the threshold."""
    if not product.images:
        return None
    groups: dict[str, list[ImageEvidence]] = {}
    for image in product.images:
        group = f"{image.split}: {'normals' if not image.label else image.defect_type}"
        groups.setdefault(group, []).append(image)
    order = sorted(
        groups,
        key=lambda name: (not name.endswith(": normals"), name.startswith("validation"), name),
    )
    layout: dict[str, Any] = {
        "xaxis": axis("score"),
        "yaxis": {"autorange": "reversed", "type": "category"},
    }
    threshold = product.winner.threshold.value if product.winner is not None else None
    if is_finite(threshold):
        layout |= vertical_line(threshold, f"threshold {threshold:.4f}")
    reading = (
        "Images left of the line pass, images right of it are rejected. Validation defects are "
        "synthetic: they chose the winner only."
    )
    strange = sum(not is_finite(image.score) for image in product.images)
    if strange:
        reading += f" {strange} scores are not finite and not drawn."
    figure = {"data": [_score_box(name, groups[name]) for name in order], "layout": layout}
    return Chart("Scores of every image", figure, reading, 130 + 42 * len(order))


def _score_box(name: str, images: Sequence[ImageEvidence]) -> dict[str, Any]:
    """A box with every finite score as a point."""
    images = [image for image in images if is_finite(image.score)]
    if name.endswith(": normals"):
        colour, marker = "@1", "circle-open"
    else:
        colour, marker = ("@2", "diamond") if name.startswith("test") else ("@5", "x")
    return {
        "type": "box",
        "name": escape(name),
        "orientation": "h",
        "x": [image.score for image in images],
        "boxpoints": "all",
        "jitter": 0.5,
        "pointpos": 0,
        "fillcolor": "@clear",
        "line": {"width": 1, "color": colour},
        "marker": {"color": colour, "symbol": marker, "size": 5, "opacity": 0.75},
        "text": [escape(image.path.rpartition("/")[2]) for image in images],
        "hovertemplate": "%{text}: %{x:.4f}<extra></extra>",
        "showlegend": False,
    }


# ---- recall ----


def size_chart(product: Product) -> Chart | None:
    """Recall by the size of the defect regions."""
    return _recall_chart(
        product,
        lambda region: region.share,
        "Recall by the size of the defect",
        "share of the image, %",
    )


def contrast_chart(product: Product) -> Chart | None:
    """Recall by the contrast of the defect regions."""
    return _recall_chart(
        product,
        lambda region: region.contrast,
        "Recall by the contrast of the defect",
        "grey difference to its surroundings, %",
    )


def _recall_chart(
    product: Product,
    value_of: Callable[[RegionEvidence], float | None],
    title: str,
    unit: str,
) -> Chart | None:
    """Share of the defect regions that were found, in bins of equal counts of a value in [0, 1]."""
    pairs = [(value_of(region), region) for region in product.regions]
    known = [(value, region) for value, region in pairs if is_finite(value)]
    if len(known) < _FEWEST_REGIONS:
        return None
    names, found, above, below, overlap, sizes = [], [], [], [], [], []
    for name, regions in _bins(known):
        n, k = len(regions), sum(region.found for region in regions)
        names.append(name)
        found.append(k / n)
        below.append(k / n - (float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0))
        above.append((float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0) - k / n)
        overlap.append(float(np.mean([region.overlap for region in regions])))
        sizes.append(f"{n} regions")
    bars = {"type": "data", "symmetric": False, "color": "@1", "thickness": 1.5}
    data = [
        scatter(
            "regions found",
            names,
            found,
            mode="markers+lines",
            error_y={**bars, "array": above, "arrayminus": below},
            marker={"color": "@1", "symbol": "circle", "size": 9},
            line={"color": "@1", "width": 1},
            text=sizes,
            hovertemplate="%{x}: %{y:.0%} of %{text}<extra></extra>",
        ),
        scatter(
            "of their pixels",
            names,
            overlap,
            mode="markers+lines",
            marker={"color": "@2", "symbol": "square-open", "size": 8},
            line={"color": "@2", "width": 1, "dash": "dash"},
            hovertemplate="%{x}: %{y:.0%} of the pixels<extra></extra>",
        ),
    ]
    layout = {
        "xaxis": axis(unit, type="category"),
        "yaxis": axis("share found", range=[-0.03, 1.05], tickformat=".0%"),
    }
    share = np.mean([region.found for _, region in known])
    reading = (
        f"{len(known)} defect regions of the test images in bins of equal counts; {share:.0%} "
        "have a pixel above the line that pictures draw. Bars: 95 % intervals (Clopper and "
        "Pearson)."
    )
    return Chart(title, {"data": data, "layout": layout}, reading, 320)


def _bins(
    known: Sequence[tuple[float, RegionEvidence]],
) -> list[tuple[str, list[RegionEvidence]]]:
    """Regions in bins of equal counts of their values, each with its range in percent."""
    values = np.array([value for value, _ in known])
    count = min(_MOST_BINS, len(known) // _FEWEST_REGIONS)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, count + 1)))
    last = max(0, len(edges) - 2)
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, last)
    bins = []
    for place in range(last + 1):
        regions = [region for (_, region), own in zip(known, places, strict=True) if own == place]
        if regions:
            high = edges[min(place + 1, len(edges) - 1)]
            bins.append((f"{_short(100 * edges[place])} to {_short(100 * high)}", regions))
    return bins


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


# ---- calibration ----


def calibration_chart(product: Product) -> Chart | None:
    """False-reject rates that thresholds promise, against the rates on the test images.

    Each held-out normal's score is a threshold. Its promise is the share of new normals above it.
    """
    held_out = np.sort(_scores(product, "validation", defects=False))
    normals = _scores(product, "test", defects=False)
    defects = _scores(product, "test", defects=True)
    if not len(held_out) or not len(normals):
        return None
    n = len(held_out)
    data = _calibration_traces(held_out, normals, defects)
    layout = {
        "xaxis": axis(
            "false-reject rate that the threshold stands for",
            tickformat=".0%",
            range=[0, max(0.3, 4 / (n + 1))],
        ),
        "yaxis": axis("share rejected", tickformat=".0%", range=[-0.02, 1.02]),
    }
    reading = (
        f"Each point is a threshold that {n} held-out normals allow. Inside the band, test normals "
        "behave as promised. Above it, they are not like the normals of the calibration. The "
        "dashed line shows the recall that a lower threshold would give."
    )
    return Chart("Calibration: promised and seen", {"data": data, "layout": layout}, reading, 340)


def _calibration_traces(
    held_out: np.ndarray, normals: np.ndarray, defects: np.ndarray
) -> list[dict[str, Any]]:
    """The band, the promise, and the rates on the test images; `held_out` are sorted scores."""
    n = len(held_out)
    ranks = np.arange(1, n + 1)
    promised = [float(rate) for rate in 1 - ranks / (n + 1)]
    low, high = (beta.ppf(q, n + 1 - ranks, ranks).tolist() for q in (0.025, 0.975))
    data = [
        scatter(
            "95 % band",
            [*promised, *promised[::-1]],
            [*low, *high[::-1]],
            mode="lines",
            fill="toself",
            fillcolor="@shade",
            line={"width": 0, "color": "@shade"},
            hoverinfo="skip",
        ),
        scatter(
            "as promised",
            [0, 1],
            [0, 1],
            mode="lines",
            line={"color": "@ink", "dash": "dot", "width": 1},
            hoverinfo="skip",
        ),
        scatter(
            "test normals rejected",
            promised,
            [float((normals > threshold).mean()) for threshold in held_out],
            mode="lines+markers",
            line={"color": "@1", "width": 1.5},
            marker={"color": "@1", "symbol": "circle", "size": 5},
            hovertemplate="promised %{x:.1%}, seen %{y:.1%}<extra></extra>",
        ),
    ]
    if len(defects):
        data.append(
            scatter(
                "test defects rejected",
                promised,
                [float((defects > threshold).mean()) for threshold in held_out],
                mode="lines+markers",
                line={"color": "@2", "width": 1.5, "dash": "dash"},
                marker={"color": "@2", "symbol": "square-open", "size": 5},
                hovertemplate="promised %{x:.1%}, recall %{y:.1%}<extra></extra>",
            )
        )
    return data


def _scores(product: Product, split: str, *, defects: bool) -> np.ndarray:
    """The finite scores of a split's normals, or of its defects."""
    return np.array(
        [
            image.score
            for image in product.images
            if image.split == split and bool(image.label) == defects and is_finite(image.score)
        ]
    )


# ---- validation and learning ----


def families_chart(product: Product) -> Chart | None:
    """Validation metrics of the winner, family by family."""
    families = product.winner.validation.families if product.winner is not None else {}
    names = dict.fromkeys(name for metrics in families.values() for name in metrics)
    data = []
    for index, name in enumerate(name for name in names if name in METRICS):
        style = style_of(index)
        values = [metrics.get(name) for metrics in families.values()]
        data.append(
            scatter(
                metric_name(name),
                [value if is_finite(value) else None for value in values],
                [escape(family) for family in families],
                marker={"color": style.colour, "symbol": style.marker, "size": 10},
                hovertemplate=f"%{{y}}: %{{x:.3f}}<extra>{metric_name(name)}</extra>",
            )
        )
    if not data:
        return None
    title = "metric on the family's defects and all validation normals"
    layout = {"xaxis": axis(title, range=[-0.03, 1.03]), "yaxis": {"type": "category"}}
    reading = (
        "What the winner was chosen by: synthetic defects of families that training never saw. A "
        "family far to the left is a kind of defect that is hard to see on this product."
    )
    return Chart(
        "Validation defects, family by family",
        {"data": data, "layout": layout},
        reading,
        130 + 34 * len(families),
    )


def learning_charts(product: Product) -> list[Chart]:
    """The loss of the classifier over its epochs, and of the flows over their steps."""
    if product.facts is None:
        return []
    found = [_finetuning_chart(product), _flows_chart(product)]
    return [chart for chart in found if chart is not None]


def _finetuning_chart(product: Product) -> Chart | None:
    if product.facts is None or not product.facts.losses.finetuning:
        return None
    losses, frozen = product.facts.losses.finetuning, product.facts.frozen_epochs
    layout: dict[str, Any] = {"xaxis": axis("epoch"), "yaxis": axis("loss", rangemode="tozero")}
    if 0 < frozen < len(losses):
        layout |= vertical_line(frozen + 0.5, "the backbone joins in")
    reading = (
        f"From {losses[0]:.4g} to {losses[-1]:.4g}. If the last epochs still fall steeply, try "
        "more epochs."
    )
    figure = {"data": [_curve("loss", losses, 0)], "layout": layout}
    return Chart("Stage one: the classifier's loss", figure, reading, 300)


def _flows_chart(product: Product) -> Chart | None:
    curves = [curve for curve in product.facts.losses.flows if curve] if product.facts else []
    if not curves:
        return None
    data = [_curve(f"level {index + 1}", curve, index) for index, curve in enumerate(curves)]
    layout = {
        "xaxis": axis("fiftieth of the steps"),
        "yaxis": axis("−log σ(log-likelihood per dimension)"),
    }
    reading = (
        "One curve for each level of the feature pyramid. Flows begin as the Gaussian of the data, "
        "so the loss falls little."
    )
    return Chart("Stage two: the flows' loss", {"data": data, "layout": layout}, reading, 300)


def _curve(name: str, values: Sequence[float], index: int) -> dict[str, Any]:
    style = style_of(index)
    return scatter(
        name,
        list(range(1, len(values) + 1)),
        [value if is_finite(value) else None for value in values],
        mode="lines+markers",
        line={"color": style.colour, "dash": style.dash, "width": 1.8},
        marker={"color": style.colour, "symbol": style.marker, "size": 5},
        hovertemplate=f"%{{x}}: %{{y:.4g}}<extra>{name}</extra>",
    )
