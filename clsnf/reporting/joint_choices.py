"""Short labels of a search space's joint choices, for tables and charts.

The value of a joint choice is a mapping of settings. A report shows what tells it apart from the
others alone: the backbone's name, say, and not the levels and the image size that go with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from clsnf.reporting.formats import setting
from clsnf.results import CategoryResult, TrialResult, WinnerResult, stored_choice

_AS_SET = "as set"  # the study's own setting, where a mapping does not name it


class JointLabels:
    """The labels of the joint choices in a space.

    Args:
        space: name -> range, as in the space's file.
    """

    def __init__(self, space: Mapping[str, Mapping[str, Any]]) -> None:
        self._labels = {
            name: _labels_of(mappings)
            for name, given in space.items()
            if (mappings := [v for v in given.get("values") or () if isinstance(v, Mapping)])
        }

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config with labels in the place of mappings."""
        return {
            name: self._labels.get(name, {}).get(stored_choice(value)) or setting(value)
            if isinstance(value, Mapping)
            else value
            for name, value in config.items()
        }

    def trial(self, trial: TrialResult) -> TrialResult:
        """A trial with labels in its config."""
        return replace(trial, config=self.config(trial.config))

    def result(self, result: CategoryResult | None) -> CategoryResult | None:
        """A category's result with labels in all configs of its winner."""
        if result is None or result.winner is None:
            return result
        return replace(result, winner=self._winner(result.winner))

    def _winner(self, winner: WinnerResult) -> WinnerResult:
        return replace(
            winner,
            chosen=self.config(winner.chosen),
            sweeps=[replace(one, config=self.config(one.config)) for one in winner.sweeps],
            rules={
                rule: replace(pick, config=self.config(pick.config))
                for rule, pick in winner.rules.items()
            },
            front=[replace(one, config=self.config(one.config)) for one in winner.front],
        )


def _labels_of(mappings: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Stored mapping -> label."""
    names = list(dict.fromkeys(name for mapping in mappings for name in mapping))
    shown = {name: [setting(m[name]) if name in m else _AS_SET for m in mappings] for name in names}
    differ = [name for name in names if len(set(shown[name])) > 1]
    alone = [name for name in differ if len(set(shown[name])) == len(mappings)]
    # A name such as the backbone's says more than a number.
    alone.sort(key=lambda name: not all(isinstance(m.get(name), str) for m in mappings))
    return {
        stored_choice(mapping): ", ".join(
            shown[name][index] if alone else f"{name} {shown[name][index]}"
            for name in alone[:1] or differ or names
        )
        for index, mapping in enumerate(mappings)
    }
