"""The live table of a study: trials, best objective, shared artifacts, and the time to go."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.table import Table

from clsnf.core.durations import duration
from clsnf.reporting.formats import metric_name
from clsnf.results import TrialResult
from clsnf.study.stream_totals import STEPS, stream_totals

_MOST_ROWS = 20


@dataclass
class Row:
    """A category's row.

    Attributes:
        begun: number of trials that began in this run.
        earlier: number of trials that ended before it.
        results: number of a trial -> its result, of all that ended.
    """

    begun: int = 0
    earlier: int = 0
    results: dict[int, TrialResult] = field(default_factory=dict)

    @property
    def ended(self) -> int:
        """Number of trials that ended; failed and stopped trials are among them."""
        return len(self.results)

    @property
    def running(self) -> int:
        return self.begun - (self.ended - self.earlier)

    @property
    def failed(self) -> int:
        return sum(result.status == "failed" for result in self.results.values())

    @property
    def best(self) -> float | None:
        """The highest objective; None before the first."""
        values = [r.objective for r in self.results.values() if r.objective is not None]
        return max(values, default=None)

    @property
    def reused(self) -> int:
        """Number of artifacts."""
        return sum(r.measured.artifacts_reused or 0 for r in self.results.values())

    @property
    def computed(self) -> int:
        """Number of artifacts."""
        return sum(r.measured.artifacts_computed or 0 for r in self.results.values())


class Board:
    """Counts the trials of a study.

    Args:
        categories: their names.
        trials: number of trials of each category; None where no such number limits them.
        objective: the first objective's name.
        total_trials: number of trials of all categories; 0 where no such number limits them.
        clock: returns seconds, as :func:`time.monotonic` does.

    Attributes:
        rows: category -> counts.
    """

    def __init__(
        self,
        categories: Sequence[str],
        trials: int | None,
        objective: str,
        total_trials: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rows = {category: Row() for category in categories}
        self.trials, self._total_trials, self._clock = trials, total_trials, clock
        self._objective = objective
        self._started, self._before = clock(), 0

    def earlier(self, results: Sequence[TrialResult]) -> None:
        """Trials that ended before this run."""
        for result in results:
            self.trial(result)
        for row in self.rows.values():
            row.earlier = row.ended
        self._before = self.ended

    def begun(self, category: str) -> None:
        """A trial began."""
        self.rows[category].begun += 1

    def trial(self, result: TrialResult) -> None:
        """A trial ended; to hear of the same trial twice changes nothing."""
        self.rows[result.category].results[result.number] = result

    @property
    def ended(self) -> int:
        return sum(row.ended for row in self.rows.values())

    @property
    def total(self) -> int | None:
        """The most trials that there can be; None where no number limits them."""
        limits = [self._total_trials] if self._total_trials else []
        if self.trials is not None:
            limits.append(self.trials * len(self.rows))
        return min(limits, default=None)

    def so_far(self) -> str:
        """How many trials ended, for people."""
        if self.total is None:
            return f"{self.ended} {'trial' if self.ended == 1 else 'trials'}"
        return f"{self.ended} of {self.total} trials"

    def seconds_to_go(self) -> float | None:
        """Seconds to go at the pace so far; None before a trial ended, or without a limit.

        Later trials find more artifacts to reuse, so this is mostly an upper bound.
        """
        done, total = self.ended - self._before, self.total
        if not done or total is None:
            return None
        return (self._clock() - self._started) / done * (total - self.ended)

    def __rich__(self) -> Table:
        to_go = self.seconds_to_go()
        title = self.so_far() + ("" if to_go is None else f", at most {duration(to_go)} to go")
        table = Table(title=title, title_justify="left", title_style="bold")
        for column in (
            "category",
            "trials",
            "running",
            "failed",
            f"best {metric_name(self._objective)} on validation defects",
            "artifacts reused",
            "images/s read, decoded, defects",
            "waited for data",
        ):
            table.add_column(column, justify="left" if column == "category" else "right")
        # Categories with running trials come first where there are too many to show.
        shown = sorted(self.rows.items(), key=lambda item: (-item[1].running, item[1].ended))[
            :_MOST_ROWS
        ]
        for category, row in sorted(shown) if len(shown) == len(self.rows) else shown:
            artifacts = row.reused + row.computed
            table.add_row(
                category.replace("[", "\\["),
                f"{row.ended}" if self.trials is None else f"{row.ended}/{self.trials}",
                str(row.running),
                str(row.failed),
                "-" if row.best is None else f"{row.best:.4f}",
                f"{row.reused} of {artifacts}",
                *_stream_cells(list(row.results.values())),
            )
        if len(self.rows) > _MOST_ROWS:
            table.add_row(f"and {len(self.rows) - _MOST_ROWS} more", *[""] * 7)
        return table


def _stream_cells(results: Sequence[TrialResult]) -> tuple[str, str]:
    """A worker's images a second at each step, and how long training waited for images."""
    totals = stream_totals(results)
    rates = totals.images_per_second
    steps = [f"{rates[step]:.0f}" if step in rates else "-" for step in STEPS]
    return ", ".join(steps), f"{totals.waited_seconds:.1f} s"
