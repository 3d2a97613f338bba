"""The report's sections: of the study as a whole, and of every product.

``STUDY_SECTIONS`` and ``PRODUCT_SECTIONS`` are the registries. A new section is one function that
returns blocks, and one line in one of them; the page, its contents and its tests then know it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clsnf.reporting import charts_of_answers, charts_of_products, charts_of_search
from clsnf.reporting.advice import gain_figure
from clsnf.reporting.blocks import Block, Case, Cases, Facts, Note, Section, Table
from clsnf.reporting.formats import (
    duration,
    figure,
    figure_name,
    interval,
    is_finite,
    percent,
    setting,
)
from clsnf.reporting.pictures import Budget
from clsnf.reporting.study_files import Product, StudyFiles
from clsnf.reporting.tables import of_product, settings_line, trial_seconds
from clsnf.reporting.trials import LEAST_TRIALS, seconds_by_kind

FEW_TRIALS = 20  # importances from fewer are a hint at most
_LAYERS = {
    "input": "input",
    "truth": "true defect in green",
    "density": "density (flows)",
    "classifier": "classifier",
    "fused": "fused; cyan: above the line",
}
_KINDS = {
    "miss": ("Worst misses", "Defects that passed, the lowest score first.", "No defect passed."),
    "false_alarm": (
        "Worst false alarms",
        "Good pictures that were rejected, the highest score first.",
        "No good picture was rejected.",
    ),
    "borderline": (
        "Borderline cases",
        "Right answers nearest to the threshold.",
        "There is no right answer.",
    ),
    "strange_normal": (
        "Strangest training pictures",
        "Good pictures that training held back, the highest score first: is each of them really "
        "good?",
        "None were kept.",
    ),
}


@dataclass(frozen=True)
class Context:
    """What sections are made from.

    Attributes:
        study: as its folder tells it.
        tables: every table, by name.
        budget: of bytes that pictures may take.
    """

    study: StudyFiles
    tables: dict[str, Table]
    budget: Budget


# ---- of the study ----


def _overview(context: Context) -> list[Block]:
    names = dict.fromkeys(
        gain_figure(context.study, p) for p in context.study.products if p.figures
    )
    found = [
        charts_of_products.verdict_chart(context.study, name)
        for name in dict.fromkeys([*names, "image_auroc"])
    ]
    blocks: list[Block] = [chart for chart in found if chart is not None]
    return blocks or [
        Note(
            "There are no test figures: no product has a winner and labelled test pictures with "
            "defects.",
            "missing",
        )
    ]


def _study(context: Context) -> list[Block]:
    study = context.study
    trials = [trial for product in study.products for trial in product.finished_trials]
    blocks: list[Block] = [
        Facts(
            "",
            [
                (
                    "Trials that finished",
                    f"{len(trials)} of {sum(len(p.trials) for p in study.products)} begun",
                ),
                ("Trials took", duration(sum(trial_seconds(p) for p in study.products))),
                (
                    "The whole study took",
                    duration(study.summary.get("seconds")) + _and_resumed(study),
                ),
                (
                    "Raised on validation defects",
                    ", ".join(figure_name(name) for name in study.objectives),
                ),
                (
                    "Searched",
                    "; ".join(f"{name}: {_range(given)}" for name, given in study.space.items())
                    or "not recorded",
                ),
            ],
        )
    ]
    importances = context.tables["importances"]
    if importances.rows:
        means: dict[str, list[float]] = {}
        for row in importances.rows:
            means.setdefault(row["parameter"], []).append(row["importance"])
        values = {
            n: statistics.fmean(v)
            for n, v in sorted(means.items(), key=lambda item: -statistics.fmean(item[1]))
        }
        fewest = min(row["trials"] for row in importances.rows)
        reading = (
            "Mean over the products of the share of the objective's variance that a parameter "
            f"explains. {_how_sure(fewest)}"
        )
        blocks.append(
            charts_of_products.bars("Which parameter mattered", values, "importance", reading)
        )
    else:
        blocks.append(
            Note(
                f"Importances need {LEAST_TRIALS} finished trials of a product with different "
                "settings.",
                "missing",
            )
        )
    kinds = seconds_by_kind(trials)
    if kinds:
        values = {
            name.replace("_", " "): value
            for name, value in kinds.items()
            if value >= 0.005 * sum(kinds.values())
        }
        reading = (
            "Seconds of all trials by kind of work; waiting: for a stage that another trial was "
            "computing."
        )
        blocks.append(
            charts_of_products.bars(
                "Where the trials' time went", values, "seconds", reading, ".1f"
            )
        )
    return [
        *blocks,
        context.tables["time"],
        context.tables["regret"],
        context.tables["rules"],
        context.tables["trials"],
    ]


def _and_resumed(study: StudyFiles) -> str:
    longer = sum(trial_seconds(p) for p in study.products) > (study.summary.get("seconds") or 0)
    return " in its last run" if study.finished and longer else ""


def _range(given: dict[str, Any]) -> str:
    if given.get("type") == "choice":
        return ", ".join(setting(value) for value in given.get("values", []))
    return f"{setting(given.get('low'))} to {setting(given.get('high'))}"


def _how_sure(trials: int) -> str:
    return (
        f"From {trials} trials of a product: a hint, no more."
        if trials < FEW_TRIALS
        else f"From {trials} trials of a product or more."
    )


def _records(context: Context) -> list[Block]:
    study = context.study
    seed = (study.summary.get("settings") or {}).get("seed")
    version, at = study.summary.get("clsnf"), study.summary.get("at")
    rows = [
        ("Folder", str(study.folder)),
        ("Data", str(study.summary.get("origin") or "not recorded")),
        ("Ended (UTC)", str(at or "not yet")),
        ("Version of clsnf", str(version or "not recorded")),
        ("Seed", "not recorded" if seed is None else str(seed)),
        (
            "Selection rule",
            str((study.summary.get("study") or {}).get("selection") or "not recorded"),
        ),
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


def _figures(context: Context, product: Product) -> list[Block]:
    test, threshold = product.result.get("test") or {}, product.result.get("threshold") or {}
    rows = []
    if product.result.get("winner"):
        counts = ", ".join(f"{count} {kind}" for kind, count in (test.get("counts") or {}).items())
        rows = [
            ("Winner", f"trial {product.result.get('trial')}: {settings_line(product)}"),
            (
                "Objective on validation",
                figure((product.result.get("validation") or {}).get(context.study.objective)),
            ),
            (
                "Threshold",
                f"{figure(threshold.get('value'))} from {threshold.get('normals')} held-out "
                "normals",
            ),
            (
                "It stands for",
                f"{percent(threshold.get('supported_rate'))} false rejects (asked: "
                f"{percent(threshold.get('false_reject_rate'))})",
            ),
            ("With 95 % confidence", interval(threshold.get("interval"), percent)),
            ("Test defects rejected", percent(test.get("recall"))),
            ("Test normals rejected", percent(test.get("false_reject_rate"))),
            ("Test pictures", counts or "none"),
            ("Baseline at its own threshold", _baseline_line(product)),
            (
                "Where defects could lie",
                f"{(product.result.get('object_mask') or {}).get('reason') or 'not recorded'}",
            ),
        ]
    table = of_product(context.tables["figures"], product)
    blocks: list[Block] = (
        [Facts("", rows)] if rows else [Note("There is no winner yet.", "missing")]
    )
    if table.rows:
        blocks.append(table)
    elif rows:
        blocks.append(
            Note(
                "There are no test figures: the test pictures hold no labelled defects.", "missing"
            )
        )
    return blocks


def _baseline_line(product: Product) -> str:
    if not product.baseline:
        return "not judged"
    recall, rejects = product.baseline.get("recall"), product.baseline.get("false_reject_rate")
    return (
        f"{percent(recall)} of the defects, {percent(rejects)} of the normals (depth "
        f"{product.baseline.get('depth')})"
    )


def _pictures(context: Context, product: Product) -> list[Block]:
    if not product.facts:
        return [Note("The study left no pictures of this product.", "missing")]
    suspects = of_product(context.tables["suspects"], product)
    blocks: list[Block] = [suspects] if suspects.rows else []
    if product.facts.get("shown") != "test":
        blocks.append(
            Note(
                "There are no test pictures: these are validation pictures, their defects "
                "synthetic."
            )
        )
    left_out = 0
    for kind, (title, note, none) in _KINDS.items():
        own = [case for case in product.facts.get("pictures") or [] if case.get("kind") == kind]
        shown = own[: context.budget.cases_of_a_kind]
        left_out += len(own) - len(shown)
        cases = [_case(product, case, context.budget) for case in shown]
        blocks.append(Cases(title, note, cases) if cases else Note(f"{title}: {none}"))
    if left_out:
        blocks.append(
            Note(
                f"{left_out} more pictures are left out to keep this page small; they lie in "
                f"{product.pictures}."
            )
        )
    return blocks


def _case(product: Product, case: dict[str, Any], budget: Budget) -> Case:
    name = "/".join(Path(str(case.get("path"))).parts[-2:])
    label = case.get("defect_type") if case.get("label") else "good"
    files = case.get("files") or {}
    layers = [
        (title, budget.data_uri(product.pictures / Path(files[layer]).name))
        for layer, title in _LAYERS.items()
        if layer in files
    ]
    return Case(f"{name}, labelled {label}, score {figure(case.get('score'))}", layers)


def _scores(context: Context, product: Product) -> list[Block]:
    size = charts_of_answers.recall_chart(
        product, "share", "Recall by the size of the defect", "share of the picture, %", 100
    )
    contrast = charts_of_answers.recall_chart(
        product,
        "contrast",
        "Recall by the contrast of the defect",
        "grey difference to its surroundings, %",
        100,
    )
    found = [
        charts_of_answers.score_chart(product),
        charts_of_answers.calibration_chart(product),
        size,
        contrast,
    ]
    blocks: list[Block] = [chart for chart in found if chart is not None]
    if not product.images:
        blocks.append(Note("The study left no scores of single pictures.", "missing"))
    elif not product.regions:
        blocks.append(Note("Recall by size and contrast needs test defects with masks.", "missing"))
    elif size is None:
        blocks.append(
            Note(
                "Recall by size and contrast needs 4 defect regions or more; there are "
                f"{len(product.regions)}."
            )
        )
    return blocks


def _validation(context: Context, product: Product) -> list[Block]:
    chart = charts_of_answers.families_chart(product)
    blocks: list[Block] = [chart] if chart else []
    blocks += charts_of_answers.learning_charts(product)
    families = of_product(context.tables["families"], product)
    if families.rows:
        blocks.append(families)
    if not product.facts:
        blocks.append(Note("The study left no learning curves of this product.", "missing"))
    elif not any((product.facts.get("losses") or {}).get("flows") or []):
        blocks.append(
            Note(
                "The winner's flows were not trained: depth 0 is the Gaussian of the features, it "
                "has no learning curve."
            )
        )
    return blocks


def _search(context: Context, product: Product) -> list[Block]:
    study = context.study
    found = [
        charts_of_search.weight_chart(product, study.objective),
        charts_of_search.parallel_chart(product, study.objective),
        charts_of_search.front_chart(product, study.objectives),
    ]
    blocks: list[Block] = [chart for chart in found if chart is not None]
    rows = of_product(context.tables["importances"], product).rows
    if rows:
        reading = (
            "The share of the objective's variance that a parameter explains (fANOVA). "
            f"{_how_sure(rows[0]['trials'])}"
        )
        values = {
            row["parameter"]: row["importance"] for row in rows if is_finite(row["importance"])
        }
        blocks.append(
            charts_of_products.bars("Parameter importances", values, "importance", reading)
        )
    front = product.result.get("front") or []
    if front:
        rows_of_front = [
            (
                f"Trial {f['trial']}",
                ", ".join(f"{figure_name(n)} {setting(v)}" for n, v in f["objectives"].items()),
            )
            for f in front
        ]
        blocks.append(Facts("Saved detectors of the front", rows_of_front))
    return blocks or [
        Note("Fewer than two trials finished: there is nothing to compare.", "missing")
    ]


PRODUCT_SECTIONS: dict[str, tuple[str, Callable[[Context, Product], list[Block]]]] = {
    "figures": ("Figures", _figures),
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
