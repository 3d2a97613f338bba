"""The report's sections: of the study as a whole, and of every product.

``STUDY_SECTIONS`` and ``PRODUCT_SECTIONS`` are the registries. A new section is one function that
returns blocks, and one line in one of them; the page and its tests then know it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from clsnf.reporting import search_charts, study_charts, winner_charts
from clsnf.reporting.advice import gain_metric
from clsnf.reporting.blocks import Block, Case, Cases, Chart, Facts, Note, Section, Table
from clsnf.reporting.formats import (
    duration,
    interval,
    is_finite,
    metric,
    metric_name,
    percent,
    setting,
)
from clsnf.reporting.pictures import PictureBudget, data_uri
from clsnf.reporting.study_files import Product, Record, StudyFiles
from clsnf.reporting.tables import chosen_settings, of_product
from clsnf.reporting.trials import LEAST_TRIALS, seconds_by_kind
from clsnf.results import Case as StoredCase
from clsnf.results import WinnerResult

FEW_TRIALS = 20  # importances from fewer are a hint at most
_LEAST_SHARE = 0.005  # of the trials' time: kinds of work with less are not drawn
_LAYERS = {  # layer of a case -> its title
    "input": "input",
    "truth": "true defect in green",
    "density": "density (flows)",
    "classifier": "classifier",
    "fused": "fused; cyan: above the line",
}
_KINDS = {  # kind of case -> title, note, what to say where there is none
    "miss": ("Worst misses", "Defects that passed, the lowest score first.", "No defect passed."),
    "false_alarm": (
        "Worst false alarms",
        "Good images that were rejected, the highest score first.",
        "No good image was rejected.",
    ),
    "borderline": (
        "Borderline cases",
        "Right answers nearest to the threshold.",
        "There is no right answer.",
    ),
    "strange_normal": (
        "Strangest training images",
        "Good images that training held back, the highest score first. Is each of them really "
        "good?",
        "None were kept.",
    ),
}


@dataclass(frozen=True)
class Context:
    """What sections are made from.

    Attributes:
        study: as its folder has it.
        tables: every table, by name.
        budget: how many pictures are shown.
    """

    study: StudyFiles
    tables: dict[str, Table]
    budget: PictureBudget


# ---- of the study ----


def _overview(context: Context) -> list[Block]:
    study = context.study
    names = [gain_metric(study, product) for product in study.products if product.metrics]
    names.append("image_auroc")
    blocks = _drawn(*(study_charts.verdict_chart(study, name) for name in dict.fromkeys(names)))
    if not blocks:
        text = (
            "There are no test metrics: no product has a winner and labelled test images with "
            "defects."
        )
        blocks.append(Note(text, "missing"))
    return blocks


def _study(context: Context) -> list[Block]:
    study, tables = context.study, context.tables
    trials = [trial for product in study.products for trial in product.finished_trials]
    begun = sum(len(product.trials) for product in study.products)
    ranges = [f"{name}: {_range(given)}" for name, given in study.space.items()]
    facts = [
        ("Trials that finished", f"{len(trials)} of {begun} begun"),
        ("Trials took", duration(_trial_seconds(study))),
        ("The whole study took", _study_duration(study)),
        (
            "Maximized on validation defects",
            ", ".join(metric_name(name) for name in study.objectives),
        ),
        ("Searched", "; ".join(ranges) or "not recorded"),
    ]
    blocks: list[Block] = [Facts("", facts), _mean_importances(tables["importances"])]
    seconds = seconds_by_kind(trials)
    if seconds:
        least = _LEAST_SHARE * sum(seconds.values())
        values = {
            kind.replace("_", " "): value for kind, value in seconds.items() if value >= least
        }
        reading = (
            "Seconds of all trials by kind of work. Waiting: for an artifact that another trial "
            "computed."
        )
        title = "Where the trials' time went"
        blocks.append(study_charts.bars(title, values, "seconds", reading, ".1f"))
    return [*blocks, *(tables[name] for name in ("time", "regret", "rules", "trials"))]


def _trial_seconds(study: StudyFiles) -> float:
    return sum(product.trial_seconds for product in study.products)


def _study_duration(study: StudyFiles) -> str:
    seconds = None if study.summary is None else study.summary.seconds
    resumed = study.finished and _trial_seconds(study) > (seconds or 0)
    return duration(seconds) + (" in its last run" if resumed else "")


def _range(given: Record) -> str:
    """What is searched of a setting."""
    if given.get("type") == "choice":
        return ", ".join(setting(value) for value in given.get("values", []))
    return f"{setting(given.get('low'))} to {setting(given.get('high'))}"


def _mean_importances(importances: Table) -> Block:
    """The importance of each setting as the mean over the products."""
    if not importances.rows:
        text = (
            f"Importances need {LEAST_TRIALS} finished trials of a product with different settings."
        )
        return Note(text, "missing")
    values: dict[str, list[float]] = {}
    for row in importances.rows:
        values.setdefault(row["parameter"], []).append(row["importance"])
    means = {name: statistics.fmean(found) for name, found in values.items()}
    fewest = min(row["trials"] for row in importances.rows)
    reading = (
        "The share of the objective's variance that a setting explains, as the mean over the "
        f"products. {_how_sure(fewest)}"
    )
    ordered = dict(sorted(means.items(), key=lambda item: -item[1]))
    return study_charts.bars("Which setting mattered", ordered, "importance", reading)


def _how_sure(trials: int) -> str:
    if trials < FEW_TRIALS:
        return f"From {trials} trials of a product: only a hint."
    return f"From {trials} trials of a product or more."


def _records(context: Context) -> list[Block]:
    study, summary = context.study, context.study.summary
    rows = [
        ("Folder", str(study.folder)),
        ("Data", (summary.origin if summary else "") or "not recorded"),
        ("Ended (UTC)", summary.at if summary else "not yet"),
        ("Version of clsnf", summary.version if summary else "not recorded"),
        ("Seed", "not recorded" if study.settings is None else str(study.settings.seed)),
        ("Selection rule", summary.study.selection if summary else "not recorded"),
    ]
    ledger = context.tables["ledger"]
    opened: Block = ledger if ledger.rows else Note("No test image was opened.")
    return [Facts("", rows), opened, context.tables["fingerprints"]]


STUDY_SECTIONS: dict[str, tuple[str, Callable[[Context], list[Block]]]] = {
    "overview": ("The products beside each other", _overview),
    "study": ("The study", _study),
    "ledger": ("Ledger", _records),
}

# ---- of a product ----


def _metrics(context: Context, product: Product) -> list[Block]:
    winner = product.winner
    if winner is None:
        return [Note("There is no winner yet.", "missing")]
    table = of_product(context.tables["figures"], product)
    without = Note(
        "There are no test metrics: the test images hold no labelled defects.", "missing"
    )
    return [Facts("", _winner_facts(context, product, winner)), table if table.rows else without]


def _winner_facts(
    context: Context, product: Product, winner: WinnerResult
) -> list[tuple[str, str]]:
    test, threshold = winner.test, winner.threshold
    counts = [f"{count} {kind}" for kind, count in (test.counts if test else {}).items()]
    mask = winner.object_mask
    return [
        ("Winner", f"trial {winner.trial}: {chosen_settings(product)}"),
        (
            "Objective on validation",
            metric(winner.validation.metrics.get(context.study.objective)),
        ),
        ("Threshold", f"{metric(threshold.value)} from {threshold.normals} held-out normals"),
        (
            "It stands for",
            f"{percent(threshold.supported_rate)} false rejects (asked: "
            f"{percent(threshold.false_reject_rate)})",
        ),
        ("With 95 % confidence", interval(threshold.interval, percent)),
        ("Test defects rejected", percent(test.recall if test else None)),
        ("Test normals rejected", percent(test.false_reject_rate if test else None)),
        ("Test images", ", ".join(counts) or "none"),
        ("Baseline at its own threshold", _baseline_line(product)),
        ("Where defects could lie", (mask.reason if mask else "") or "not recorded"),
    ]


def _baseline_line(product: Product) -> str:
    baseline = product.baseline
    if baseline is None:
        return "not evaluated"
    return (
        f"{percent(baseline.recall)} of the defects, {percent(baseline.false_reject_rate)} of the "
        f"normals (depth {baseline.depth})"
    )


def _pictures(context: Context, product: Product) -> list[Block]:
    if product.facts is None:
        return [Note("The study left no pictures of this product.", "missing")]
    suspects = of_product(context.tables["suspects"], product)
    blocks: list[Block] = [suspects] if suspects.rows else []
    if product.facts.shown != "test":
        blocks.append(
            Note("There are no test images: these are validation images with synthetic defects.")
        )
    left_out = 0
    for kind, (title, note, none) in _KINDS.items():
        own = [case for case in product.cases if case.kind == kind]
        shown = own[: context.budget.cases_per_kind]
        left_out += len(own) - len(shown)
        cases = [_case(product, case) for case in shown]
        blocks.append(Cases(title, note, cases) if cases else Note(f"{title}: {none}"))
    if left_out:
        text = (
            f"{left_out} more cases are left out to keep this page small; their pictures lie in "
            f"{product.pictures}."
        )
        blocks.append(Note(text))
    return blocks


def _case(product: Product, case: StoredCase) -> Case:
    name = "/".join(Path(case.path).parts[-2:])
    label = case.defect_type if case.label else "good"
    layers = [
        (title, data_uri(product.pictures / Path(case.files[layer]).name))
        for layer, title in _LAYERS.items()
        if layer in case.files
    ]
    return Case(f"{name}, labelled {label}, score {metric(case.score)}", layers)


def _scores(context: Context, product: Product) -> list[Block]:
    by_size = winner_charts.size_chart(product)
    blocks = _drawn(
        winner_charts.score_chart(product),
        winner_charts.calibration_chart(product),
        by_size,
        winner_charts.contrast_chart(product),
    )
    if not product.images:
        blocks.append(Note("The study left no scores of single images.", "missing"))
    elif not product.regions:
        blocks.append(Note("Recall by size and contrast needs test defects with masks.", "missing"))
    elif by_size is None:
        text = (
            "Recall by size and contrast needs 4 defect regions or more; there are "
            f"{len(product.regions)}."
        )
        blocks.append(Note(text))
    return blocks


def _drawn(*charts: Chart | None) -> list[Block]:
    return [chart for chart in charts if chart is not None]


def _validation(context: Context, product: Product) -> list[Block]:
    blocks = _drawn(winner_charts.families_chart(product), *winner_charts.learning_charts(product))
    families = of_product(context.tables["families"], product)
    if families.rows:
        blocks.append(families)
    if product.facts is None:
        blocks.append(Note("The study left no learning curves of this product.", "missing"))
    elif not any(product.facts.losses.flows):
        text = (
            "The winner's flows were not trained: depth 0 is the Gaussian of the features and has "
            "no learning curve."
        )
        blocks.append(Note(text))
    return blocks


def _search(context: Context, product: Product) -> list[Block]:
    study = context.study
    blocks = _drawn(
        search_charts.weight_chart(product, study.objective),
        search_charts.parallel_chart(product, study.objective),
        search_charts.front_chart(product, study.objectives),
    )
    rows = of_product(context.tables["importances"], product).rows
    if rows:
        reading = (
            "The share of the objective's variance that a setting explains (fANOVA). "
            f"{_how_sure(rows[0]['trials'])}"
        )
        values = {
            row["parameter"]: row["importance"] for row in rows if is_finite(row["importance"])
        }
        title = "Importances of the searched settings"
        blocks.append(study_charts.bars(title, values, "importance", reading))
    front = product.winner.front if product.winner is not None else []
    if front:
        facts = [(f"Trial {member.trial}", _objectives(member.objectives)) for member in front]
        blocks.append(Facts("Saved detectors of the front", facts))
    return blocks or [
        Note("Fewer than two trials finished: there is nothing to compare.", "missing")
    ]


def _objectives(values: Mapping[str, float]) -> str:
    return ", ".join(f"{metric_name(name)} {setting(value)}" for name, value in values.items())


PRODUCT_SECTIONS: dict[str, tuple[str, Callable[[Context, Product], list[Block]]]] = {
    "metrics": ("Metrics", _metrics),
    "pictures": ("Pictures", _pictures),
    "scores": ("Scores, calibration, recall", _scores),
    "validation": ("Validation and learning curves", _validation),
    "search": ("The search", _search),
}


def study_sections(context: Context) -> list[Section]:
    """The sections of the study as a whole."""
    return [Section(name, title, make(context)) for name, (title, make) in STUDY_SECTIONS.items()]


def product_sections(context: Context, product: Product) -> list[Section]:
    """The sections of a product."""
    return [
        Section(name, title, make(context, product))
        for name, (title, make) in PRODUCT_SECTIONS.items()
    ]
