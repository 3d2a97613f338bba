"""Selection rules: pick one candidate by its metric on each validation defect family.

No rule can know which family is most like a product's real defects. ``mean`` gives all families the
same weight. The other rules keep one family from deciding alone because it is easy, or because its
values vary widely. The default was fixed by this reasoning, before any test metric was seen.

A study's summary shows what each rule would have picked and, with labelled test images, the metrics
of that pick on them.
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
    """A rule: the candidate with the largest score is picked; of equals, the first.

    Attributes:
        score: metrics (C, F) of C candidates on F families -> scores (C,).
        help: one line for people.
    """

    score: Callable[[Values], Values]
    help: str


def _leave_one_out(values: Values) -> Values:
    if values.shape[1] == 1:
        return values[:, 0]
    # (C, F): the mean without each family
    others = (values.sum(axis=1, keepdims=True) - values) / (values.shape[1] - 1)
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
        values: (C, F) a metric of C candidates on F families; higher is better.
    """
    return int(np.argmax(RULES[rule].score(np.asarray(values, float))))


def order(rule: str, values: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the candidates, best first; equals keep their order.

    Args:
        rule, values: see :func:`pick`.
    """
    return [
        int(i) for i in np.argsort(-RULES[rule].score(np.asarray(values, float)), kind="stable")
    ]


def check_rule(name: str) -> None:
    """Refuse a name that is no rule.

    Raises:
        SettingsError: naming the valid ones.
    """
    if name not in RULES:
        raise SettingsError(f"The selection rule is {name!r}.{nearest(name, RULES)}")
