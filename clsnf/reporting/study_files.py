"""Read what a study left in its folder.

A file that is missing or damaged never ends a report: it becomes a line in ``missing``, which the
page shows. Two things are refused: a folder without a study, and a study of a newer format.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from clsnf.core.config import DetectorSettings
from clsnf.core.errors import ClsnfError, OutputError
from clsnf.core.journal import find_damage
from clsnf.reporting.joint_choices import JointLabels
from clsnf.results import (
    BaselineResult,
    Case,
    CategoryResult,
    EvidenceFacts,
    FinishedCategory,
    ImageEvidence,
    Interval,
    Metrics,
    RegionEvidence,
    StudyIdentity,
    StudySummary,
    TestResult,
    TrialResult,
    WinnerProvenance,
    WinnerResult,
    check_format,
    from_plain,
    read_table,
    trials_of_journal,
)

T = TypeVar("T")
Record = dict[str, Any]


@dataclass(frozen=True)
class Product:
    """One category of a study.

    Attributes:
        name: of the category, which is the name of the user's folder: any text.
        result: what the study says of it; None where it did not come so far.
        trials: all that began.
        images, regions: rows of its evidence; empty without evidence.
        facts: of its evidence; None without evidence.
        pictures: folder of the evidence's pictures.
        provenance: of the saved winner; None without one.
    """

    name: str
    result: CategoryResult | None = None
    trials: list[TrialResult] = field(default_factory=list)
    images: list[ImageEvidence] = field(default_factory=list)
    regions: list[RegionEvidence] = field(default_factory=list)
    facts: EvidenceFacts | None = None
    pictures: Path = Path()
    provenance: WinnerProvenance | None = None

    @property
    def finished_trials(self) -> list[TrialResult]:
        """The trials that ended with an objective."""
        return [trial for trial in self.trials if trial.status == "finished"]

    @property
    def parameters(self) -> list[str]:
        """Names of the searched settings."""
        return list(dict.fromkeys(name for trial in self.trials for name in trial.config))

    @property
    def trial_seconds(self) -> float:
        """What all trials took together."""
        return sum(trial.seconds for trial in self.trials)

    @property
    def winner(self) -> WinnerResult | None:
        return None if self.result is None else self.result.winner

    @property
    def winner_trial(self) -> int | None:
        """The number of the trial that the winner comes from."""
        return None if self.winner is None else self.winner.trial

    @property
    def test(self) -> TestResult | None:
        """The winner's answers about the test images; None without test images."""
        return None if self.winner is None else self.winner.test

    @property
    def metrics(self) -> Metrics:
        """The winner's metrics on the test images; empty without labelled defects."""
        return {} if self.test is None else self.test.metrics

    @property
    def intervals(self) -> dict[str, Interval]:
        """95 % intervals of :attr:`metrics`; empty without evidence."""
        if self.winner is None or self.winner.evidence is None:
            return {}
        return self.winner.evidence.intervals

    @property
    def baseline(self) -> BaselineResult | None:
        """The baseline on the same test images; None without evidence or labelled defects."""
        if self.winner is None or self.winner.evidence is None:
            return None
        return self.winner.evidence.baseline

    @property
    def cases(self) -> list[Case]:
        """Images that the page shows, with the network's maps."""
        return [] if self.facts is None else self.facts.cases


@dataclass(frozen=True)
class StudyFiles:
    """A study.

    Attributes:
        folder: where it lies.
        summary: ``summary.json``; None where the study is not finished, or the file is damaged.
        identity: ``study.json``; None where it is missing or damaged.
        finished: whether the study came to its end.
        products: its categories, by name.
        ledger: entries of ``ledger.jsonl``.
        missing: what the report has to do without, in lines for people.
    """

    folder: Path
    summary: StudySummary | None
    identity: StudyIdentity | None
    finished: bool
    products: list[Product]
    ledger: list[Record]
    missing: list[str]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def objective(self) -> str:
        """The first objective's name."""
        return self.objectives[0]

    @property
    def objectives(self) -> list[str]:
        names = self.summary.study.objectives if self.summary is not None else ()
        if not names and self.identity is not None:
            names = tuple(self.identity.objectives)
        return list(names) or ["pixel_ap"]

    @property
    def space(self) -> dict[str, Record]:
        """What was searched: name -> range, as in the space's file."""
        known = self.summary or self.identity
        return {} if known is None else known.space

    @property
    def settings(self) -> DetectorSettings | None:
        """What every trial started from; None where no file says it."""
        known = self.summary or self.identity
        return None if known is None else known.settings


def read_study(folder: Path) -> StudyFiles:
    """Read what a study left.

    Raises:
        OutputError: the folder holds no study, or a newer version of clsnf wrote it.
    """
    folder = folder.absolute()
    files = [folder / name for name in ("summary.json", "study.json")]
    if not any(file.is_file() for file in files):
        raise OutputError(
            f"{folder} holds no study (no summary.json or study.json in it): give the folder that "
            "a study wrote."
        )
    missing: list[str] = []
    content = _json(files[0], missing) if files[0].is_file() else {}
    begun = _json(files[1], missing)
    check_format(content, str(files[0]))
    check_format(begun, str(files[1]))
    finished = bool(content)
    if not finished and files[0].is_file():
        missing.append(
            f"The summary is made anew by clsnf study --resume {folder}; until then the report "
            "shows what the other files hold."
        )
    elif not finished:
        missing.append(
            "The study is not finished: of categories without a winner, the report shows what "
            "there is."
        )
    results = _results(content.pop("categories", None), missing)
    summary = _typed(
        StudySummary, content | {"categories": {}} if finished else {}, files[0], missing
    )
    identity = _typed(StudyIdentity, begun, files[1], missing)
    known = summary or identity
    labels = JointLabels({} if known is None else known.space)
    results = {name: labels.result(found) for name, found in results.items()}
    trials = _trials(folder, finished, bool(begun.get("studies")), missing)
    trials = [labels.trial(trial) for trial in trials]
    names = {*results, *(identity.data if identity else ()), *(trial.category for trial in trials)}
    products = [
        _product(folder, name, results.get(name), trials, labels, missing) for name in sorted(names)
    ]
    ledger = folder / "ledger.jsonl"
    entries = _read(ledger, _json_lines, missing) if ledger.is_file() else []
    return StudyFiles(
        folder,
        replace(summary, categories={n: r for n, r in results.items() if r}) if summary else None,
        identity,
        finished,
        products,
        entries or [],
        missing,
    )


def _results(content: Any, missing: list[str]) -> dict[str, CategoryResult | None]:
    """The categories of a summary; None for one that is damaged, which the others survive."""
    results: dict[str, CategoryResult | None] = {}
    for name, found in (content if isinstance(content, dict) else {}).items():
        try:
            results[name] = from_plain(CategoryResult, found, f"{name} in summary.json")
        except ClsnfError as error:
            results[name] = None
            missing.append(str(error))
    return results


def _trials(folder: Path, finished: bool, elsewhere: bool, missing: list[str]) -> list[TrialResult]:
    """All trials; `elsewhere` says that the study's Optuna storage lies outside its folder."""
    table, journal = folder / "trials.parquet", folder / "optuna.journal"
    if journal.is_file() and not (finished and table.is_file()):
        # Of a study that goes on, the journal is newer than the table.
        trials = _read(journal, trials_of_journal, missing)
        damage = None if trials is None else _read(journal, find_damage, missing)
        if damage is not None:
            missing.append(
                f"{_name(journal)} is torn, or is being written: what follows its last whole "
                f"record ({damage}) is left out."
            )
        return trials or []
    if table.is_file():
        rows = _rows(table, TrialResult.from_row, missing)
        if rows or not journal.is_file():
            return rows
        missing.append("The trials are read from optuna.journal instead.")
        return _read(journal, trials_of_journal, missing) or []
    missing.append(
        "The trials of the study lie in another Optuna storage, and trials.parquet is not written "
        "yet: no trial is shown."
        if elsewhere
        else "There are neither trials.parquet nor optuna.journal: no trial is shown."
    )
    return []


def _product(
    folder: Path,
    name: str,
    result: CategoryResult | None,
    trials: list[TrialResult],
    labels: JointLabels,
    missing: list[str],
) -> Product:
    own = [trial for trial in trials if trial.category == name]
    if Path(name).name != name:
        # A category is the name of a folder. This name leads elsewhere: its files are not shown.
        missing.append(f"{name} is no name of a category: its files are left out.")
        return Product(name, result, own)
    kept = folder / "finished" / f"{name}.json"
    if result is None and kept.is_file():
        category = _typed(FinishedCategory, _json(kept, missing), kept, missing)
        if category is not None:
            result = labels.result(CategoryResult(winner=category.result))
    evidence = folder / "evidence" / name
    facts_file = evidence / "facts.json"
    product = Product(name, result, own, provenance=_provenance(folder, name, missing))
    missing += _gaps(product, facts_file.is_file())
    if not facts_file.is_file():
        return product
    return replace(
        product,
        images=_rows(evidence / "images.parquet", _image, missing),
        regions=_rows(evidence / "regions.parquet", _region, missing),
        facts=_typed(EvidenceFacts, _json(facts_file, missing), facts_file, missing),
        pictures=evidence / "pictures",
    )


def _gaps(product: Product, has_evidence: bool) -> list[str]:
    """What a product's part of the report has to do without."""
    name, result, lines = product.name, product.result, []
    if result is not None and result.error:
        lines.append(f"{name}: no winner, because {result.error}")
    elif product.winner is None:
        lines.append(
            f"{name}: no winner yet ({len(product.finished_trials)} of its trials finished)."
        )
    elif not has_evidence:
        lines.append(
            f"{name}: the study left no evidence. It is of an earlier version, or the folder was "
            "not copied whole. Pictures, score distributions, the baseline and learning curves are "
            "left out."
        )
    if product.winner is not None and product.test is None:
        lines.append(f"{name}: no test images, so no test metrics.")
    elif product.winner is not None and not product.metrics:
        lines.append(f"{name}: no test images with defects, so no test metrics.")
    for failed in result.failed_trials if result is not None else ():
        lines.append(f"{name}: trial {failed.trial} failed: {failed.cause}")
    return lines


def _provenance(folder: Path, name: str, missing: list[str]) -> WinnerProvenance | None:
    file = folder / "winners" / name / "detector.json"
    content = _json(file, missing).get("provenance") if file.is_file() else {}
    return _typed(WinnerProvenance, content, file, missing)


# ---- reading, with a line for what can't be read ----


def _read(path: Path, read: Callable[[Path], T], missing: list[str]) -> T | None:
    """What `read` makes of a file; None, and a line in `missing`, where it raises."""
    try:
        return read(path)
    except OutputError as error:  # names the file
        missing.append(str(error))
    except Exception as error:  # every library has errors of its own for a damaged file
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        missing.append(f"{_name(path)} can't be read ({line}).")
    return None


def _name(path: Path) -> str:
    return f"{path.name} of {path.parent.name}"


def _typed(cls: type[T], content: Any, path: Path, missing: list[str]) -> T | None:
    """A file's content as a type; None where it is empty or damaged."""
    if not content:
        return None
    try:
        return from_plain(cls, content, _name(path))
    except ClsnfError as error:
        missing.append(str(error))
        return None


def _rows(path: Path, make: Callable[[Record], T], missing: list[str]) -> list[T]:
    """The rows of a table; damaged ones are left out, with one line for all of them."""
    rows = _read(path, read_table, missing) or []
    found, errors = [], []
    for row in rows:
        try:
            found.append(make(row))
        except ClsnfError as error:
            errors.append(error)
    if errors:
        missing.append(
            f"{_name(path)}: {len(errors)} of {len(rows)} rows are left out. {errors[0]}"
        )
    return found


def _image(row: Record) -> ImageEvidence:
    return from_plain(ImageEvidence, row, "A row")


def _region(row: Record) -> RegionEvidence:
    return from_plain(RegionEvidence, row, "A row")


def _json(path: Path, missing: list[str]) -> Record:
    """The JSON object in a file; empty, with a line in `missing`, where it can't be read."""

    def read(path: Path) -> Record:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return content

    return _read(path, read, missing) or {}


def _json_lines(path: Path) -> list[Record]:
    """The entries of a file with one JSON object a line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines if line.strip()]
    if not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("a line is no JSON object")
    return entries
