"""What the command line shows: lines, progress bars, tables. Results go to standard output,
everything else to standard error.
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

if TYPE_CHECKING:
    from clsnf.benchmark.tables import Cell
    from clsnf.core.config import DetectorSettings
    from clsnf.detector import Detector
    from clsnf.reporting.build import Built
    from clsnf.results import TestResult
    from clsnf.study.run import Reporter
    from clsnf.training.calibrate import Threshold

# Names of files and categories are shown as they are: "part[a].png" is no markup, ":bug:" no
# picture of one.
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
_QUIET_FOR = (
    15.0  # seconds between lines about the same work where there is no terminal to draw a bar on
)


class Terminal:
    """Draws bars on a terminal, and writes a line now and then where there is none (a log, a
    cluster job).
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True, **_PLAIN)
        self._results = Console(**_PLAIN)
        if not self._results.is_terminal:
            self._results = Console(width=150, **_PLAIN)
        self._bars: Progress | None = None
        self._live: Live | None = None
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, float] = {}

    def line(self, text: str) -> None:
        """One line for people."""
        self._console.print(text, soft_wrap=True)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Draw progress bars for the length of the block."""
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
            if done < total and now - self._told.setdefault(task, now) >= _QUIET_FOR:
                self._told[task] = now
                self.line(f"{task}: {done} of {total}")
            elif done >= total:
                self._told.pop(task, None)
            return
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=total)
        self._bars.update(self._tasks[task], completed=done, total=total)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(task))

    def backbone(self, settings: DetectorSettings) -> None:
        """Which pretrained weights everything rests on."""
        if settings.backbone.name == "demo":
            self.line(
                "backbone: demo, pretrained on pictures drawn by code; real products want real "
                "weights (--backbone, --weights)"
            )
        else:
            self.line(
                f"backbone: {settings.backbone.name}, "
                f"{settings.backbone.weights or 'pretrained weights from timm'}"
            )

    def reporter(self, settings: DetectorSettings, categories: list[str], trials: int) -> Reporter:
        """What a study of these categories, with so many trials each, tells its steps to."""
        from clsnf.study.run import Reporter

        board = Board(categories, trials)
        shown: set[str] = set()

        def earlier(records: list[dict[str, Any]]) -> None:
            board.earlier(records)
            if self._live is not None and self._bars is not None:
                self._live.update(Group(board, self._bars))

        def trial(record: dict[str, Any]) -> None:
            category = record["category"]
            board.trial(record)
            values = ", ".join(f"{k} {_number(v)}" for k, v in record["config"].items())
            if record["status"] == "finished":
                outcome = (
                    f"{record['objective']:.4f} (best {board.rows[category].best:.4f}), "
                    f"{record['seconds']:.0f} s"
                )
            elif record["status"] == "stopped":
                outcome = "stopped on its way: far behind the others"
            else:
                outcome = f"failed: {record['cause']}"
            self.line(f"trial {board.ended}/{board.total}  {category}: {values}: {outcome}")

        def notes(found: list[dict[str, object]]) -> None:
            now = {f"{note['category']}: {note['task']}": note for note in found}
            for gone in shown - set(now):
                self.progress(gone, 1, 1)
            shown.clear()
            for task, note in now.items():
                shown.add(task)
                self.progress(task, int(str(note["done"])), int(str(note["total"])))

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

    def summary(self, summary: dict[str, Any], out: Path | str) -> None:
        """The table of a finished study, and where everything lies: in a folder, or at a URI."""

        def place_of(name: str) -> str:
            return join_uri(out, name) if isinstance(out, str) else str(out / name)

        table = Table(
            title="Winners: chosen on validation defects, then evaluated once on the test images",
            title_justify="left",
        )
        for column in (
            "category",
            "epochs",
            "depth",
            "weight",
            "validation",
            "threshold",
            "test AUROC",
            "pixel AP",
            "pixel AUROC",
            "AU-PRO",
        ):
            table.add_column(column, justify="left" if column == "category" else "right")
        table.add_column("recall")
        table.add_column("false rejects")
        untested, sums = [], []
        for category, found in summary["categories"].items():
            if "winner" not in found:
                table.add_row(
                    category,
                    "no winner:",
                    found.get("error") or f"{len(found['failed_trials'])} trials failed",
                )
                continue
            settings, test = found["settings"], found["test"]
            figures = (test or {}).get("figures", {})
            if not figures:
                untested.append(category)
            else:
                sums.append(figures)
            table.add_row(
                category,
                str(settings["finetune"]["joint_epochs"]),
                str(settings["flow"]["depth"]),
                f"{settings['fusion_weight']:.2f}",
                f"{found['validation'][summary['study']['objectives'][0]]:.3f}",
                f"{found['threshold']['value']:.3f}",
                *(
                    _figure(figures, name)
                    for name in ("image_auroc", "pixel_ap", "pixel_auroc", "au_pro")
                ),
                _share(test, "recall"),
                _share(test, "false_reject_rate"),
            )
        if len(sums) > 1:
            means = (
                _mean(sums, name) for name in ("image_auroc", "pixel_ap", "pixel_auroc", "au_pro")
            )
            table.add_section()
            table.add_row("mean", "", "", "", "", "", *means, "", "")
        self._results.print(table)
        self._regrets(summary)
        for category, found in summary["categories"].items():
            if found.get("front"):
                self._front(category, found["front"], place_of(f"front/{category}"))
        thresholds = [
            found["threshold"] for found in summary["categories"].values() if "winner" in found
        ]
        for limit in sorted({(t["supported_rate"], t["false_reject_rate"]) for t in thresholds}):
            if limit[0] > limit[1]:
                self.line(
                    "note: with so few validation normals a threshold can stand for a "
                    f"false-reject rate of {limit[0]:.3f} at best, "
                    f"not for {limit[1]:g}"
                )
                break
        for category in untested:
            self.line(
                f"note: {category} has no labelled test pictures with defects: test figures are "
                "left out"
            )
        for category, found in summary["categories"].items():
            if found.get("skipped"):
                count = len(found["skipped"])
                self.line(
                    f"note: {category}: {count} unreadable "
                    f"{'picture was' if count == 1 else 'pictures were'} left out"
                )
            for failed in found["failed_trials"]:
                self.line(f"note: {category}, trial {failed['trial']} failed: {failed['cause']}")
        self._results.print(
            f"{summary['seconds']:.0f} s\n"
            f"winners     {place_of('winners')}\n"
            f"pictures    {place_of('examples')}\n"
            f"validation  {place_of('validation')}  (the defects that selection looked at)\n"
            f"figures     {place_of('summary.json')}, {place_of('trials.parquet')}"
            + (
                ""
                if isinstance(out, str)
                else f"\nreport      clsnf report {shlex.quote(str(out))}"
            ),
            soft_wrap=True,
        )

    def _regrets(self, summary: dict[str, Any]) -> None:
        """What the choices lose against an oracle that picks on the test images."""
        found = {name: c["regret"] for name, c in summary["categories"].items() if c.get("regret")}
        if not found:
            return
        title = (
            "Regret: what an oracle that picks on the test images would have gained (test images "
            "at the network's size)"
        )
        table = Table(title=title, title_justify="left")
        table.add_column("category")
        shown = [
            (choice, figure)
            for choice in ("fusion_weight", "trial")
            for figure in ("pixel_ap", "image_auroc")
        ]
        for choice, figure in shown:
            table.add_column(
                f"by {'its weight' if choice == 'fusion_weight' else 'any trial'}: {figure}",
                justify="right",
            )
        for category, regret in found.items():
            table.add_row(
                category,
                *(f"{regret[c][f]['regret']:.4f}" if f in regret[c] else "-" for c, f in shown),
            )
        self._results.print(table)

    def _front(self, category: str, front: list[dict[str, Any]], place: str) -> None:
        """The trials of a category that no other one beats in all objectives."""
        table = Table(title=f"{category}: the Pareto front", title_justify="left")
        for column in ("trial", *front[0]["objectives"], "settings"):
            table.add_column(column)
        for found in front:
            values = ", ".join(f"{k} {_number(v)}" for k, v in found["config"].items())
            objectives = (
                f"{v:.2f} ms" if k == "latency" else f"{v:.4f}"
                for k, v in found["objectives"].items()
            )
            table.add_row(str(found["trial"]), *objectives, values)
        self._results.print(table)
        self._results.print(f"each a detector in {place}", soft_wrap=True)

    def benchmark(self, cells: list[Cell], out: Path) -> None:
        """What a benchmark came to, and where everything lies."""
        from clsnf.benchmark.systems import SYSTEMS
        from clsnf.benchmark.tables import SHOWN, spread

        shown = ("pixel_ap", "image_auroc", "au_pro")
        judged = any(found["test"] for cell in cells for found in cell.systems.values())
        title = (
            "Test images: selected on validation defects (an oracle on test images)"
            if judged
            else "Validation defects"
        )
        table = Table(title=f"{title}, in percent; ± over seeds", title_justify="left")
        for column in ("variant", "system", *(SHOWN if judged else shown)):
            table.add_column(column)
        for variant in dict.fromkeys(cell.variant for cell in cells):
            of_variant = [cell for cell in cells if cell.variant == variant]
            for system in SYSTEMS:
                values = []
                for figure in SHOWN if judged else shown:
                    found = spread(
                        of_variant, system, "selected" if judged else "validation", figure
                    )
                    best = spread(of_variant, system, "oracle", figure)
                    values.append(
                        "-"
                        if found is None
                        else str(found) + ("" if best is None else f" ({100 * best.mean:.2f})")
                    )
                table.add_row(variant, system, *values)
            table.add_section()
        self._results.print(table)
        self._results.print(
            f"tables    {out / 'tables'}\nfigures   {out / 'results.csv'}\nprotocol  "
            f"{out / 'protocol.json'}",
            soft_wrap=True,
        )

    def trained(self, detector: Detector, out: Path) -> None:
        """A freshly trained detector."""
        threshold = detector.threshold
        self._results.print(
            f"saved {out}: threshold {threshold.value:.4f} for a false-reject rate of "
            f"{threshold.supported_rate:.3g} "
            f"({threshold.normals} validation normals, {detector.provenance.fit_images} images "
            "fitted)",
            soft_wrap=True,
        )

    def calibrated(self, detector: Detector, before: Threshold, out: Path) -> None:
        """A threshold that was taken anew."""
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

    def reported(self, built: Built) -> None:
        """A study's report: its decisions, and where it lies."""
        table = Table()
        for column in ("category", "what to do next"):
            table.add_column(column, overflow="fold")
        for category, decision in built.decisions.items():
            table.add_row(category, decision)
        self._results.print(table)
        for line in built.missing:
            self.line(f"note: {line}")
        self._results.print(f"report  {built.page}\ntables  {built.tables}", soft_wrap=True)

    def compared(self, built: Built) -> None:
        """A comparison of studies."""
        for line in built.missing:
            self.line(f"note: {line}")
        self._results.print(f"comparison  {built.page}\ntables      {built.tables}", soft_wrap=True)

    def predictions(self, records: list[dict[str, Any]], threshold: float) -> None:
        """Scores of pictures."""
        table = Table(title=f"threshold {threshold:.4f}", title_justify="left")
        for column in ("picture", "score", "p-value", "verdict"):
            table.add_column(
                column,
                justify="right" if column in ("score", "p-value") else "left",
                overflow="fold",
            )
        for record in records:
            if "error" in record:
                self.line(f"warning: left out: {record['error']}")
                continue
            table.add_row(
                record["path"],
                f"{record['score']:.4f}",
                f"{record['p_value']:.3f}",
                record["verdict"],
            )
        self._results.print(table)

    def figures(self, result: TestResult) -> None:
        """Metrics of an evaluation."""
        from clsnf.metrics import METRICS

        table = Table()
        for column in ("figure", "value", "what it is"):
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
                "note: there are no pictures with defects: figures that need them are left out"
            )


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _figure(figures: dict[str, float], name: str) -> str:
    return f"{figures[name]:.4f}" if name in figures else "-"


def _mean(rows: list[dict[str, float]], name: str) -> str:
    values = [row[name] for row in rows if name in row]
    return f"{sum(values) / len(values):.4f}" if values else "-"


def _share(test: dict[str, Any] | None, name: str) -> str:
    value = None if test is None else test[name]
    return "-" if value is None else f"{100 * value:.0f} %"
