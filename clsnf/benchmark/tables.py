"""Cells summed up: one table a system, one over all systems, one row a figure for whoever computes
on.

    results.csv            every figure of every cell: variant, category, seed, system, column,
    figure, value, low, high tables/<system>.md     each category: mean and standard deviation over
    the seeds, the authors' figure beside it tables/overview.md     all systems, means over the
    categories; variants beside each other

Unusual: standard deviations are over seeds (n - 1), which change the split, the defects and the
    training; intervals in ``results.csv``
are over test images. The two are different doubts and are not mixed.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clsnf.benchmark.systems import SYSTEMS
from clsnf.core.files import atomic_write
from clsnf.paper.presets import published_metrics

BASE = "base"  # the variant that changes nothing
SHOWN = ("image_auroc", "pixel_ap", "pixel_auroc", "au_pro")
_VALIDATION_SHOWN = ("pixel_ap", "image_auroc", "au_pro")
_PUBLISHED = {
    "image_auroc": "image_auroc",
    "pixel_ap": "pixel_ap",
    "pixel_auroc": "pixel_auroc",
    "au_pro": "au_pro_200_steps",
}


@dataclass(frozen=True)
class Cell:
    """One finished cell."""

    variant: str
    category: str
    seed: int
    result: dict[str, Any]

    @property
    def systems(self) -> dict[str, Any]:
        found: dict[str, Any] = self.result["systems"]
        return found


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) over n seeds; the deviation is None for one seed."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(
            statistics.fmean(values),
            statistics.stdev(values) if len(values) > 1 else None,
            len(values),
        )

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f}" + (
            "" if self.deviation is None else f" ± {100 * self.deviation:.2f}"
        )


def spread(cells: Iterable[Cell], system: str, column: str, figure: str) -> Spread | None:
    """A figure over seeds: each seed's value is its mean over the categories that all seeds have.

    Args:
        column: ``selected``, ``last``, ``oracle``, or ``validation``.

    Returns:
        None where there is none.
    """
    values: dict[int, dict[str, float]] = {}
    for cell in cells:
        found = cell.systems.get(system)
        if found is None:
            continue
        figures = (
            found["validation"] if column == "validation" else (found["test"] or {}).get(column, {})
        )
        if figure in figures:
            values.setdefault(cell.seed, {})[cell.category] = figures[figure]
    common = set.intersection(*(set(of_seed) for of_seed in values.values())) if values else set()
    if not common:
        return None
    return Spread.of(
        [statistics.fmean(of_seed[category] for category in common) for of_seed in values.values()]
    )


def long_rows(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """Every figure of every cell, one row each."""
    rows = []
    for cell in cells:
        for system, found in cell.systems.items():
            test = found["test"] or {}
            columns = {"validation": found["validation"]} | {
                name: test[name] for name in ("selected", "last", "oracle") if name in test
            }
            for column, figures in columns.items():
                for figure, value in figures.items():
                    low, high = (
                        test["intervals"].get(figure, (None, None))
                        if column == "selected"
                        else (None, None)
                    )
                    rows.append(
                        {
                            "variant": cell.variant,
                            "category": cell.category,
                            "seed": cell.seed,
                            "system": system,
                            "column": column,
                            "figure": figure,
                            "value": value,
                            "low": low,
                            "high": high,
                        }
                    )
    return rows


def system_table(cells: Sequence[Cell], system: str) -> str:
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
    for figure in SHOWN:
        rows = []
        for name, group in groups:
            selected, last, oracle = (
                spread(group, system, column, figure) for column in ("selected", "last", "oracle")
            )
            published = (
                (published_metrics(name) or {}).get(_PUBLISHED[figure])
                if system == "fused" and name != "mean"
                else None
            )
            gap = (
                None
                if selected is None or oracle is None
                else f"{100 * (oracle.mean - selected.mean):.2f}"
            )
            seeds = str(len({cell.seed for cell in group}))
            rows.append(
                [
                    name,
                    seeds,
                    _text(selected),
                    _text(last),
                    _text(oracle),
                    gap or "-",
                    _percent(published),
                ]
            )
        header = [
            "category",
            "seeds",
            "selected on validation",
            "last epoch",
            "oracle on test",
            "oracle's gain",
            "authors",
        ]
        lines += [f"## {figure}", "", *_markdown(header, rows), ""]
    return "\n".join(lines)


def overview(cells: Sequence[Cell]) -> str:
    """All systems, and all variants where there are some, in Markdown."""
    variants = list(dict.fromkeys(cell.variant for cell in cells))
    lines = [
        "# Overview",
        "",
        "Means over the categories, in percent; ± is the standard deviation over seeds.",
        "",
    ]
    for title, column, figures in (
        ("Test images, candidates chosen on validation defects", "selected", SHOWN),
        ("Test images, last epoch and the settings' fusion weight", "last", SHOWN),
        ("Test images, an oracle that takes the best candidate for each figure", "oracle", SHOWN),
        ("Validation defects", "validation", _VALIDATION_SHOWN),
    ):
        rows = []
        for variant in variants:
            of_variant = [cell for cell in cells if cell.variant == variant]
            for system in SYSTEMS:
                found = [spread(of_variant, system, column, figure) for figure in figures]
                if any(found):
                    rows.append([variant, system, *(_text(value) for value in found)])
        if rows:
            lines += [f"## {title}", "", *_markdown(["variant", "system", *figures], rows), ""]
    costs = [
        cell.result["cost"] for cell in cells if cell.variant == BASE and cell.result.get("cost")
    ]
    if costs:
        most = max(cost["systems_over_trainings"] for cost in costs)
        total = max(cost["everything_over_trainings"] for cost in costs)
        lines += [
            f"All systems together took at most {most:.2f} times their trainings (finetuning, "
            "flows on both backbones), "
            f"{total:.2f} times with reading, selection and test figures: the largest of "
            f"{len(costs)} cells that trained anew.",
            "",
        ]
    return "\n".join(lines)


def write_tables(out: Path, cells: Sequence[Cell]) -> None:
    """Write all tables of finished cells into the benchmark's folder."""
    rows = long_rows(cells)
    text = io.StringIO()
    names = ("variant", "category", "seed", "system", "column", "figure", "value", "low", "high")
    writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
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
