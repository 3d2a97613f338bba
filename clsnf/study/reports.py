"""What a trial reports to Ray Tune: on its way, at its end, or when it failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clsnf.results import Measurements

OBJECTIVE = "objective"  # the name of the objective in a report


@dataclass(frozen=True)
class TrialReport:
    """A report.

    Attributes:
        objective: the value of the first objective; on the way, what the trial would be worth; 0
            where the trial failed.
        step: the epoch at which it was measured; None at the trial's end.
        failure: why the trial failed; None where it did not.
        is_outage: whether it failed because something was away (see
            :mod:`clsnf.core.patience`), so that it may succeed later.
        measured: everything else, at the trial's end.
    """

    objective: float
    step: int | None = None
    failure: str | None = None
    is_outage: bool = False
    measured: Measurements = field(default_factory=Measurements)

    def to_tune(self) -> dict[str, Any]:
        """The report as Tune wants it: one plain value for each name."""
        report = {
            OBJECTIVE: self.objective,
            "step": self.step,
            "failed": self.failure,
            "outage": self.is_outage or None,
        }
        return {k: v for k, v in report.items() if v is not None} | self.measured.flat()

    @classmethod
    def from_tune(cls, result: Mapping[str, Any]) -> TrialReport:
        """The opposite of :meth:`to_tune`; Tune's own entries are left out."""
        return cls(
            objective=result[OBJECTIVE],
            step=result.get("step"),
            failure=result.get("failed"),
            is_outage=result.get("outage", False),
            measured=Measurements.from_flat(result),
        )
