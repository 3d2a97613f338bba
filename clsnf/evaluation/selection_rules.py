"""Selection rules: from each candidate's figure on each validation defect family to one candidate.

No rule can know which of the families is most like a product's real defects. ``mean`` trusts all
alike; the others guard against a family that decides alone because it is easy, or because its
figures are spread widely. The default was fixed by that reasoning before any test figure was seen;
a study's summary shows what each rule would have picked, and with labelled test images what its
pick is worth there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from clsnf.core.errors import SettingsError, nearest

Values = NDArray[np.float64]


@dataclass(frozen=True)
class SelectionRule:
    """A rule.

    Attributes:
        score: figures (C candidates, F families) to scores (C,); the candidate with the largest is
            picked, of equals the first.
        help: one line for people.
    """

    score: Callable[[Values], Values]
    help: str


def _leave_one_out(values: Values) -> Values:
    if values.shape[1] == 1:
        return values[:, 0]
    others = (values.sum(axis=1, keepdims=True) - values) / (
        values.shape[1] - 1
    )  # (C, F): the mean without each family
    smallest: Values = others.min(axis=1)
    return smallest


RULES: dict[str, SelectionRule] = {
    "mean": SelectionRule(lambda values: values.mean(axis=1), "the mean over the families"),
    "worst": SelectionRule(
        lambda values: values.min(axis=1), "the family that the candidate does worst on"
    ),
    "leave_one_out": SelectionRule(
        _leave_one_out, "the mean over the families without the one that the candidate does best on"
    ),
    "rank": SelectionRule(
        lambda values: rankdata(values, axis=0).mean(axis=1),
        "the mean of the candidate's ranks among the others, family by family",
    ),
}


def pick(rule: str, values: Sequence[Sequence[float]]) -> int:
    """The index of the candidate that a rule picks.

    Args:
        rule: a name in :data:`RULES`.
        values: (C, F) a figure of each candidate on each family, higher is better.
    """
    return int(np.argmax(RULES[rule].score(np.asarray(values, float))))


def order(rule: str, values: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the candidates, best first, of equals the first first."""
    return [
        int(i) for i in np.argsort(-RULES[rule].score(np.asarray(values, float)), kind="stable")
    ]


def check_rule(name: str) -> None:
    """Refuse a name that is no rule. Raises SettingsError."""
    if name not in RULES:
        raise SettingsError(f"The selection rule is {name!r}.{nearest(name, RULES)}")
