"""A study as its folder tells it: read whole where it ended, in part where it did not.

Unusual: nothing that is missing or damaged ends a report. It becomes a line in ``missing``, which
    the report shows; only a folder that
holds no study at all is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from clsnf.core.errors import OutputError
from clsnf.reporting.journal import trials_of_journal

Record = dict[str, Any]


@dataclass(frozen=True)
class Product:
    """A category of a study.

    Attributes:
        name: as the user's folder has it: any text.
        result: its part of ``summary.json``; empty where it was not finished.
        trials: records with ``trial``, ``status``, ``cause``, ``objective``, ``seconds``,
            ``wall_seconds``, ``config/*`` and figures.
        images, regions: rows of its evidence; empty where there is none.
        facts: its evidence's facts; empty where there are none.
        pictures: folder of its evidence's pictures.
        provenance: of the saved winner.
    """

    name: str
    result: Record = field(default_factory=dict)
    trials: list[Record] = field(default_factory=list)
    images: list[Record] = field(default_factory=list)
    regions: list[Record] = field(default_factory=list)
    facts: Record = field(default_factory=dict)
    pictures: Path = Path()
    provenance: Record = field(default_factory=dict)

    @property
    def finished_trials(self) -> list[Record]:
        """Those that ended with an objective."""
        return [trial for trial in self.trials if trial.get("status") == "finished"]

    @property
    def parameters(self) -> list[str]:
        """Names of what was searched."""
        return list(
            dict.fromkeys(
                n.removeprefix("config/") for t in self.trials for n in t if n.startswith("config/")
            )
        )

    @property
    def figures(self) -> dict[str, float]:
        """The winner's test figures; empty without labelled defects."""
        return dict((self.result.get("test") or {}).get("figures") or {})

    @property
    def evidence(self) -> Record:
        """Intervals and the baseline, where the study left them."""
        return dict(self.result.get("evidence") or {})

    @property
    def baseline(self) -> Record:
        """The baseline's part of :attr:`evidence`; empty without."""
        return dict(self.evidence.get("baseline") or {})


@dataclass(frozen=True)
class StudyFiles:
    """A study.

    Attributes:
        folder: where it lies.
        summary: ``summary.json`` without its categories; of an unfinished study what ``study.json``
            has of it.
        finished: whether it came to its end.
        products: its categories, by name.
        ledger: entries of ``ledger.jsonl``.
        missing: lines for people: what the report had to do without.
    """

    folder: Path
    summary: Record
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
        return str((self.objectives or ["pixel_ap"])[0])

    @property
    def objectives(self) -> list[str]:
        study = self.summary.get("study") or {}
        return list(study.get("objectives") or self.summary.get("objectives") or ["pixel_ap"])

    @property
    def space(self) -> dict[str, Record]:
        """What was searched: name -> range, as in the space's file."""
        return dict(self.summary.get("space") or {})


def read_study(folder: Path) -> StudyFiles:
    """Read what a study left.

    Raises:
        OutputError: the folder holds no study.
    """
    folder = folder.absolute()
    if not any((folder / name).is_file() for name in ("summary.json", "study.json")):
        raise OutputError(
            f"{folder} holds no study (no summary.json or study.json in it): give the folder that "
            "a study wrote."
        )
    missing: list[str] = []
    begun = _read(folder / "study.json", _json, {}, missing)
    finished = (folder / "summary.json").is_file()
    summary = _read(folder / "summary.json", _json, {}, missing) if finished else {}
    finished = bool(summary)
    if not finished:
        missing.append(
            "The study has not come to its end: categories without a winner are shown as far as "
            "they came."
        )
    results = dict(summary.get("categories") or {})
    trials = _trials(folder, finished, str(begun.get("studies") or ""), missing)
    names = dict.fromkeys(
        [*results, *(begun.get("data") or {}), *(str(t["category"]) for t in trials)]
    )
    products = [
        _product(folder, name, results.get(name), trials, missing) for name in sorted(names)
    ]
    kept = {key: value for key, value in (begun | summary).items() if key != "categories"}
    ledger = (
        _read(folder / "ledger.jsonl", _json_lines, [], missing)
        if (folder / "ledger.jsonl").is_file()
        else []
    )
    return StudyFiles(folder, kept, finished, products, ledger, missing)


def _trials(folder: Path, finished: bool, prefix: str, missing: list[str]) -> list[Record]:
    table = folder / "trials.parquet"
    if finished and table.is_file():
        return _read(table, _rows, [], missing)
    if (folder / "optuna.journal").is_file():  # newer than the table of a study that goes on
        return _read(folder / "optuna.journal", trials_of_journal, [], missing)
    if table.is_file():
        return _read(table, _rows, [], missing)
    missing.append(
        "The trials of the study lie in another Optuna storage, and trials.parquet is not written "
        "yet: no trial is shown."
        if prefix
        else "There are neither trials.parquet nor optuna.journal: no trial is shown."
    )
    return []


def _product(
    folder: Path, name: str, result: Record | None, trials: list[Record], missing: list[str]
) -> Product:
    own = [trial for trial in trials if trial["category"] == name]
    if (
        Path(name).name != name
    ):  # a category is a folder's name: whoever wrote this wants files from elsewhere shown
        missing.append(f"{name} is no name of a category: its files are left out.")
        return Product(name, result or {}, own)
    if result is None:
        kept = folder / "finished" / f"{name}.json"
        result = _read(kept, _json, {}, missing).get("result", {}) if kept.is_file() else {}
    evidence = folder / "evidence" / name
    whole = (evidence / "facts.json").is_file()
    if result.get("error"):
        missing.append(f"{name}: no winner, because {result['error']}")
    elif "winner" not in result:
        ended = sum(trial.get("status") == "finished" for trial in own)
        missing.append(f"{name}: no winner yet ({ended} of its trials finished).")
    elif not whole:
        missing.append(
            f"{name}: the study left no evidence (it is of an earlier version, or the folder was "
            "not copied whole): pictures, score "
            "distributions, the baseline and learning curves are left out."
        )
    if "winner" in result and result.get("test") is None:
        missing.append(f"{name}: no test pictures, so no test figures.")
    elif "winner" in result and not (result.get("test") or {}).get("figures"):
        missing.append(f"{name}: no test pictures with defects, so no test figures.")
    for failed in result.get("failed_trials") or []:
        missing.append(f"{name}: trial {failed.get('trial')} failed: {failed.get('cause')}")
    detector = folder / "winners" / name / "detector.json"
    provenance = (
        _read(detector, _json, {}, missing).get("provenance", {}) if detector.is_file() else {}
    )
    if not whole:
        return Product(name, result, own, provenance=provenance)
    return Product(
        name,
        result,
        own,
        _read(evidence / "images.parquet", _rows, [], missing),
        _read(evidence / "regions.parquet", _rows, [], missing),
        _read(evidence / "facts.json", _json, {}, missing),
        evidence / "pictures",
        provenance,
    )


def _read(path: Path, how: Callable[[Path], Any], otherwise: Any, missing: list[str]) -> Any:
    """What a file holds, or `otherwise` and a line in `missing`: others wrote it, and a report is
    no place to fall over it.
    """
    try:
        return how(path)
    except Exception as error:  # a damaged file makes every library raise its own
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        missing.append(f"{path.name} of {path.parent.name} can't be read ({line}).")
        return otherwise


def _json(path: Path) -> Record:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content


def _json_lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _rows(path: Path) -> list[Record]:
    rows: list[Record] = pq.read_table(path).to_pylist()
    return rows
