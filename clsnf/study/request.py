"""What a user asks a study for, and where the study reports its progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from clsnf.core.config import DetectorSettings, StudySettings
from clsnf.core.progress import Progress, silent
from clsnf.core.uris import has_secret, is_uri, uri_name
from clsnf.data.checks import MAX_BAD
from clsnf.results import DataSource, StoredRequest, StudySummary, TrialResult, WinnerResult
from clsnf.study.progress_notes import ProgressNote
from clsnf.study.space import Space


@dataclass(frozen=True)
class StudyRequest:
    """What a user asks for.

    Attributes:
        tables: one table for each category, as the layout's reader gave it.
        out: the study's folder, or the URI of one on any file system that pyarrow knows.
        settings: what every trial starts from.
        study: how to search.
        space: what to search.
        textures: folder of pictures to make training defects from; None for textures drawn by code.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        address: of a Ray cluster; None for a private one.
        allow_leak: go on where training and test images are the same.
        max_bad: share of a category's images that may be unreadable.
        resume: go on with the study in `out`.
        optuna_storage: a file or URL for the Optuna studies; None for a journal in `out`.
        warm_start: folder of an earlier study, whose best points are tried first.
        mlflow: URI of an MLflow server or database that gets the trials too.
        wandb: Weights & Biases project that gets the trials too: PROJECT or ENTITY/PROJECT.
        notify: URL that is told by a POST when the study ends.
        until: when the study ends, in seconds since the epoch; None: not by the clock.
        sources: where the data came from, for the summary and ``--resume``.
    """

    tables: Sequence[pa.Table]
    out: Path | str
    settings: DetectorSettings
    study: StudySettings
    space: Space
    textures: Path | None = None
    device: str = "auto"
    address: str | None = None
    allow_leak: bool = False
    max_bad: float = MAX_BAD
    resume: bool = False
    optuna_storage: str | None = None
    warm_start: Path | None = None
    until: float | None = None
    mlflow: str | None = None
    wandb: str | None = None
    notify: str | None = None
    sources: Sequence[DataSource] = ()

    @property
    def name(self) -> str:
        """The study's name: that of its folder."""
        return uri_name(self.out) if isinstance(self.out, str) else self.out.absolute().name

    @property
    def categories(self) -> list[str]:
        """Names of the categories, in the tables' order."""
        return [category_of(table) for table in self.tables]

    @property
    def origin(self) -> str:
        """Where the data came from, for people."""
        return ", ".join(source.location for source in self.sources)

    def stored(self) -> StoredRequest:
        """What ``--resume`` repeats."""
        return StoredRequest(
            sources=list(self.sources),
            settings=self.settings,
            study=self.study,
            space={name: dict(given) for name, given in self.space.ranges.items()},
            textures=_absolute(self.textures),
            device=self.device,
            address=self.address,
            allow_leak=self.allow_leak,
            max_bad=self.max_bad,
            optuna_storage=_absolute(self.optuna_storage),
            warm_start=_absolute(self.warm_start),
            mlflow=None if has_secret(self.mlflow or "") else self.mlflow,
            wandb=self.wandb,
            notify=None if has_secret(self.notify or "") else self.notify,
            withheld=[
                name
                for name in ("optuna_storage", "mlflow", "notify")
                if has_secret(getattr(self, name) or "")
            ],
        )


def _absolute(place: Path | str | None) -> str | None:
    """A path as an absolute one, a URI as it is; None for one with a password."""
    if place is None or has_secret(str(place)):
        return None
    return str(place) if is_uri(place) else str(Path(place).absolute())


def category_of(table: pa.Table) -> str:
    """The category of a table's images."""
    return str(table["category"][0].as_py())


@dataclass
class Reporter:
    """Where a study reports what it does; the command line fills this in.

    Attributes:
        say: gets one line for people.
        progress: gets the steps of the driver's own work.
        begin: called when all input was checked and the long work begins.
        notes: gets what the workers are doing, about once a second.
        earlier: gets the trials that ended before this run.
        begun: gets the category of a trial that begins.
        trial: gets a trial that ended.
        winner: gets a category's winner, whose files are in the study's folder.
        ended: gets the summary, when it is written.
    """

    say: Callable[[str], None] = lambda line: None
    progress: Progress = silent
    begin: Callable[[], None] = lambda: None
    notes: Callable[[list[ProgressNote]], None] = lambda notes: None
    earlier: Callable[[list[TrialResult]], None] = lambda trials: None
    begun: Callable[[str], None] = lambda category: None
    trial: Callable[[TrialResult], None] = lambda trial: None
    winner: Callable[[str, WinnerResult], None] = lambda category, winner: None
    ended: Callable[[StudySummary], None] = lambda summary: None
