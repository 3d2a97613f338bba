"""The live table of a study: how far each category is, its best value so far, what was shared, how
long it may take yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from clsnf.study.stream_totals import STEPS, streamed

_MOST_ROWS = 20


@dataclass
class Row:
    """A category's part.

    Attributes:
        ended, running, failed: numbers of trials; those that were stopped early ended.
        best: objective so far, None before the first.
        reused, computed: stages.
        stream: what the trials say of their streams.
    """

    ended: int = 0
    running: int = 0
    failed: int = 0
    best: float | None = None
    reused: int = 0
    computed: int = 0
    stream: list[dict[str, Any]] = field(default_factory=list)


class Board:
    """Counts what a study tells.

    Args:
        categories: their names.
        trials: of each category.
        clock: seconds that only rise.

    Attributes:
        rows: category -> counts.
    """

    def __init__(
        self, categories: Sequence[str], trials: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rows = {category: Row() for category in categories}
        self.trials, self._clock = trials, clock
        self._started, self._before = clock(), 0

    def earlier(self, records: Sequence[dict[str, Any]]) -> None:
        """Trials that ended before this run."""
        for record in records:
            self._count(record)
        self._before = self.ended

    def begun(self, category: str) -> None:
        """A trial began."""
        self.rows[category].running += 1

    def trial(self, record: dict[str, Any]) -> None:
        """A trial ended."""
        self.rows[record["category"]].running -= 1
        self._count(record)

    def _count(self, record: dict[str, Any]) -> None:
        row = self.rows[record["category"]]
        row.ended += 1
        row.failed += record["status"] == "failed"
        row.reused += record["figures"].get("stages_reused") or 0
        row.computed += record["figures"].get("stages_computed") or 0
        row.stream.append(
            {"figures": {k: v for k, v in record["figures"].items() if k.startswith("stream_")}}
        )
        if record["objective"] is not None:
            row.best = (
                record["objective"] if row.best is None else max(row.best, record["objective"])
            )

    @property
    def ended(self) -> int:
        return sum(row.ended for row in self.rows.values())

    @property
    def total(self) -> int:
        return self.trials * len(self.rows)

    def seconds_to_go(self) -> float | None:
        """At the pace so far, None before a trial ended. Later trials find more to share: it is an
        upper bound, mostly.
        """
        done = self.ended - self._before
        return (self._clock() - self._started) / done * (self.total - self.ended) if done else None

    def __rich__(self) -> Table:
        to_go = self.seconds_to_go()
        title = f"{self.ended} of {self.total} trials" + (
            "" if to_go is None else f", at most {_duration(to_go)} to go"
        )
        table = Table(title=title, title_justify="left", title_style="bold")
        for column in (
            "category",
            "trials",
            "running",
            "failed",
            "best",
            "stages reused",
            "images/s read, decoded, defects",
            "waited for data",
        ):
            table.add_column(column, justify="left" if column == "category" else "right")
        # Those that something happens in, where there are too many to show.
        shown = sorted(self.rows.items(), key=lambda item: (-item[1].running, item[1].ended))[
            :_MOST_ROWS
        ]
        for category, row in sorted(shown) if len(shown) == len(self.rows) else shown:
            stages = row.reused + row.computed
            table.add_row(
                category.replace("[", "\\["),
                f"{row.ended}/{self.trials}",
                str(row.running),
                str(row.failed),
                "-" if row.best is None else f"{row.best:.4f}",
                f"{row.reused} of {stages}",
                *_stream(row.stream),
            )
        if len(self.rows) > _MOST_ROWS:
            table.add_row(f"and {len(self.rows) - _MOST_ROWS} more", *[""] * 7)
        return table


def _stream(records: list[dict[str, Any]]) -> tuple[str, str]:
    """A worker's images a second at each step, and how long training waited for data."""
    found = streamed(records)
    pace = [
        f"{found['images_per_second'][step]:.0f}" if step in found["images_per_second"] else "-"
        for step in STEPS
    ]
    return ", ".join(pace), f"{found['waited_seconds']:.1f} s"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{round(seconds)} s"
        if seconds < 90
        else f"{minutes} min"
        if minutes < 90
        else f"{minutes / 60:.1f} h"
    )
