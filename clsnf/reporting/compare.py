"""What changed from one study to others, category by category: a page and its tables.

Where both studies kept the scores of the same test images, the change of image AUROC is paired,
image by image. Pixel metrics can't be paired, because no study keeps its maps: their intervals
stand side by side, and the table says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import clsnf
from clsnf.core.config import differences, to_dict
from clsnf.core.errors import OutputError
from clsnf.core.files import check_writable
from clsnf.metrics.bootstrap import bin_images, compare, draw_replicates, replicate_metrics
from clsnf.reporting.advice import advise
from clsnf.reporting.blocks import Block, Column, Facts, Note, Section, Table
from clsnf.reporting.build import ReportFiles, write_page, write_tables
from clsnf.reporting.chart_style import escape, style_of
from clsnf.reporting.formats import duration, is_finite, metric_name
from clsnf.reporting.page import render
from clsnf.reporting.study_charts import Series, metric_chart, winner_points
from clsnf.reporting.study_files import Product, Record, StudyFiles, read_study
from clsnf.reporting.tables import chosen_settings
from clsnf.results import ImageEvidence

PAGE = "comparison.html"
_REPLICATES = 1000
_METRICS = ("image_auroc", "pixel_ap", "au_pro")
_NEAR = 0.002  # a smaller difference of a metric is no change
_FINGERPRINTS = {  # field of a winner's provenance -> what it is the hash of
    "data_fingerprint": "training images",
    "validation_fingerprint": "held-out normals",
    "backbone_fingerprint": "backbone weights",
}


class _Pair(NamedTuple):
    """A category in the first study and in another one; None where a study does not have it."""

    category: str
    before: Product | None
    number: int  # of the other study
    now: Product | None


def build_comparison(runs: Sequence[Path], out: Path | None = None) -> ReportFiles:
    """Write what changed from the first study to each of the others.

    Args:
        runs: folders of two studies or more.
        out: a folder for the page; ``comparison`` in the last study's where None.

    Raises:
        OutputError: a folder holds no study, or `out` can't be written.
    """
    out = (runs[-1] / "comparison" if out is None else out).absolute()
    if len(runs) < 2:
        raise OutputError("A comparison needs two studies or more.")
    studies = [read_study(run) for run in runs]
    check_writable(out, folder=True)
    names = _names(studies)
    changes, settings = _changes(studies, names), _settings(studies, names)
    only_in_files = [f"au_pro_{part}" for part in ("before", "now", "change")]
    shown = changes.without(*only_in_files, *(["study"] if len(names) == 2 else []))
    sections = [
        Section("changes", "Category by category", [shown, *_charts(studies, names)]),
        Section("settings", "Settings, data, decisions", [settings, *_facts(studies, names)]),
    ]
    missing = [
        f"{name}: {line}"
        for name, study in zip(names, studies, strict=True)
        for line in study.missing
    ]
    text = render(
        "compare.html.j2",
        title=f"{names[0]} compared with {', '.join(names[1:])}",
        version=clsnf.__version__,
        at=None,
        names=names,
        headline=_headline(changes, names),
        missing=missing,
        sections=sections,
    )
    write_page(out / PAGE, text)
    write_tables(out / "tables", [changes, settings])
    return ReportFiles(out / PAGE, out / "tables", {}, missing)


def _names(studies: Sequence[StudyFiles]) -> list[str]:
    """A name for each study: its folder's, with the folder above where two have the same."""
    names = [study.name for study in studies]
    if len(set(names)) < len(names):
        names = [f"{study.folder.parent.name}/{study.name}" for study in studies]
    return [
        name if names.count(name) == 1 else f"{name} ({index + 1})"
        for index, name in enumerate(names)
    ]


def _headline(changes: Table, names: list[str]) -> str:
    if len(names) > 2:
        return f"{names[0]} compared with {len(names) - 1} other studies"
    counts = Counter(row["change"] for row in changes.rows)
    says = ", ".join(
        f"{count} {change}" for change, count in sorted(counts.items(), key=lambda item: -item[1])
    )
    return f"From {names[0]} to {names[1]}: {says or 'no product in either'}"


def _pairs(studies: Sequence[StudyFiles]) -> list[_Pair]:
    """Every category of the first study or another one, study by study."""
    pairs = []
    first = {product.name: product for product in studies[0].products}
    for number, study in enumerate(studies[1:], 1):
        other = {product.name: product for product in study.products}
        pairs += [
            _Pair(name, first.get(name), number, other.get(name))
            for name in sorted({*first, *other})
        ]
    return pairs


# ---- what changed ----


def _changes(studies: Sequence[StudyFiles], names: list[str]) -> Table:
    metrics = {
        name: [
            Column(f"{name}_{part}", f"{metric_name(name)}, {title}", kind)
            for part, title, kind in (
                ("before", "before", "metric"),
                ("now", "now", "metric"),
                ("change", "change", "gain"),
            )
        ]
        for name in _METRICS
    }
    columns = [
        Column("category", "product", pick=True),
        Column("study", "study", pick=True),
        Column("change", "in short", pick=True),
        Column("decision_before", "decision before"),
        Column("decision_now", "decision now", pick=True),
        *metrics["image_auroc"],
        Column("low", "its change, low", "gain"),
        Column("high", "high", "gain"),
        Column("significance", "significance"),
        *metrics["pixel_ap"],
        *metrics["au_pro"],
    ]
    note = (
        f"Before: {names[0]}. Test images; in short: image AUROC and pixel AP moved by more than "
        f"{_NEAR:g}. The interval is of image AUROC, paired on the test images whose scores both "
        f"studies kept (95 %, {_REPLICATES} bootstrap replicates). Pixel metrics can't be paired: "
        "no study keeps its maps."
    )
    rows = [_change(studies, names, pair) for pair in _pairs(studies)]
    return Table("changes", "What changed", columns, rows, note)


def _change(studies: Sequence[StudyFiles], names: list[str], pair: _Pair) -> Record:
    before, now = pair.before, pair.now
    row: Record = {
        "category": pair.category,
        "study": names[pair.number],
        "change": _change_in_short(before, now),
    }
    for name in _METRICS:
        old, new = (product.metrics.get(name) if product else None for product in (before, now))
        row |= {
            f"{name}_before": old,
            f"{name}_now": new,
            f"{name}_change": new - old if is_finite(old) and is_finite(new) else None,
        }
    change = _paired_change(before, now)
    return row | {
        "low": change.low,
        "high": change.high,
        "significance": change.verdict,
        "decision_before": _decision(studies[0], before),
        "decision_now": _decision(studies[pair.number], now),
    }


def _change_in_short(before: Product | None, now: Product | None) -> str:
    if before is None or now is None:
        return "new" if before is None else "gone"
    if now.winner is None:
        return "no winner"
    if before.winner is None:
        return "has a winner now"
    is_better = []
    for name in ("image_auroc", "pixel_ap"):
        old, new = before.metrics.get(name), now.metrics.get(name)
        if is_finite(old) and is_finite(new) and abs(new - old) > _NEAR:
            is_better.append(new > old)
    if not is_better:
        return "about the same" if before.metrics and now.metrics else "not tested"
    return "better" if all(is_better) else "mixed" if any(is_better) else "worse"


def _decision(study: StudyFiles, product: Product | None) -> str:
    return "–" if product is None else advise(study, product).title


class _PairedChange(NamedTuple):
    """The change of image AUROC on the same images, with its 95 % interval where it is known."""

    verdict: str
    low: float | None = None
    high: float | None = None


def _paired_change(before: Product | None, now: Product | None) -> _PairedChange:
    if before is None or now is None:
        return _PairedChange("–")
    old, new = _test_images(before), _test_images(now)
    common = sorted(set(old) & set(new))
    labels = [old[key].label for key in common]
    if len(common) < max(len(old), len(new)) or not any(labels) or all(labels):
        return _PairedChange("not the same test images" if old and new else "no scores kept")
    scores = [[images[key].score for key in common] for images in (old, new)]
    if not all(is_finite(score) for own in scores for score in own):
        return _PairedChange("scores that are not finite")
    weights = draw_replicates(labels, _REPLICATES, 0)
    first, second = (replicate_metrics(bin_images(own, labels, None), weights) for own in scores)
    found = compare(second, first)["image_auroc"]
    verdict = "no clear difference"
    if found.low > 0:
        verdict = "significantly better"
    elif found.high < 0:
        verdict = "significantly worse"
    return _PairedChange(verdict, found.low, found.high)


def _test_images(product: Product) -> dict[tuple[str, ...], ImageEvidence]:
    """Test images by the end of their path: the data may have moved between studies."""
    return {
        (*Path(image.path).parts[-2:], str(image.label)): image
        for image in product.images
        if image.split == "test"
    }


def _charts(studies: Sequence[StudyFiles], names: list[str]) -> list[Block]:
    blocks: list[Block] = []
    for metric in ("image_auroc", "pixel_ap"):
        data = []
        for index, (study, name) in enumerate(zip(studies, names, strict=True)):
            products = [p for p in study.products if is_finite(p.metrics.get(metric))]
            if products:
                style = style_of(index)
                series = Series(escape(name), style.colour, style.marker)
                data.append(winner_points(products, metric, series))
        if data:
            title = f"{metric_name(metric)}, study by study"
            reading = (
                "Winners on test images, with 95 % intervals over images where the study kept them."
            )
            blocks.append(metric_chart(title, metric, data, reading))
    return blocks


# ---- what the winners differ in ----


def _settings(studies: Sequence[StudyFiles], names: list[str]) -> Table:
    rows = []
    for pair in _pairs(studies):
        if pair.before is None or pair.now is None:
            continue
        lines = _differences(pair.before, pair.now)
        rows += [
            {"category": pair.category, "study": names[pair.number], "difference": line}
            for line in lines
        ]
    columns = [
        Column("category", "product", pick=True),
        Column("study", "study", pick=True),
        Column("difference", "what differs in the winner"),
    ]
    return Table("settings", "What the winners differ in", columns, rows)


def _differences(before: Product, now: Product) -> list[str]:
    """What differs in what two winners are made of and rest on; empty without both winners."""
    if before.winner is None or now.winner is None:
        return []
    lines = list(differences(to_dict(before.winner.settings), to_dict(now.winner.settings)))
    for name, what in _FINGERPRINTS.items():
        old, new = (getattr(product.provenance, name, None) for product in (before, now))
        if old and new and old != new:
            lines.append(f"other {what}")
    return lines or ["nothing"]


def _facts(studies: Sequence[StudyFiles], names: list[str]) -> list[Block]:
    blocks: list[Block] = []
    for study, name in zip(studies, names, strict=True):
        finished = sum(len(product.finished_trials) for product in study.products)
        rows = [
            ("Folder", str(study.folder)),
            ("Ended (UTC)", study.summary.at if study.summary else "not yet"),
            ("Trials", f"{finished} finished"),
            ("They took", duration(sum(product.trial_seconds for product in study.products))),
            *((f"Winner of {p.name}", chosen_settings(p) or "none") for p in study.products),
        ]
        blocks.append(Facts(name, rows))
    return blocks or [Note("There is no study.")]
