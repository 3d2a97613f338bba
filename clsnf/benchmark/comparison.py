"""Metrics of the systems on the test images, after everything was chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from clsnf.benchmark.selection import Selection
from clsnf.benchmark.systems import METHOD, SYSTEMS, Candidate, ComponentMaps
from clsnf.core.config import DetectorSettings
from clsnf.core.progress import Progress
from clsnf.evaluation.compare import Comparison, ReplicatedMetrics
from clsnf.metrics import METRICS
from clsnf.results import Metrics, SystemTest

# The oracle is asked for these only: the others would cost as much again and say the same.
ORACLE_METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "au_pro")


def compare_systems(
    selections: Mapping[str, Selection],
    maps: ComponentMaps,
    rows: list[dict[str, Any]],
    settings: DetectorSettings,
    progress: Progress,
) -> dict[str, SystemTest]:
    """Metrics of the selected, the last and the oracle's candidate of each system.

    Args:
        selections: name of a system -> what validation chose.
        maps: of the test images.
        rows: of the test images' table.
        settings: of the cell.
        progress: gets every step.

    Returns:
        Name of a system -> metrics, with intervals and what the method is ahead by.
    """
    comparison = Comparison(rows, settings)
    replicated: dict[str, ReplicatedMetrics] = {}
    tests: dict[str, SystemTest] = {}
    total = sum(len(selection.candidates) for selection in selections.values())
    done = 0
    for name, selection in selections.items():
        system = SYSTEMS[name]

        def metrics(candidate: Candidate, names: Sequence[str], system: Any = system) -> Metrics:
            return comparison.metrics(maps.scores(system, candidate), names)

        tried = []
        for candidate in selection.candidates:
            tried.append(metrics(candidate, ORACLE_METRICS))
            done += 1
            progress("test metrics", done, total)
        replicated[name] = comparison.replicate(maps.scores(system, selection.selected))
        tests[name] = SystemTest(
            selected=metrics(selection.selected, tuple(METRICS)),
            last=metrics(selection.last, ORACLE_METRICS),
            oracle={metric: max(found[metric] for found in tried) for metric in tried[0]},
            intervals=replicated[name].intervals,
        )
    if METHOD not in tests:
        return tests
    return {
        name: test
        if name == METHOD
        else dataclasses.replace(test, ahead_by=replicated[METHOD].gain_over(replicated[name]))
        for name, test in tests.items()
    }
