"""The report's tables, over all products of a study: what the page shows, and what lies beside it
as CSV and Markdown.

``TABLES`` is the registry. A new table is one function of a study and one line in it; a section
shows it with :func:`table_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from clsnf.core.progress import Progress, silent
from clsnf.metrics import METRICS
from clsnf.paper.presets import published_metrics
from clsnf.reporting.advice import advise, gain_figure, gain_of, suspects_of
from clsnf.reporting.blocks import Column, Table
from clsnf.reporting.formats import duration, figure_name, setting
from clsnf.reporting.study_files import Product, StudyFiles
from clsnf.reporting.trials import importances, saved_seconds, seconds_by_kind

SHOWN_FIGURES = ("image_auroc", "pixel_ap", "au_pro")  # of the verdict
_PRODUCT = Column("category", "product", pick=True)
_PUBLISHED = {
    "image_auroc": "image_auroc",
    "pixel_ap": "pixel_ap",
    "pixel_auroc": "pixel_auroc",
    "au_pro": "au_pro_200_steps",
}


def published(product: Product, name: str) -> float | None:
    """The authors' figure of a category of that name; None where they have none."""
    return (published_metrics(product.name) or {}).get(_PUBLISHED.get(name, ""))


def trial_seconds(product: Product) -> float:
    """What its trials took, added up."""
    return sum(trial.get("seconds") or 0.0 for trial in product.trials)


def settings_line(product: Product) -> str:
    """The winner's searched values in one line."""
    return ", ".join(
        f"{name} {setting(value)}" for name, value in (product.result.get("chosen") or {}).items()
    )


def _verdicts(study: StudyFiles) -> Table:
    rows = []
    for product in study.products:
        advice, test = advise(study, product), product.result.get("test") or {}
        shown = gain_figure(study, product)
        found = gain_of(product, shown) or {}
        row: dict[str, Any] = {
            "category": product.name,
            "decision": advice.title,
            "next": " ".join(advice.next_steps),
        }
        for name in SHOWN_FIGURES:
            low, high = (product.evidence.get("intervals") or {}).get(name, (None, None))
            row |= {name: product.figures.get(name), f"{name}_low": low, f"{name}_high": high}
            row |= {f"{name}_baseline": (product.baseline.get("figures") or {}).get(name)}
            row |= {f"{name}_authors": published(product, name)}
        row |= {
            "gain_in": figure_name(shown) if found else None,
            "significance": found.get("verdict"),
        }
        row |= {
            f"gain{part}": found.get(key)
            for part, key in (("", "gain"), ("_low", "low"), ("_high", "high"))
        }
        row |= {"recall": test.get("recall"), "false_rejects": test.get("false_reject_rate")}
        row |= {"settings": settings_line(product), "trial_seconds": trial_seconds(product)}
        row |= {"finish_seconds": product.result.get("seconds")}
        rows.append(row)
    figures = [
        Column(f"{name}{part}", f"{figure_name(name)}{title}", "figure")
        for name in SHOWN_FIGURES
        for part, title in (
            ("", ""),
            ("_low", ", low"),
            ("_high", ", high"),
            ("_baseline", ", baseline"),
            ("_authors", ", authors"),
        )
    ]
    columns = [
        _PRODUCT,
        Column("decision", "decision", pick=True),
        *figures,
        Column("gain_in", "gain in"),
        Column("gain", "gain", "gain"),
        Column("gain_low", "gain, low", "gain"),
        Column("gain_high", "gain, high", "gain"),
        Column("significance", "significance"),
        Column("recall", "recall", "percent"),
        Column("false_rejects", "false rejects", "percent"),
        Column("settings", "settings"),
        Column("trial_seconds", "trials", "seconds"),
        Column("finish_seconds", "choosing and testing", "seconds"),
        Column("next", "what to do next"),
    ]
    return Table(
        "verdicts",
        "Verdicts",
        columns,
        rows,
        "Test images; low and high bound 95 % intervals over images.",
    )


def _figures(study: StudyFiles) -> Table:
    rows = []
    for product in study.products:
        intervals, beside = product.evidence.get("intervals") or {}, product.baseline
        for name, value in product.figures.items():
            low, high = intervals.get(name, (None, None))
            other = beside.get("figures", {}).get(name)
            other_low, other_high = beside.get("intervals", {}).get(name, (None, None))
            found = gain_of(product, name) or {}
            rows.append(
                {
                    "category": product.name,
                    "figure": figure_name(name),
                    "winner": value,
                    "low": low,
                    "high": high,
                    "baseline": other,
                    "baseline_low": other_low,
                    "baseline_high": other_high,
                    "gain": found.get("gain"),
                    "gain_low": found.get("low"),
                    "gain_high": found.get("high"),
                    "significance": found.get("verdict"),
                    "authors": published(product, name),
                    "about": METRICS[name].help if name in METRICS else "",
                }
            )
    columns = [
        _PRODUCT,
        Column("figure", "figure", pick=True),
        Column("winner", "winner", "figure"),
        Column("low", "low", "figure"),
        Column("high", "high", "figure"),
        Column("baseline", "baseline", "figure"),
        Column("baseline_low", "low", "figure"),
        Column("baseline_high", "high", "figure"),
        Column("gain", "gain", "gain"),
        Column("gain_low", "low", "gain"),
        Column("gain_high", "high", "gain"),
        Column("significance", "significance"),
        Column("authors", "authors", "figure"),
        Column("about", "what it is"),
    ]
    note = (
        "Winner and baseline (cflow: flows on the pretrained backbone) on the same test images. "
        "Intervals: 95 %, bootstrap over images, "
        "1000 replicates; gains: paired, on the same replicates. The authors' AU-PRO uses 200 "
        "thresholds and filled regions."
    )
    return Table("figures", "Test figures", columns, rows, note)


def _trials(study: StudyFiles) -> Table:
    rows, names = (
        [],
        list(dict.fromkeys(name for product in study.products for name in product.parameters)),
    )
    for product in study.products:
        for trial in product.trials:
            own = {
                k: trial.get(k)
                for k in (
                    "trial",
                    "status",
                    "objective",
                    "seconds",
                    "stages_reused",
                    "stages_computed",
                    "cause",
                )
            }
            figures = {
                name: trial.get(f"validation_{name}") for name in ("image_auroc", "pixel_auroc")
            }
            mark = {"winner": "winner" if trial["trial"] == product.result.get("trial") else ""}
            values = {f"config/{name}": trial.get(f"config/{name}") for name in names}
            rows.append(
                {"category": product.name}
                | own
                | figures
                | mark
                | values
                | {"latency": trial.get("latency")}
            )
    columns = [
        _PRODUCT,
        Column("trial", "trial", "count"),
        Column("status", "status", pick=True),
        Column("winner", "", pick=False),
        Column("objective", f"{figure_name(study.objective)} (objective)", "figure"),
        Column("image_auroc", "image AUROC", "figure"),
        Column("pixel_auroc", "pixel AUROC", "figure"),
        *(
            [Column("latency", "latency, ms", "number")]
            if any(row["latency"] is not None for row in rows)
            else []
        ),
        *(Column(f"config/{name}", name, "setting") for name in names),
        Column("seconds", "time", "seconds"),
        Column("stages_reused", "stages reused", "count"),
        Column("stages_computed", "computed", "count"),
        Column("cause", "why it failed"),
    ]
    return Table(
        "trials",
        "Every trial",
        columns,
        rows,
        "Figures are means over the validation defect families.",
    )


def _importances(study: StudyFiles) -> Table:
    rows = []
    for product in study.products:
        count = len(product.finished_trials)
        for name, value in importances(product, study.space).items():
            rows.append(
                {"category": product.name, "parameter": name, "importance": value, "trials": count}
            )
    columns = [
        _PRODUCT,
        Column("parameter", "parameter", pick=True),
        Column("importance", "importance", "percent"),
        Column("trials", "from trials", "count"),
    ]
    note = (
        "The share of the objective's variance that a parameter explains (fANOVA, Hutter et al., "
        "ICML 2014). From few trials, a hint."
    )
    return Table("importances", "Parameter importances", columns, rows, note)


def _time(study: StudyFiles) -> Table:
    rows = []
    for product in study.products:
        trials = product.finished_trials
        reused, computed = (
            sum(t.get(f"stages_{kind}") or 0 for t in trials) for kind in ("reused", "computed")
        )
        kinds = seconds_by_kind(trials)
        most = ", ".join(
            f"{name.replace('_', ' ')} {duration(value)}" for name, value in list(kinds.items())[:3]
        )
        rows.append(
            {
                "category": product.name,
                "trials": len(trials),
                "seconds": trial_seconds(product),
                "saved": saved_seconds(trials),
                "reused": reused,
                "computed": computed,
                "finish": product.result.get("seconds"),
                "most": most,
            }
        )
    columns = [
        _PRODUCT,
        Column("trials", "trials finished", "count"),
        Column("seconds", "trials took", "seconds"),
        Column("saved", "saved by sharing, about", "seconds"),
        Column("reused", "stages reused", "count"),
        Column("computed", "computed", "count"),
        Column("finish", "choosing and testing", "seconds"),
        Column("most", "most time went into"),
    ]
    note = (
        "Saved: each kind of work that a trial found done, at the median time of this product's "
        "trials that did it. An estimate."
    )
    return Table("time", "Time, and what sharing stages saved", columns, rows, note)


def _regret(study: StudyFiles) -> Table:
    rows = []
    for product in study.products:
        found = product.result.get("regret") or {}
        for choice, title in (
            ("fusion_weight", "by another fusion weight"),
            ("trial", "by any trial"),
        ):
            for name, values in (found.get(choice) or {}).items():
                picked = f"trial {values['trial']}, " if values.get("trial") is not None else ""
                rows.append(
                    {
                        "category": product.name,
                        "choice": title,
                        "figure": figure_name(name),
                        "selected": values.get("selected"),
                        "oracle": values.get("oracle"),
                        "regret": values.get("regret"),
                        "picked": f"{picked}weight {setting(values.get('weight'))}",
                    }
                )
    columns = [
        _PRODUCT,
        Column("choice", "the oracle chose", pick=True),
        Column("figure", "figure", pick=True),
        Column("selected", "selected", "figure"),
        Column("oracle", "oracle", "figure"),
        Column("regret", "regret", "figure"),
        Column("picked", "what it picked"),
    ]
    note = (
        "What an oracle that picks on the test images would have gained, at the network's size. "
        "It was asked last and chose nothing."
    )
    return Table("regret", "Regret against the oracle", columns, rows, note)


def _rules(study: StudyFiles) -> Table:
    rows = []
    for product in study.products:
        tested = (product.result.get("regret") or {}).get("rules") or {}
        for rule, picked in (product.result.get("rules") or {}).items():
            values = {**picked.get("config", {}), "fusion_weight": picked.get("fusion_weight")}
            line = ", ".join(f"{name} {setting(value)}" for name, value in values.items())
            figures = tested.get(rule) or {}
            row = {"category": product.name, "rule": rule, "picks": line}
            rows.append(row | {name: figures.get(name) for name in ("pixel_ap", "image_auroc")})
    columns = [
        _PRODUCT,
        Column("rule", "rule", pick=True),
        Column("picks", "picks"),
        Column("pixel_ap", "test pixel AP", "figure"),
        Column("image_auroc", "test image AUROC", "figure"),
    ]
    chose = (study.summary.get("study") or {}).get("selection")
    note = "Both figures at the network's size, image scores from the rule's own fusion weight." + (
        f" This study chose by {chose}." if chose else ""
    )
    return Table("rules", "What each selection rule would have picked", columns, rows, note)


def _families(study: StudyFiles) -> Table:
    rows = []
    names: list[str] = []
    for product in study.products:
        for family, figures in (
            (product.result.get("validation") or {}).get("families") or {}
        ).items():
            rows.append({"category": product.name, "family": family, **figures})
            names += [name for name in figures if name not in names]
    columns = [
        _PRODUCT,
        Column("family", "family", pick=True),
        *(Column(n, figure_name(n), "figure") for n in names),
    ]
    return Table(
        "families",
        "Validation figures by defect family",
        columns,
        rows,
        "Of the winner, on the defects that chose it.",
    )


def _suspects(study: StudyFiles) -> Table:
    rows = [
        {"category": product.name, "picture": suspect.path, "why": suspect.why}
        for product in study.products
        for suspect in suspects_of(product)
    ]
    columns = [_PRODUCT, Column("picture", "picture"), Column("why", "why")]
    return Table(
        "suspects",
        "Pictures to check",
        columns,
        rows,
        "They contradict their label by far: mislabelled, damaged, or very hard.",
    )


def _images(study: StudyFiles) -> Table:
    rows = [
        {"category": product.name, **row, "answer": "defect" if row["verdict"] else "good"}
        for product in study.products
        for row in product.images
    ]
    columns = [
        _PRODUCT,
        Column("split", "split", pick=True),
        Column("path", "picture"),
        Column("defect_type", "labelled", pick=True),
        Column("score", "score", "number"),
        Column("answer", "answer", pick=True),
        Column("baseline_score", "baseline's score", "number"),
    ]
    return Table("images", "Every picture's score", columns, rows)


def _regions(study: StudyFiles) -> Table:
    rows = [
        {"category": product.name, **row} for product in study.products for row in product.regions
    ]
    columns = [
        _PRODUCT,
        Column("path", "picture"),
        Column("defect_type", "defect type", pick=True),
        Column("pixels", "pixels", "count"),
        Column("share", "share of the picture", "percent"),
        Column("contrast", "contrast", "percent"),
        Column("overlap", "pixels found", "percent"),
        Column("found", "found"),
        Column("rejected", "picture rejected"),
    ]
    return Table("regions", "Every defect region of the test images", columns, rows)


def _ledger(study: StudyFiles) -> Table:
    columns = [
        Column("at", "when (UTC)"),
        Column("category", "product", pick=True),
        Column("opened", "opened"),
        Column("for", "what for"),
    ]
    return Table(
        "ledger",
        "When test images were opened",
        columns,
        study.ledger,
        "Nothing before these lines saw a test image.",
    )


def _fingerprints(study: StudyFiles) -> Table:
    rows = []
    for product in study.products:
        made, machine = product.provenance, product.facts.get("machine") or {}
        if made:
            rows.append(
                {
                    "category": product.name,
                    "fit": made.get("fit_images"),
                    "data": made.get("data_fingerprint"),
                    "validation": made.get("validation_fingerprint"),
                    "backbone": made.get("architecture"),
                    "weights": made.get("backbone_fingerprint"),
                    "versions": ", ".join(
                        f"{name} {version}"
                        for name, version in (made.get("versions") or {}).items()
                    ),
                    "machine": ", ".join(f"{name} {value}" for name, value in machine.items())
                    or None,
                }
            )
    columns = [
        _PRODUCT,
        Column("fit", "normals fitted", "count"),
        Column("data", "fingerprint of the data"),
        Column("validation", "of the held-out normals"),
        Column("backbone", "backbone"),
        Column("weights", "fingerprint of its weights"),
        Column("versions", "versions"),
        Column("machine", "hardware"),
    ]
    return Table(
        "fingerprints",
        "What the winners rest on",
        columns,
        rows,
        "Fingerprints are hashes of contents: names and folders do not matter.",
    )


TABLES: dict[str, Callable[[StudyFiles], Table]] = {
    "verdicts": _verdicts,
    "figures": _figures,
    "suspects": _suspects,
    "trials": _trials,
    "importances": _importances,
    "time": _time,
    "regret": _regret,
    "rules": _rules,
    "families": _families,
    "images": _images,
    "regions": _regions,
    "ledger": _ledger,
    "fingerprints": _fingerprints,
}


def all_tables(study: StudyFiles, progress: Progress = silent) -> dict[str, Table]:
    """Every table, by its name; `progress` is told about each."""
    tables = {}
    for number, (name, table) in enumerate(TABLES.items(), 1):
        tables[name] = table(study)
        progress("report: tables", number, len(TABLES))
    return tables


def of_product(table: Table, product: Product) -> Table:
    """A table's rows of one product, without its name."""
    rows = [row for row in table.rows if row.get("category") == product.name]
    return replace(table, rows=rows).without("category")
