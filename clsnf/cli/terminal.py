"""What the command line shows: lines, progress bars, tables.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from clsnf.cli.study_board import Board
from clsnf.core.uris import join_uri
from clsnf.reporting.formats import metric_name

if TYPE_CHECKING:
    from clsnf.core.config import DetectorSettings, StudySettings
    from clsnf.detector import Detector
    from clsnf.evaluation.predict_files import FilePrediction, UnreadableFile
    from clsnf.reporting.build import ReportFiles
    from clsnf.results import (
        CellResult,
        FrontMember,
        Metrics,
        StudySummary,
        TestResult,
        TrialResult,
        WinnerResult,
    )
    from clsnf.study.progress_notes import ProgressNote
    from clsnf.study.request import Reporter
    from clsnf.training.calibrate import Threshold

# Names of files and categories are shown as they are: "part[a].png" is no markup, and ":bug:" no
# emoji.
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
_QUIET_FOR = 15.0  # seconds between two lines about the same work, where no bars can be drawn
_TEST_METRICS = ("image_auroc", "pixel_ap", "pixel_auroc", "au_pro")


class Terminal:
    """Shows progress as bars on a terminal, and as a line now and then elsewhere (a log, a job)."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, **_PLAIN)
        self._results = Console(**_PLAIN)
        if not self._results.is_terminal:
            self._results = Console(width=150, **_PLAIN)
        self._bars: Progress | None = None
        self._live: Live | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last_line: dict[str, float] = {}  # task -> when a line said how far it is

    def line(self, text: str) -> None:
        """One line for people."""
        self._console.print(text, soft_wrap=True)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Draw progress bars while the block runs."""
        if not self._console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bars = Progress(*columns, console=self._console)
        self._live = Live(self._bars, console=self._console, transient=True, refresh_per_second=4)
        try:
            with self._live:
                yield
        finally:
            self._bars = self._live = None
            self._tasks.clear()

    def progress(self, task: str, done: int, total: int) -> None:
        """A step of long work (see :class:`clsnf.core.progress.Progress`)."""
        if self._bars is None:
            now = time.monotonic()
            if done < total and now - self._last_line.setdefault(task, now) >= _QUIET_FOR:
                self._last_line[task] = now
                self.line(f"{task}: {done} of {total}")
            elif done >= total:
                self._last_line.pop(task, None)
            return
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=total)
        self._bars.update(self._tasks[task], completed=done, total=total)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(task))

    def backbone(self, settings: DetectorSettings) -> None:
        """The pretrained weights that everything rests on."""
        from clsnf.model.weights_files import files_of_models

        if settings.backbone.name == "demo":
            self.line(
                "backbone: demo, pretrained on pictures drawn by code; real products need real "
                "weights (--backbone, --weights)"
            )
        else:
            files = files_of_models(settings.backbone.weights)
            weights = ", ".join(files.values()) or settings.backbone.weights
            self.line(
                f"backbone: {', '.join(files) or settings.backbone.name}, "
                f"{weights or 'pretrained weights from timm'}"
            )

    def reporter(
        self, settings: DetectorSettings, categories: list[str], study: StudySettings
    ) -> Reporter:
        """The callbacks of a study of these categories."""
        from clsnf.study.request import Reporter

        board = Board(categories, study.trials, study.objective, study.total_trials)
        tasks: set[str] = set()

        def earlier(results: list[TrialResult]) -> None:
            board.earlier(results)
            if self._live is not None and self._bars is not None:
                self._live.update(Group(board, self._bars))

        def trial(result: TrialResult) -> None:
            board.trial(result)
            outcome = _outcome(result, board.rows[result.category].best, study.objective)
            self.line(
                f"{board.so_far()} ended: {result.category}, trial "
                f"{result.number}: {_config(result.config)}: {outcome}"
            )

        def notes(found: list[ProgressNote]) -> None:
            now = {f"{note.category}: {note.task}": note for note in found}
            for ended in tasks - set(now):
                self.progress(ended, 1, 1)
            tasks.clear()
            for task, note in now.items():
                tasks.add(task)
                self.progress(task, note.done, note.total)

        return Reporter(
            say=self.line,
            progress=self.progress,
            begin=lambda: self.backbone(settings),
            notes=notes,
            earlier=earlier,
            begun=board.begun,
            trial=trial,
        )

    # ---- results ----

    def summary(self, summary: StudySummary, out: Path | str) -> None:
        """The tables of a finished study, and where its files are: in a folder, or at a URI."""

        def place_of(name: str) -> str:
            return join_uri(out, name) if isinstance(out, str) else str(out / name)

        self._winners(summary)
        self._regrets(summary)
        for category, found in summary.categories.items():
            if found.winner is not None and found.winner.front:
                self._front(category, found.winner.front, place_of(f"front/{category}"))
        self._notes(summary)
        report = f"clsnf report {shlex.quote(str(out))}"
        self._results.print(
            f"{summary.seconds:.0f} s\n"
            f"winners     {place_of('winners')}\n"
            f"pictures    {place_of('examples')}\n"
            f"validation  {place_of('validation')}  (the defects that selection looked at)\n"
            f"metrics     {place_of('summary.json')}, {place_of('trials.parquet')}"
            + ("" if isinstance(out, str) else f"\nreport      {report}"),
            soft_wrap=True,
        )

    def _winners(self, summary: StudySummary) -> None:
        """The table of winners."""
        table = Table(
            title="Winners: chosen on validation defects, then evaluated once on the test images",
            title_justify="left",
        )
        for column in (
            "category",
            "epochs",
            "depth",
            "weight",
            f"{metric_name(summary.study.objective)} on validation defects",
            "threshold",
            "test AUROC",
            "pixel AP",
            "pixel AUROC",
            "AU-PRO",
        ):
            table.add_column(column, justify="left" if column == "category" else "right")
        table.add_column("recall")
        table.add_column("false rejects")
        for category, found in summary.categories.items():
            if found.winner is None:
                cause = found.error or f"{len(found.failed_trials)} trials failed"
                table.add_row(category, "no winner:", cause)
            else:
                table.add_row(category, *_winner_cells(found.winner, summary.study.objectives[0]))
        tested = [metrics for _, metrics in _test_metrics(summary) if metrics]
        if len(tested) > 1:
            means = (_mean(tested, name) for name in _TEST_METRICS)
            table.add_section()
            table.add_row("mean", "", "", "", "", "", *means, "", "")
        self._results.print(table)

    def _regrets(self, summary: StudySummary) -> None:
        """What the choices lose against an oracle that picks on the test images."""
        regrets = {
            category: found.winner.regret
            for category, found in summary.categories.items()
            if found.winner is not None and found.winner.regret is not None
        }
        if not regrets:
            return
        title = (
            "Regret: what an oracle that picks on the test images would have gained (test images "
            "at the network's size)"
        )
        table = Table(title=title, title_justify="left")
        metrics = ("pixel_ap", "image_auroc")
        table.add_column("category")
        for choice in ("its weight", "any trial"):
            for metric in metrics:
                table.add_column(f"by {choice}: {metric}", justify="right")
        for category, regret in regrets.items():
            cells = [
                f"{losses[metric].regret:.4f}" if metric in losses else "-"
                for losses in (regret.fusion_weight, regret.trial)
                for metric in metrics
            ]
            table.add_row(category, *cells)
        self._results.print(table)

    def _front(self, category: str, front: list[FrontMember], place: str) -> None:
        """The Pareto front of a category's trials."""
        table = Table(title=f"{category}: the Pareto front", title_justify="left")
        for column in ("trial", *front[0].objectives, "settings"):
            table.add_column(column)
        for member in front:
            objectives = (
                f"{value:.2f} ms" if name == "latency" else f"{value:.4f}"
                for name, value in member.objectives.items()
            )
            table.add_row(str(member.trial), *objectives, _config(member.config))
        self._results.print(table)
        self._results.print(f"each a detector in {place}", soft_wrap=True)

    def _notes(self, summary: StudySummary) -> None:
        """What a study's results do not say, or do without."""
        winners = [found.winner for found in summary.categories.values()]
        rates = {
            (winner.threshold.supported_rate, winner.threshold.false_reject_rate)
            for winner in winners
            if winner is not None
        }
        too_high = [(supported, asked) for supported, asked in sorted(rates) if supported > asked]
        for supported, asked in too_high[:1]:
            self.line(
                "note: with so few validation normals a threshold can stand for a "
                f"false-reject rate of {supported:.3f} at best, not for {asked:g}"
            )
        for category, metrics in _test_metrics(summary):
            if not metrics:
                self.line(
                    f"note: {category} has no labelled test pictures with defects: test metrics "
                    "are left out"
                )
        for category, found in summary.categories.items():
            if found.skipped:
                count = len(found.skipped)
                self.line(
                    f"note: {category}: {count} unreadable "
                    f"{'picture was' if count == 1 else 'pictures were'} left out"
                )
            for failed in found.failed_trials:
                self.line(f"note: {category}, trial {failed.trial} failed: {failed.cause}")

    def benchmark(self, cells: list[CellResult], out: Path) -> None:
        """The table of a benchmark, and where its files are."""
        from clsnf.benchmark.systems import SYSTEMS
        from clsnf.benchmark.tables import SHOWN, VALIDATION_SHOWN, spread

        tested = any(found.test for cell in cells for found in cell.systems.values())
        if tested:
            title = "Test images: selected on validation defects (an oracle on test images)"
        else:
            title = "Validation defects"
        metrics = SHOWN if tested else VALIDATION_SHOWN
        table = Table(title=f"{title}, in percent; ± over seeds", title_justify="left")
        for column in ("variant", "system", *metrics):
            table.add_column(column)
        for variant in dict.fromkeys(cell.variant for cell in cells):
            of_variant = [cell for cell in cells if cell.variant == variant]
            for system in SYSTEMS:
                values = []
                for metric in metrics:
                    found = spread(
                        of_variant, system, "selected" if tested else "validation", metric
                    )
                    best = spread(of_variant, system, "oracle", metric)
                    oracle = "" if best is None else f" ({100 * best.mean:.2f})"
                    values.append("-" if found is None else f"{found}{oracle}")
                table.add_row(variant, system, *values)
            table.add_section()
        self._results.print(table)
        self._results.print(
            f"tables    {out / 'tables'}\nmetrics   {out / 'results.csv'}\n"
            f"protocol  {out / 'protocol.json'}",
            soft_wrap=True,
        )

    def trained(self, detector: Detector, out: Path) -> None:
        """A new detector: where it is, and its threshold."""
        threshold = detector.threshold
        self._results.print(
            f"saved {out}: threshold {threshold.value:.4f} for a false-reject rate of "
            f"{threshold.supported_rate:.3g} "
            f"({threshold.normals} validation normals, {detector.provenance.fit_images} images "
            "fitted)",
            soft_wrap=True,
        )

    def calibrated(self, detector: Detector, before: Threshold, out: Path) -> None:
        """A new threshold of a saved detector."""
        threshold = detector.threshold
        low, high = threshold.interval
        self._results.print(
            f"saved {out}: threshold {threshold.value:.4f} (was {before.value:.4f}) for a "
            "false-reject rate of "
            f"{threshold.supported_rate:.3g} ({threshold.normals} normals; with 95 % confidence "
            f"between {low:.2g} and {high:.2g})",
            soft_wrap=True,
        )
        if threshold.supported_rate > threshold.false_reject_rate:
            self.line(
                f"note: {threshold.normals} normals can promise no rate below "
                f"{threshold.supported_rate:.3g}, not "
                f"{threshold.false_reject_rate:.3g}: give more with --normals."
            )

    def reported(self, built: ReportFiles) -> None:
        """A study's report: its decisions, and where it is."""
        table = Table()
        for column in ("category", "what to do next"):
            table.add_column(column, overflow="fold")
        for category, decision in built.decisions.items():
            table.add_row(category, decision)
        self._results.print(table)
        for line in built.missing:
            self.line(f"note: {line}")
        self._results.print(f"report  {built.page}\ntables  {built.tables}", soft_wrap=True)

    def compared(self, built: ReportFiles) -> None:
        """A comparison of studies: where it is."""
        for line in built.missing:
            self.line(f"note: {line}")
        self._results.print(f"comparison  {built.page}\ntables      {built.tables}", soft_wrap=True)

    def predictions(self, answers: list[FilePrediction | UnreadableFile], threshold: float) -> None:
        """Scores of pictures."""
        from clsnf.evaluation.predict_files import UnreadableFile

        table = Table(title=f"threshold {threshold:.4f}", title_justify="left")
        for column in ("picture", "score", "p-value", "verdict"):
            table.add_column(
                column,
                justify="right" if column in ("score", "p-value") else "left",
                overflow="fold",
            )
        for answer in answers:
            if isinstance(answer, UnreadableFile):
                self.line(f"warning: left out: {answer.error}")
                continue
            table.add_row(
                answer.path, f"{answer.score:.4f}", f"{answer.p_value:.3f}", answer.verdict
            )
        self._results.print(table)

    def metrics(self, result: TestResult) -> None:
        """The metrics of an evaluation."""
        from clsnf.metrics import METRICS

        table = Table()
        for column in ("metric", "value", "what it is"):
            table.add_column(column)
        for name, value in result.metrics.items():
            table.add_row(name, f"{value:.4f}", METRICS[name].help)
        for name, rate, meaning in (
            ("recall", result.recall, "share of defects above the threshold"),
            ("false_reject_rate", result.false_reject_rate, "share of normals above it"),
        ):
            if rate is not None:
                table.add_row(name, f"{rate:.4f}", meaning)
        self._results.print(table)
        if not result.metrics:
            self.line(
                "note: there are no pictures with defects: metrics that need them are left out"
            )


def _outcome(trial: TrialResult, best: float | None, objective: str) -> str:
    """What a trial came to, in a few words; `best` is the category's best objective so far."""
    if trial.status == "finished":
        name = metric_name(objective)
        return (
            f"{name} on validation defects {trial.objective:.4f} (best {best:.4f}), "
            f"{trial.seconds:.0f} s"
        )
    if trial.status == "stopped":
        return "stopped early: far behind the others"
    return f"failed: {trial.cause}"


def _winner_cells(winner: WinnerResult, objective: str) -> list[str]:
    """A winner's cells in the table of winners."""
    settings, test = winner.settings, winner.test
    metrics = test.metrics if test is not None else {}
    return [
        str(settings.finetune.joint_epochs),
        str(settings.flow.depth),
        f"{settings.fusion_weight:.2f}",
        f"{winner.validation.metrics[objective]:.3f}",
        f"{winner.threshold.value:.3f}",
        *(f"{metrics[name]:.4f}" if name in metrics else "-" for name in _TEST_METRICS),
        _share(test.recall if test is not None else None),
        _share(test.false_reject_rate if test is not None else None),
    ]


def _test_metrics(summary: StudySummary) -> list[tuple[str, Metrics]]:
    """Each category with a winner, and its test metrics; empty ones without labelled defects."""
    return [
        (category, found.winner.test.metrics if found.winner.test is not None else {})
        for category, found in summary.categories.items()
        if found.winner is not None
    ]


def _config(config: dict[str, Any]) -> str:
    from clsnf.study.names import spread

    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in spread(config).items()
    )


def _mean(rows: list[Metrics], name: str) -> str:
    values = [row[name] for row in rows if name in row]
    return f"{sum(values) / len(values):.4f}" if values else "-"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
