"""Tables of finished cells: one for each system, one over all systems, and all metrics as CSV.

    results.csv            every metric of every cell: variant, category, seed, system, column,
                           figure (the metric's name), value, low, high
    tables/<system>.md     each category: mean and standard deviation over the seeds, with the
                           authors' metrics beside them
    tables/overview.md     all systems, means over the categories; variants beside each other

Standard deviations are over seeds (n - 1): a seed changes the split, the defects and the training.
Intervals in ``results.csv`` are over test images. The two measure different uncertainties and are
not combined.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clsnf.benchmark.request import BASE
from clsnf.benchmark.systems import METHOD, SYSTEMS
from clsnf.core.files import atomic_write
from clsnf.paper.presets import published_metrics
from clsnf.results import CellResult, Metrics, SystemResult

SHOWN = ("image_auroc", "pixel_ap", "pixel_auroc", "au_pro")
VALIDATION_SHOWN = ("pixel_ap", "image_auroc", "au_pro")
# Metric -> name of the authors' metric.
_AUTHORS = {
    "image_auroc": "image_auroc",
    "pixel_ap": "pixel_ap",
    "pixel_auroc": "pixel_auroc",
    "au_pro": "au_pro_200_steps",
}

Column = Literal["validation", "selected", "last", "oracle"]
_TEST_COLUMNS: tuple[Column, ...] = ("selected", "last", "oracle")


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) over n seeds; the deviation is None for one seed."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one value for each seed."""
        return cls(
            statistics.fmean(values),
            statistics.stdev(values) if len(values) > 1 else None,
            len(values),
        )

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f}" + (
            "" if self.deviation is None else f" ± {100 * self.deviation:.2f}"
        )


def column_metrics(system: SystemResult, column: Column) -> Metrics:
    """The metrics of a system in one column; empty where the test images were not opened."""
    if column == "validation":
        return system.validation
    if system.test is None:
        return {}
    metrics: Metrics = getattr(system.test, column)
    return metrics


def spread(cells: Iterable[CellResult], system: str, column: Column, metric: str) -> Spread | None:
    """A metric over seeds; each seed's value is its mean over the categories that all seeds have.

    Returns:
        None where no cell has the metric, or where the seeds have no category in common.
    """
    values: dict[int, dict[str, float]] = {}
    for cell in cells:
        if system not in cell.systems:
            continue
        metrics = column_metrics(cell.systems[system], column)
        if metric in metrics:
            values.setdefault(cell.seed, {})[cell.category] = metrics[metric]
    common = set.intersection(*(set(of_seed) for of_seed in values.values())) if values else set()
    if not common:
        return None
    return Spread.of(
        [statistics.fmean(of_seed[category] for category in common) for of_seed in values.values()]
    )


_CSV_COLUMNS = ("variant", "category", "seed", "system", "column", "figure", "value", "low", "high")


def long_rows(cells: Iterable[CellResult]) -> list[dict[str, Any]]:
    """Every metric of every cell, a row of ``results.csv`` each."""
    rows = []
    for cell in cells:
        for name, system in cell.systems.items():
            intervals = {} if system.test is None else system.test.intervals
            columns: tuple[Column, ...] = ("validation", *_TEST_COLUMNS)
            for column in columns:
                for metric, value in column_metrics(system, column).items():
                    interval = intervals.get(metric) if column == "selected" else None
                    low, high = interval or (None, None)
                    row = (cell.variant, cell.category, cell.seed, name, column, metric)
                    rows.append(dict(zip(_CSV_COLUMNS, (*row, value, low, high), strict=True)))
    return rows


def system_table(cells: Sequence[CellResult], system: str) -> str:
    """One system in Markdown: a row for each category, then their mean."""
    categories = list(dict.fromkeys(cell.category for cell in cells))
    groups = [
        (category, [cell for cell in cells if cell.category == category]) for category in categories
    ]
    if len(groups) > 1:
        groups.append(("mean", list(cells)))
    about = SYSTEMS[system].about
    about = f"{about[0].upper()}{about[1:]}. In percent; ± is the standard deviation over seeds."
    lines = [f"# {system}", "", about, ""]
    header = [
        "category",
        "seeds",
        "selected on validation",
        "last epoch",
        "oracle on test",
        "oracle's gain",
        "authors",
    ]
    for metric in SHOWN:
        rows = []
        for name, group in groups:
            authors = (
                (published_metrics(name) or {}).get(_AUTHORS[metric])
                if system == METHOD and name != "mean"
                else None
            )
            rows.append([name, *_system_row(group, system, metric), _percent(authors)])
        lines += [f"## {metric}", "", *_markdown(header, rows), ""]
    return "\n".join(lines)


def _system_row(cells: Sequence[CellResult], system: str, metric: str) -> list[str]:
    """Number of seeds, the three test columns, and what the oracle gains."""
    selected, last, oracle = (spread(cells, system, column, metric) for column in _TEST_COLUMNS)
    gain = None if selected is None or oracle is None else oracle.mean - selected.mean
    seeds = len({cell.seed for cell in cells})
    return [str(seeds), _text(selected), _text(last), _text(oracle), _percent(gain)]


def overview(cells: Sequence[CellResult]) -> str:
    """All systems, and all variants where there are some, in Markdown."""
    variants = list(dict.fromkeys(cell.variant for cell in cells))
    lines = [
        "# Overview",
        "",
        "Means over the categories, in percent; ± is the standard deviation over seeds.",
        "",
    ]
    sections: tuple[tuple[str, Column, tuple[str, ...]], ...] = (
        ("Test images, candidates chosen on validation defects", "selected", SHOWN),
        ("Test images, last epoch and the settings' fusion weight", "last", SHOWN),
        ("Test images, an oracle that takes the best candidate for each metric", "oracle", SHOWN),
        ("Validation defects", "validation", VALIDATION_SHOWN),
    )
    for title, column, metrics in sections:
        rows = []
        for variant in variants:
            of_variant = [cell for cell in cells if cell.variant == variant]
            for system in SYSTEMS:
                found = [spread(of_variant, system, column, metric) for metric in metrics]
                if any(found):
                    rows.append([variant, system, *(_text(value) for value in found)])
        if rows:
            lines += [f"## {title}", "", *_markdown(["variant", "system", *metrics], rows), ""]
    return "\n".join([*lines, *_cost_lines(cells)])


def _cost_lines(cells: Sequence[CellResult]) -> list[str]:
    """What the systems cost beyond their trainings, where cells trained anew."""
    costs = [cell.cost for cell in cells if cell.variant == BASE and cell.cost]
    if not costs:
        return []
    systems = max(cost["systems_over_trainings"] for cost in costs)
    everything = max(cost["everything_over_trainings"] for cost in costs)
    return [
        f"All systems together took at most {systems:.2f} times their trainings (finetuning, "
        f"flows on both backbones), {everything:.2f} times with reading, selection and test "
        f"metrics: the largest of {len(costs)} cells that trained anew.",
        "",
    ]


def write_tables(out: Path, cells: Sequence[CellResult]) -> None:
    """Write all tables of finished cells into the benchmark's folder."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=_CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(long_rows(cells))
    _write(out / "results.csv", text.getvalue())
    base = [cell for cell in cells if cell.variant == BASE] or list(cells)
    for system in SYSTEMS:
        _write(out / "tables" / f"{system}.md", system_table(base, system) + "\n")
    _write(out / "tables" / "overview.md", overview(cells) + "\n")


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as draft:
        draft.write_text(text)


def _text(value: Spread | None) -> str:
    return "-" if value is None else str(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
