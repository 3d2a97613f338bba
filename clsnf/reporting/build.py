"""Build a study's report: ``report.html`` and its tables, in a folder.

report/report.html       the page: opens from disk, asks no outside host, prints
report/tables/NAME.csv   each table, values as they are
report/tables/NAME.md    the same, as the page shows it
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clsnf
from clsnf.core.files import atomic_write, check_writable
from clsnf.core.progress import Progress, silent
from clsnf.reporting.advice import DECISIONS, Advice, advise, gain_figure, gain_of
from clsnf.reporting.blocks import Table
from clsnf.reporting.formats import duration, figure_name, slug
from clsnf.reporting.page import render
from clsnf.reporting.pictures import Budget
from clsnf.reporting.sections import Context, product_sections, study_sections
from clsnf.reporting.study_files import Product, StudyFiles, read_study
from clsnf.reporting.tables import (
    SHOWN_FIGURES,
    all_tables,
    published,
    settings_line,
    trial_seconds,
)

PAGE = "report.html"


@dataclass(frozen=True)
class Built:
    """What was written.

    Attributes:
        page: the HTML file.
        tables: folder of the tables.
        decisions: product -> decision for people.
        missing: what the report had to do without.
    """

    page: Path
    tables: Path
    decisions: dict[str, str]
    missing: list[str]


def build_report(run: Path, out: Path | None = None, progress: Progress = silent) -> Built:
    """Write the report of a study.

    Args:
        run: the study's folder; a study that is under way or failed in parts is reported as far as
            it came.
        out: a folder for the report; ``report`` in the study's own where None. Files of an earlier
            report there are replaced.
        progress: told about every product.

    Raises:
        OutputError: `run` holds no study, or `out` can't be written.
    """
    out = (run / "report" if out is None else out).absolute()
    study = read_study(run)
    check_writable(out, folder=True)
    tables = all_tables(study, progress)
    context = Context(study, tables, Budget(study.products))
    verdicts = []
    for number, product in enumerate(study.products, 1):
        verdicts.append(_verdict(context, product, number))
        progress("report: products", number, len(study.products))
    advice = [verdict["advice"] for verdict in verdicts]
    counts = {key: sum(one.decision == key for one in advice) for key in DECISIONS}
    text = render(
        "report.html.j2",
        title=f"{study.name}: what to do next",
        version=study.summary.get("clsnf", clsnf.__version__),
        at=study.summary.get("at"),
        study=study,
        headline=headline(counts),
        lead=_lead(study),
        verdicts=verdicts,
        decisions=[(key, title, counts[key]) for key, title in DECISIONS.items() if counts[key]],
        missing=study.missing,
        sections=study_sections(context),
    )
    write_page(out / PAGE, text)
    write_tables(out / "tables", tables.values())
    decisions = {
        product.name: one.title for product, one in zip(study.products, advice, strict=True)
    }
    return Built(out / PAGE, out / "tables", decisions, study.missing)


def headline(counts: dict[str, int]) -> str:
    """The verdict in one sentence, from how many products each decision was made for."""
    total, ready = sum(counts.values()), counts["ready"]
    products = "product" if total == 1 else "products"
    if not total:
        return "The study holds no product yet."
    if ready == total:
        return (
            "The product is ready to deploy."
            if total == 1
            else f"All {total} products are ready to deploy."
        )
    says = {
        "failed": ("has no winner", "have no winner"),
        "unfinished": ("has no winner yet", "have no winner yet"),
        "weak": ("is not good enough yet", "are not good enough yet"),
        "images": ("has pictures to check first", "have pictures to check first"),
        "normals": ("needs more normals", "need more normals"),
        "untested": ("wants a test on defects first", "want a test on defects first"),
    }
    if total == 1:
        return f"The product {next(says[key][0] for key, count in counts.items() if count)}."
    rest = ", ".join(
        f"{count} {says[key][count > 1]}"
        for key, count in counts.items()
        if key != "ready" and count
    )
    return (
        f"{ready or 'None'} of {total} {products} {'are' if ready > 1 else 'is'} ready to deploy: "
        f"{rest}."
    )


def _lead(study: StudyFiles) -> str:
    trials = sum(len(p.finished_trials) for p in study.products)
    took = duration(sum(trial_seconds(p) for p in study.products))
    gains = [found for p in study.products if (found := gain_of(p, gain_figure(study, p)))]
    parts = [
        f"{trials} trials in {took} of work, chosen by {figure_name(study.objective)} on "
        "validation defects."
    ]
    if len(gains) == 1:
        parts.append(
            f"On the test images the winner's gain on the baseline: {gains[0]['verdict']}."
        )
    elif gains:
        ahead, behind = sum(g["low"] > 0 for g in gains), sum(g["high"] < 0 for g in gains)
        parts.append(
            f"On the test images {ahead} of {len(gains)} winners are significantly ahead of the "
            "baseline"
            + (f", {behind} significantly behind." if behind else ", none is significantly behind.")
        )
    if study.ledger:
        parts.append("Test images were opened after selection; the ledger says when.")
    return " ".join(parts)


def _verdict(context: Context, product: Product, number: int) -> dict[str, Any]:
    """What the page shows of a product."""
    study = context.study
    advice: Advice = advise(study, product)
    test = product.result.get("test") or {}
    shown = gain_figure(study, product)
    cells = {}
    for name in SHOWN_FIGURES:
        low, high = (product.evidence.get("intervals") or {}).get(name, (None, None))
        cells[name] = {
            "title": figure_name(name),
            "value": product.figures.get(name),
            "low": low,
            "high": high,
            "baseline": (product.baseline.get("figures") or {}).get(name),
            "authors": published(product, name),
        }
    return {
        "advice": advice,
        "name": product.name,
        "anchor": f"product-{number}-{slug(product.name)}",
        "decision": advice.decision,
        "order": list(DECISIONS).index(advice.decision),
        "title": advice.title,
        "steps": advice.next_steps,
        "checks": advice.checks,
        "settings": settings_line(product) or "no winner",
        "figures": cells,
        "gain": gain_of(product, shown),
        "gain_in": figure_name(shown),
        "recall": test.get("recall"),
        "false_rejects": test.get("false_reject_rate"),
        "seconds": trial_seconds(product) + (product.result.get("seconds") or 0.0),
        "sections": product_sections(context, product),
    }


def write_page(path: Path, text: str) -> None:
    """Write a page, whole or not at all."""
    with atomic_write(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_tables(folder: Path, tables: Iterable[Table]) -> None:
    """Write tables as CSV and Markdown into a folder."""
    for table in tables:
        for suffix, text in (("csv", table.csv()), ("md", table.markdown())):
            with atomic_write(folder / f"{table.name}.{suffix}") as draft:
                draft.write_text(text, encoding="utf-8")
