"""What streams did in a study, for its summary and its table: sums over the trials."""

from __future__ import annotations

from collections.abc import Iterable

from clsnf.results import StreamTotals, TrialResult

STEPS = ("read", "decode", "defects")


def stream_totals(trials: Iterable[TrialResult]) -> StreamTotals:
    """What the trials' streams did, added up."""
    sums: dict[str, float] = {}
    for trial in trials:
        for name, value in trial.measured.stream.items():
            sums[name] = sums.get(name, 0) + value
    rates = {
        step: sums[f"{step}_images"] / sums[f"{step}_seconds"]
        for step in STEPS
        if sums.get(f"{step}_seconds")
    }
    return StreamTotals(int(sums.get("images", 0)), sums.get("waited", 0.0), rates)
