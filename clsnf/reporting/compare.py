"""What changed from one study to others, category by category: a page and its tables.

Unusual: where both studies kept the scores of the same test images, image AUROC is compared
    pairwise, image by image. Pixel figures can't
be, because no study keeps its maps: there only intervals stand beside each other, and the table
says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import clsnf
from clsnf.core.config import differences
from clsnf.core.errors import OutputError
from clsnf.core.files import check_writable
from clsnf.metrics.bootstrap import bin_images, compare, draw_replicates, replicate_metrics
from clsnf.reporting.advice import advise
from clsnf.reporting.blocks import Block, Column, Facts, Note, Section, Table
from clsnf.reporting.build import Built, write_page, write_tables
from clsnf.reporting.chart_parts import shown, style
from clsnf.reporting.charts_of_products import figure_chart, figure_points
from clsnf.reporting.formats import duration, figure_name, is_finite
from clsnf.reporting.page import render
from clsnf.reporting.study_files import Product, Record, StudyFiles, read_study
from clsnf.reporting.tables import settings_line, trial_seconds

PAGE = "comparison.html"
_REPLICATES = 1000
_FIGURES = ("image_auroc", "pixel_ap", "au_pro")
_NEAR = 0.002  # smaller differences of a figure are told as none


def build_comparison(runs: Sequence[Path], out: Path | None = None) -> Built:
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
    left_out = [f"au_pro_{part}" for part in ("before", "now", "change")]  # the files have them
    shown_changes = changes.without(*left_out, *(["study"] if len(names) == 2 else []))
    sections = [
        Section("changes", "Category by category", [shown_changes, *_charts(studies, names)]),
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
    return Built(out / PAGE, out / "tables", {}, missing)


def _names(studies: Sequence[StudyFiles]) -> list[str]:
    """A name for each study: its folder's, with what is above it where two share theirs."""
    names = [study.name for study in studies]
    if len(set(names)) < len(names):
        names = [f"{study.folder.parent.name}/{study.name}" for study in studies]
    return [
        name if names.count(name) == 1 else f"{name} ({index + 1})"
        for index, name in enumerate(names)
    ]


def _pairs(studies: Sequence[StudyFiles]) -> list[tuple[str, Product | None, int, Product | None]]:
    """(category, the first study's, number of another study, that one's) for every category that
    either has.
    """
    found = []
    first = {product.name: product for product in studies[0].products}
    for number, study in enumerate(studies[1:], 1):
        other = {product.name: product for product in study.products}
        found += [
            (name, first.get(name), number, other.get(name)) for name in sorted({*first, *other})
        ]
    return found


def _changes(studies: Sequence[StudyFiles], names: list[str]) -> Table:
    rows = []
    for category, before, number, now in _pairs(studies):
        row: Record = {"category": category, "study": names[number], "change": _change(before, now)}
        for name in _FIGURES:
            old, new = (product.figures.get(name) if product else None for product in (before, now))
            both = is_finite(old) and is_finite(new)
            row |= {
                f"{name}_before": old,
                f"{name}_now": new,
                f"{name}_change": new - old if both else None,  # type: ignore[operator]
            }
        paired = _paired(before, now)
        row |= {
            "low": paired.get("low"),
            "high": paired.get("high"),
            "significance": paired["verdict"],
        }
        row |= {
            "decision_before": _decision(studies[0], before),
            "decision_now": _decision(studies[number], now),
        }
        rows.append(row)
    figures = {
        name: [
            Column(f"{name}_{part}", f"{figure_name(name)}, {title}", kind)
            for part, title, kind in (
                ("before", "before", "figure"),
                ("now", "now", "figure"),
                ("change", "change", "gain"),
            )
        ]
        for name in _FIGURES
    }
    columns = [
        Column("category", "product", pick=True),
        Column("study", "study", pick=True),
        Column("change", "in short", pick=True),
        Column("decision_before", "decision before"),
        Column("decision_now", "decision now", pick=True),
        *figures["image_auroc"],
        Column("low", "its change, low", "gain"),
        Column("high", "high", "gain"),
        Column("significance", "significance"),
        *figures["pixel_ap"],
        *figures["au_pro"],
    ]
    note = (
        f"Before: {names[0]}. Test images; in short: image AUROC and pixel AP moved by more than "
        f"{_NEAR:g}. The interval is of image "
        f"AUROC, paired on the test images whose scores both studies kept (95 %, {_REPLICATES} "
        "bootstrap replicates). Pixel figures can't "
        "be paired: no study keeps its maps."
    )
    return Table("changes", "What changed", columns, rows, note)


def _change(before: Product | None, now: Product | None) -> str:
    if before is None or now is None:
        return "new" if before is None else "gone"
    if "winner" not in before.result or "winner" not in now.result:
        return "no winner" if "winner" not in now.result else "has a winner now"
    moved = []
    for name in ("image_auroc", "pixel_ap"):
        old, new = before.figures.get(name), now.figures.get(name)
        if (
            old is not None
            and new is not None
            and is_finite(old)
            and is_finite(new)
            and abs(new - old) > _NEAR
        ):
            moved.append(new > old)
    if not moved:
        return "about the same" if before.figures and now.figures else "not tested"
    return "better" if all(moved) else "worse" if not any(moved) else "mixed"


def _decision(study: StudyFiles, product: Product | None) -> str:
    return "–" if product is None else advise(study, product).title


def _paired(before: Product | None, now: Product | None) -> dict[str, Any]:
    """Change of image AUROC on the test images that both have, as bootstrap replicates see it."""
    if before is None or now is None:
        return {"verdict": "–"}
    old, new = _scores(before), _scores(now)
    common = sorted(set(old) & set(new))
    labels = [old[key]["label"] for key in common]
    if len(common) < max(len(old), len(new)) or not any(labels) or all(labels):
        return {"verdict": "not the same test images" if old and new else "no scores kept"}
    scores = [[found[key]["score"] for key in common] for found in (old, new)]
    if not all(is_finite(score) for own in scores for score in own):
        return {"verdict": "scores that are not finite"}
    weights = draw_replicates(labels, _REPLICATES, 0)
    first, second = (replicate_metrics(bin_images(own, labels, None), weights) for own in scores)
    found = asdict(compare(second, first)["image_auroc"])
    verdict = (
        "significantly better"
        if found["low"] > 0
        else "significantly worse"
        if found["high"] < 0
        else "no clear difference"
    )
    return found | {"verdict": verdict}


def _scores(product: Product) -> dict[tuple[str, ...], Record]:
    """Test images by the end of their path: the data may have moved between studies."""
    return {
        (*Path(row["path"]).parts[-2:], str(row["label"])): row
        for row in product.images
        if row["split"] == "test"
    }


def _charts(studies: Sequence[StudyFiles], names: list[str]) -> list[Block]:
    blocks: list[Block] = []
    for figure in ("image_auroc", "pixel_ap"):
        data = []
        for index, (study, name) in enumerate(zip(studies, names, strict=True)):
            products = [p for p in study.products if is_finite(p.figures.get(figure))]
            if products:
                look = style(index)
                data.append(
                    figure_points(products, figure, shown(name), look["colour"], look["marker"])
                )
        if data:
            reading = (
                "Winners on test images, with 95 % intervals over images where the study kept them."
            )
            blocks.append(
                figure_chart(f"{figure_name(figure)}, study by study", figure, data, reading)
            )
    return blocks


def _settings(studies: Sequence[StudyFiles], names: list[str]) -> Table:
    """What differs in what the winners are made of and rest on."""
    rows = []
    for category, before, number, now in _pairs(studies):
        if (
            before is None
            or now is None
            or "winner" not in before.result
            or "winner" not in now.result
        ):
            continue
        lines = list(
            differences(before.result.get("settings") or {}, now.result.get("settings") or {})
        )
        for what, key in (
            ("training pictures", "data_fingerprint"),
            ("held-out normals", "validation_fingerprint"),
        ):
            lines += _other(before, now, what, key)
        lines += _other(before, now, "backbone weights", "backbone_fingerprint")
        rows += [
            {"category": category, "study": names[number], "difference": line}
            for line in lines or ["nothing"]
        ]
    columns = [
        Column("category", "product", pick=True),
        Column("study", "study", pick=True),
        Column("difference", "what differs in the winner"),
    ]
    return Table("settings", "What the winners differ in", columns, rows)


def _other(before: Product, now: Product, what: str, key: str) -> list[str]:
    old, new = before.provenance.get(key), now.provenance.get(key)
    return [f"other {what}"] if old and new and old != new else []


def _facts(studies: Sequence[StudyFiles], names: list[str]) -> list[Block]:
    blocks: list[Block] = []
    for study, name in zip(studies, names, strict=True):
        rows = [
            ("Folder", str(study.folder)),
            ("Ended (UTC)", str(study.summary.get("at") or "not yet")),
            ("Trials", f"{sum(len(p.finished_trials) for p in study.products)} finished"),
            ("They took", duration(sum(trial_seconds(p) for p in study.products))),
            *((f"Winner of {p.name}", settings_line(p) or "none") for p in study.products),
        ]
        blocks.append(Facts(name, rows))
    return blocks or [Note("There is no study.")]


def _headline(changes: Table, names: list[str]) -> str:
    if len(names) > 2:
        return f"{names[0]} compared with {len(names) - 1} other studies"
    counts: dict[str, int] = {}
    for row in changes.rows:
        counts[row["change"]] = counts.get(row["change"], 0) + 1
    told = ", ".join(
        f"{count} {change}" for change, count in sorted(counts.items(), key=lambda item: -item[1])
    )
    return f"From {names[0]} to {names[1]}: {told or 'no product in either'}"
