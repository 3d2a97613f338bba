"""The report's tables, over all products of a study.

``TABLES`` is the registry. A new table is one function of a study, and one line in it. Each table
is written as CSV and Markdown; a section shows its rows of one product with :func:`of_product`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

from clsnf.core.progress import Progress, silent
from clsnf.metrics import METRICS
from clsnf.paper.presets import published_metrics
from clsnf.reporting.advice import advise, gain_metric, gain_of, suspects_of
from clsnf.reporting.blocks import Column, Table
from clsnf.reporting.formats import duration, metric_name, setting, settings
from clsnf.reporting.study_files import Product, Record, StudyFiles
from clsnf.reporting.trials import importances, saved_seconds, seconds_by_kind
from clsnf.results import Interval, OracleLoss, TrialResult, WinnerProvenance

VERDICT_METRICS = ("image_auroc", "pixel_ap", "au_pro")
_PRODUCT = Column("category", "product", pick=True)
_PUBLISHED = {  # metric -> its name among the authors' figures
    "image_auroc": "image_auroc",
    "pixel_ap": "pixel_ap",
    "pixel_auroc": "pixel_auroc",
    "au_pro": "au_pro_200_steps",
}


def published(product: Product, name: str) -> float | None:
    """The metric that the authors published for a category of that name; None without one."""
    return (published_metrics(product.name) or {}).get(_PUBLISHED.get(name, ""))


def chosen_settings(product: Product) -> str:
    """The winner's values of the searched settings in one line; empty without a winner."""
    return settings(product.winner.chosen) if product.winner is not None else ""


def finish_seconds(product: Product) -> float | None:
    """What choosing and testing the winner took; None where it is not known."""
    return None if product.winner is None else product.winner.seconds


def _bounds(intervals: Mapping[str, Interval], name: str) -> Interval | tuple[None, None]:
    return intervals.get(name, (None, None))


# ---- what to do, and the metrics behind it ----


def _verdicts(study: StudyFiles) -> Table:
    metrics = [
        Column(f"{name}{part}", f"{metric_name(name)}{title}", "metric")
        for name in VERDICT_METRICS
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
        *metrics,
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
    rows = [_verdict(study, product) for product in study.products]
    note = "Test images; low and high bound 95 % intervals over images."
    return Table("verdicts", "Verdicts", columns, rows, note)


def _verdict(study: StudyFiles, product: Product) -> Record:
    advice, test = advise(study, product), product.test
    row: Record = {
        "category": product.name,
        "decision": advice.title,
        "next": " ".join(advice.next_steps),
    }
    for name in VERDICT_METRICS:
        low, high = _bounds(product.intervals, name)
        row |= {
            name: product.metrics.get(name),
            f"{name}_low": low,
            f"{name}_high": high,
            f"{name}_baseline": product.baseline and product.baseline.metrics.get(name),
            f"{name}_authors": published(product, name),
        }
    gain_in = gain_metric(study, product)
    row |= _gain(product, gain_in)
    return row | {
        "gain_in": metric_name(gain_in) if "gain" in row else None,
        "recall": test and test.recall,
        "false_rejects": test and test.false_reject_rate,
        "settings": chosen_settings(product),
        "trial_seconds": product.trial_seconds,
        "finish_seconds": finish_seconds(product),
    }


def _gain(product: Product, name: str) -> Record:
    """The columns of a gain; empty where it is not known."""
    found = gain_of(product, name)
    if found is None:
        return {}
    return {
        "gain": found.value,
        "gain_low": found.low,
        "gain_high": found.high,
        "significance": found.verdict,
    }


def _metrics(study: StudyFiles) -> Table:
    columns = [
        _PRODUCT,
        Column("figure", "metric", pick=True),
        Column("winner", "winner", "metric"),
        Column("low", "low", "metric"),
        Column("high", "high", "metric"),
        Column("baseline", "baseline", "metric"),
        Column("baseline_low", "low", "metric"),
        Column("baseline_high", "high", "metric"),
        Column("gain", "gain", "gain"),
        Column("gain_low", "low", "gain"),
        Column("gain_high", "high", "gain"),
        Column("significance", "significance"),
        Column("authors", "authors", "metric"),
        Column("about", "what it is"),
    ]
    note = (
        "Winner and baseline (cflow: flows on the pretrained backbone) on the same test images. "
        "Intervals: 95 %, bootstrap over images, 1000 replicates. Gains: paired, on the same "
        "replicates. The authors' AU-PRO uses 200 thresholds and filled regions."
    )
    rows = [_metric(product, name) for product in study.products for name in product.metrics]
    return Table("figures", "Test metrics", columns, rows, note)


def _metric(product: Product, name: str) -> Record:
    baseline = product.baseline
    low, high = _bounds(product.intervals, name)
    baseline_low, baseline_high = _bounds(baseline.intervals if baseline else {}, name)
    return {
        "category": product.name,
        "figure": metric_name(name),
        "winner": product.metrics[name],
        "low": low,
        "high": high,
        "baseline": baseline and baseline.metrics.get(name),
        "baseline_low": baseline_low,
        "baseline_high": baseline_high,
        **_gain(product, name),
        "authors": published(product, name),
        "about": METRICS[name].help if name in METRICS else "",
    }


def _suspects(study: StudyFiles) -> Table:
    rows = [
        {"category": product.name, "picture": suspect.path, "why": suspect.why}
        for product in study.products
        for suspect in suspects_of(product)
    ]
    columns = [_PRODUCT, Column("picture", "image"), Column("why", "why")]
    note = "They contradict their label by far: mislabelled, damaged, or very hard."
    return Table("suspects", "Images to check", columns, rows, note)


# ---- the search ----


def _trials(study: StudyFiles) -> Table:
    names = list(dict.fromkeys(name for product in study.products for name in product.parameters))
    rows = [_trial(product, trial, names) for product in study.products for trial in product.trials]
    latency = [Column("latency", "latency, ms", "number")]
    columns = [
        _PRODUCT,
        Column("trial", "trial", "count"),
        Column("status", "status", pick=True),
        Column("winner", ""),
        Column("objective", f"{metric_name(study.objective)} on validation defects", "metric"),
        Column("image_auroc", "image AUROC", "metric"),
        Column("pixel_auroc", "pixel AUROC", "metric"),
        *(latency if any(row["latency"] is not None for row in rows) else []),
        *(Column(f"config/{name}", name, "setting") for name in names),
        Column("seconds", "time", "seconds"),
        Column("stages_reused", "artifacts reused", "count"),
        Column("stages_computed", "computed", "count"),
        Column("cause", "why it failed"),
    ]
    note = (
        "Metrics are means over the validation defect families, at the best of the fusion weights "
        "that the trial swept on its maps: the number that winners are chosen by."
    )
    return Table("trials", "Every trial", columns, rows, note)


def _trial(product: Product, trial: TrialResult, names: list[str]) -> Record:
    measured = trial.measured
    return {
        "category": product.name,
        "trial": trial.number,
        "status": trial.status,
        "winner": "winner" if trial.number == product.winner_trial else "",
        "objective": trial.objective,
        "image_auroc": measured.validation.get("image_auroc"),
        "pixel_auroc": measured.validation.get("pixel_auroc"),
        "latency": measured.latency,
        **{f"config/{name}": trial.config.get(name) for name in names},
        "seconds": measured.seconds,
        "stages_reused": measured.artifacts_reused,
        "stages_computed": measured.artifacts_computed,
        "cause": trial.cause,
    }


def _importances(study: StudyFiles) -> Table:
    rows = [
        {
            "category": product.name,
            "parameter": name,
            "importance": value,
            "trials": len(product.finished_trials),
        }
        for product in study.products
        for name, value in importances(product, study.space).items()
    ]
    columns = [
        _PRODUCT,
        Column("parameter", "setting", pick=True),
        Column("importance", "importance", "percent"),
        Column("trials", "from trials", "count"),
    ]
    note = (
        "The share of the objective's variance that a setting explains (fANOVA, Hutter et al., "
        "ICML 2014). From few trials it is a hint."
    )
    return Table("importances", "Importances of the searched settings", columns, rows, note)


def _time(study: StudyFiles) -> Table:
    columns = [
        _PRODUCT,
        Column("trials", "trials finished", "count"),
        Column("seconds", "trials took", "seconds"),
        Column("saved", "saved by sharing, about", "seconds"),
        Column("reused", "artifacts reused", "count"),
        Column("computed", "computed", "count"),
        Column("finish", "choosing and testing", "seconds"),
        Column("most", "most time went into"),
    ]
    note = (
        "Saved is an estimate: each kind of work whose result a trial found counts at the median "
        "time of this product's trials that did it."
    )
    rows = [_time_of(product) for product in study.products]
    return Table("time", "Time, and what sharing artifacts saved", columns, rows, note)


def _time_of(product: Product) -> Record:
    trials = product.finished_trials
    longest = list(seconds_by_kind(trials).items())[:3]
    return {
        "category": product.name,
        "trials": len(trials),
        "seconds": product.trial_seconds,
        "saved": saved_seconds(trials),
        "reused": sum(trial.measured.artifacts_reused or 0 for trial in trials),
        "computed": sum(trial.measured.artifacts_computed or 0 for trial in trials),
        "finish": finish_seconds(product),
        "most": ", ".join(f"{kind.replace('_', ' ')} {duration(value)}" for kind, value in longest),
    }


# ---- the choice ----


def _regret(study: StudyFiles) -> Table:
    rows = []
    for product in study.products:
        regret = product.winner.regret if product.winner is not None else None
        if regret is None:
            continue
        rows += [
            _loss(product, "by another fusion weight", name, loss)
            for name, loss in regret.fusion_weight.items()
        ]
        rows += [_loss(product, "by any trial", name, loss) for name, loss in regret.trial.items()]
    columns = [
        _PRODUCT,
        Column("choice", "the oracle chose", pick=True),
        Column("figure", "metric", pick=True),
        Column("selected", "selected", "metric"),
        Column("oracle", "oracle", "metric"),
        Column("regret", "regret", "metric"),
        Column("picked", "what it picked"),
    ]
    note = (
        "What an oracle that picks on the test images would have gained, at the network's size. "
        "It is computed last and chooses nothing. A study leaves it out where it is dear, unless "
        "it is run with --regret."
    )
    return Table("regret", "Regret against the oracle", columns, rows, note)


def _loss(product: Product, choice: str, name: str, loss: OracleLoss) -> Record:
    trial = "" if loss.trial is None else f"trial {loss.trial}, "
    return {
        "category": product.name,
        "choice": choice,
        "figure": metric_name(name),
        "selected": loss.selected,
        "oracle": loss.oracle,
        "regret": loss.regret,
        "picked": f"{trial}weight {setting(loss.weight)}",
    }


def _rules(study: StudyFiles) -> Table:
    rows = []
    for product in study.products:
        if product.winner is None:
            continue
        regret = product.winner.regret
        tested = regret.rules if regret is not None else {}
        for rule, pick in product.winner.rules.items():
            metrics = tested.get(rule, {})
            rows.append(
                {
                    "category": product.name,
                    "rule": rule,
                    "picks": settings({**pick.config, "fusion_weight": pick.fusion_weight}),
                    "pixel_ap": metrics.get("pixel_ap"),
                    "image_auroc": metrics.get("image_auroc"),
                }
            )
    columns = [
        _PRODUCT,
        Column("rule", "rule", pick=True),
        Column("picks", "picks"),
        Column("pixel_ap", "test pixel AP", "metric"),
        Column("image_auroc", "test image AUROC", "metric"),
    ]
    note = "Both metrics at the network's size, image scores with the rule's own fusion weight."
    if study.summary is not None:
        note += f" This study chose by {study.summary.study.selection}."
    return Table("rules", "What each selection rule would have picked", columns, rows, note)


def _families(study: StudyFiles) -> Table:
    rows: list[Record] = [
        {"category": product.name, "family": family, **metrics}
        for product in study.products
        if product.winner is not None
        for family, metrics in product.winner.validation.families.items()
    ]
    names = dict.fromkeys(name for row in rows for name in list(row)[2:])
    columns = [
        _PRODUCT,
        Column("family", "family", pick=True),
        *(Column(name, metric_name(name), "metric") for name in names),
    ]
    note = "Of the winner, on the defects that chose it."
    return Table("families", "Validation metrics by defect family", columns, rows, note)


# ---- image by image ----


def _images(study: StudyFiles) -> Table:
    rows = [
        {
            "category": product.name,
            **asdict(image),
            "answer": "defect" if image.verdict else "good",
        }
        for product in study.products
        for image in product.images
    ]
    columns = [
        _PRODUCT,
        Column("split", "split", pick=True),
        Column("path", "image"),
        Column("defect_type", "labelled", pick=True),
        Column("score", "score", "number"),
        Column("answer", "answer", pick=True),
        Column("baseline_score", "baseline's score", "number"),
    ]
    return Table("images", "Every image's score", columns, rows)


def _regions(study: StudyFiles) -> Table:
    rows = [
        {"category": product.name, **asdict(region)}
        for product in study.products
        for region in product.regions
    ]
    columns = [
        _PRODUCT,
        Column("path", "image"),
        Column("defect_type", "defect type", pick=True),
        Column("pixels", "pixels", "count"),
        Column("share", "share of the image", "percent"),
        Column("contrast", "contrast", "percent"),
        Column("overlap", "pixels found", "percent"),
        Column("found", "found"),
        Column("rejected", "image rejected"),
    ]
    return Table("regions", "Every defect region of the test images", columns, rows)


# ---- what it rests on ----


def _ledger(study: StudyFiles) -> Table:
    columns = [
        Column("at", "when (UTC)"),
        Column("category", "product", pick=True),
        Column("opened", "opened"),
        Column("for", "what for"),
    ]
    note = "Nothing before these lines saw a test image."
    return Table("ledger", "When test images were opened", columns, study.ledger, note)


def _fingerprints(study: StudyFiles) -> Table:
    rows = [
        _fingerprint(product, product.provenance)
        for product in study.products
        if product.provenance is not None
    ]
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
    note = "Fingerprints are hashes of contents: names and folders do not matter."
    return Table("fingerprints", "What the winners rest on", columns, rows, note)


def _fingerprint(product: Product, made: WinnerProvenance) -> Record:
    machine = product.facts.machine if product.facts is not None else {}
    return {
        "category": product.name,
        "fit": made.fit_images,
        "data": made.data_fingerprint,
        "validation": made.validation_fingerprint,
        "backbone": made.architecture,
        "weights": made.backbone_fingerprint,
        "versions": ", ".join(f"{name} {version}" for name, version in made.versions.items()),
        "machine": ", ".join(f"{name} {value}" for name, value in machine.items()) or None,
    }


TABLES: dict[str, Callable[[StudyFiles], Table]] = {
    "verdicts": _verdicts,
    "figures": _metrics,
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
    """Every table by its name; `progress` gets a step for each."""
    tables = {}
    for number, (name, table) in enumerate(TABLES.items(), 1):
        tables[name] = table(study)
        progress("report: tables", number, len(TABLES))
    return tables


def of_product(table: Table, product: Product) -> Table:
    """A table's rows of one product, without its name."""
    rows = [row for row in table.rows if row.get("category") == product.name]
    return replace(table, rows=rows).without("category")
