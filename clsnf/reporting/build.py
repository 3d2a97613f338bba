"""Build a study's report: ``report.html`` and its tables, in a folder.

report/report.html       the page: opens from disk, asks no outside host, prints
report/tables/NAME.csv   each table, with full precision
report/tables/NAME.md    the same, as the page shows it
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import clsnf
from clsnf.core.files import atomic_write, check_writable
from clsnf.core.progress import Progress, silent
from clsnf.reporting.advice import (
    DECISIONS,
    Advice,
    BaselineGain,
    advise,
    gain_metric,
    gain_of,
)
from clsnf.reporting.blocks import Section, Table
from clsnf.reporting.formats import duration, metric_name, slug
from clsnf.reporting.page import render
from clsnf.reporting.pictures import PictureBudget
from clsnf.reporting.sections import Context, product_sections, study_sections
from clsnf.reporting.study_files import Product, StudyFiles, read_study
from clsnf.reporting.tables import (
    VERDICT_METRICS,
    all_tables,
    chosen_settings,
    finish_seconds,
    published,
)
from clsnf.results import Interval

PAGE = "report.html"


@dataclass(frozen=True)
class ReportFiles:
    """What was written.

    Attributes:
        page: the HTML file.
        tables: folder of the tables.
        decisions: product -> decision in words; empty for a comparison.
        missing: what the report has to do without, in lines for people.
    """

    page: Path
    tables: Path
    decisions: dict[str, str]
    missing: list[str]


@dataclass(frozen=True)
class MetricCell:
    """A metric in the table of verdicts; None for what is not known."""

    title: str
    value: float | None
    interval: Interval | None
    baseline: float | None
    authors: float | None


@dataclass(frozen=True)
class Verdict:
    """What the page shows of a product.

    Attributes:
        name: of the product.
        anchor: of its part of the page.
        advice: the decision, with its checks.
        settings: the winner's searched settings, in one line.
        metrics: metric -> cell.
        gain: on the baseline, in the metric `gain_in`.
        recall, false_rejects: at the threshold.
        seconds: of its trials, choosing and testing.
        sections: its part of the page.
    """

    name: str
    anchor: str
    advice: Advice
    settings: str
    metrics: dict[str, MetricCell]
    gain: BaselineGain | None
    gain_in: str
    recall: float | None
    false_rejects: float | None
    seconds: float
    sections: list[Section]

    @property
    def rank(self) -> int:
        """How grave the decision is, the gravest first."""
        return list(DECISIONS).index(self.advice.decision)


def build_report(run: Path, out: Path | None = None, progress: Progress = silent) -> ReportFiles:
    """Write the report of a study.

    Args:
        run: the study's folder. Of a study that is under way or failed in parts, the report shows
            what there is.
        out: a folder for the report; ``report`` in the study's own where None. Files of an earlier
            report there are replaced.
        progress: gets a step for every product.

    Raises:
        OutputError: `run` holds no study, or one of a newer version, or `out` can't be written.
    """
    out = (run / "report" if out is None else out).absolute()
    study = read_study(run)
    check_writable(out, folder=True)
    tables = all_tables(study, progress)
    context = Context(study, tables, PictureBudget(study.products))
    verdicts = []
    for number, product in enumerate(study.products, 1):
        verdicts.append(_verdict(context, product, number))
        progress("report: products", number, len(study.products))
    decisions = [verdict.advice.decision for verdict in verdicts]
    counts = {key: decisions.count(key) for key in DECISIONS}
    text = render(
        "report.html.j2",
        title=f"{study.name}: what to do next",
        version=study.summary.version if study.summary else clsnf.__version__,
        at=study.summary.at if study.summary else None,
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
    titles = {verdict.name: verdict.advice.title for verdict in verdicts}
    return ReportFiles(out / PAGE, out / "tables", titles, study.missing)


# Decision -> what the headline says of one product, and of several.
_HEADLINES = {
    "failed": ("has no winner", "have no winner"),
    "unfinished": ("has no winner yet", "have no winner yet"),
    "weak": ("is not good enough yet", "are not good enough yet"),
    "images": ("has images to check first", "have images to check first"),
    "normals": ("needs more normals", "need more normals"),
    "untested": ("needs a test on defects first", "need a test on defects first"),
}


def headline(counts: dict[str, int]) -> str:
    """The verdict in one sentence, from the number of products with each decision."""
    total, ready = sum(counts.values()), counts["ready"]
    if not total:
        return "The study holds no product yet."
    if ready == total:
        products = "The product is" if total == 1 else f"All {total} products are"
        return f"{products} ready to deploy."
    others = {key: count for key, count in counts.items() if key != "ready" and count}
    if total == 1:
        return f"The product {_HEADLINES[next(iter(others))][0]}."
    rest = ", ".join(f"{count} {_HEADLINES[key][count > 1]}" for key, count in others.items())
    verb = "are" if ready > 1 else "is"
    return f"{ready or 'None'} of {total} products {verb} ready to deploy: {rest}."


def _lead(study: StudyFiles) -> str:
    """The paragraph under the headline."""
    trials = sum(len(product.finished_trials) for product in study.products)
    took = duration(sum(product.trial_seconds for product in study.products))
    parts = [
        f"{trials} trials in {took} of work, chosen by {metric_name(study.objective)} on "
        "validation defects."
    ]
    found = [gain_of(product, gain_metric(study, product)) for product in study.products]
    gains = [gain for gain in found if gain is not None]
    if len(gains) == 1:
        parts.append(f"The winner's gain on the baseline, on the test images: {gains[0].verdict}.")
    elif gains:
        ahead, behind = sum(gain.low > 0 for gain in gains), sum(gain.high < 0 for gain in gains)
        none = "none is significantly behind."
        parts.append(
            f"On the test images {ahead} of {len(gains)} winners are significantly ahead of the "
            f"baseline, {f'{behind} significantly behind.' if behind else none}"
        )
    if study.ledger:
        parts.append("Test images were opened after selection; the ledger says when.")
    return " ".join(parts)


def _verdict(context: Context, product: Product, number: int) -> Verdict:
    gain_in, test = gain_metric(context.study, product), product.test
    return Verdict(
        name=product.name,
        anchor=f"product-{number}-{slug(product.name)}",
        advice=advise(context.study, product),
        settings=chosen_settings(product) or "no winner",
        metrics={name: _cell(product, name) for name in VERDICT_METRICS},
        gain=gain_of(product, gain_in),
        gain_in=metric_name(gain_in),
        recall=test.recall if test else None,
        false_rejects=test.false_reject_rate if test else None,
        seconds=product.trial_seconds + (finish_seconds(product) or 0.0),
        sections=product_sections(context, product),
    )


def _cell(product: Product, name: str) -> MetricCell:
    return MetricCell(
        metric_name(name),
        product.metrics.get(name),
        product.intervals.get(name),
        product.baseline.metrics.get(name) if product.baseline else None,
        published(product, name),
    )


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
