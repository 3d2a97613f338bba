"""Trials of a searcher that overlap, as Tune would run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from clsnf.study.search import PerCategorySearch


def run_overlapping(
    search: PerCategorySearch,
    result: Callable[[dict[str, Any]], dict[str, Any]],
    at_once: int,
    order: Sequence[int],
) -> list[dict[str, Any]]:
    """Run trials until the searcher has no more; their configs, as they were begun.

    Args:
        search: suggests them.
        result: what a trial with a config reports to Tune.
        at_once: number of trials at the same time.
        order: which of the running trials ends next; the first where it is used up.
    """
    running: dict[str, dict[str, Any]] = {}
    seen: list[dict[str, Any]] = []
    ends = iter([*order, *[0] * 100])
    for number in range(100):
        config = search.suggest(f"t{number}") if len(running) < at_once else None
        if isinstance(config, dict):
            running[f"t{number}"] = config
            seen.append(config)
        elif running:
            name = list(running)[next(ends) % len(running)]
            search.on_trial_complete(name, result(running.pop(name)))
        else:
            break
    return seen
