"""Points of a search space: which there are, which were tried, and one that was not.

A space of choices, whole numbers and steps is finite. A point is a value for each name, as Optuna
stores it. Called by :mod:`clsnf.study.trials`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

Distributions = Mapping[str, BaseDistribution]
Point = Mapping[str, Any]


def point_key(point: Point) -> str:
    """The same for equal points, whatever the order of their names."""
    return json.dumps(sorted(point.items()))


def is_value(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a range holds a value."""
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except (ValueError, TypeError):
        return False


def values_of(distribution: BaseDistribution) -> tuple[Any, ...] | range | None:
    """All values of a range; None where they are too many to count."""
    if isinstance(distribution, CategoricalDistribution):
        return tuple(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return range(distribution.low, distribution.high + 1, distribution.step)
    assert isinstance(distribution, FloatDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if low == high:
        return (low,)
    if step is None:
        return None
    return tuple(low + n * step for n in range(round((high - low) / step) + 1))


class FreePoints:
    """The points of a space that may still be tried.

    Args:
        distributions: of the space.
        tried: keys (:func:`point_key`) of the points that were tried.
        avoided: name -> values that are left alone.
    """

    def __init__(
        self,
        distributions: Distributions,
        tried: Collection[str],
        avoided: Mapping[str, Collection[Any]],
    ) -> None:
        self._names, self._tried, self._avoided = list(distributions), set(tried), avoided
        self._values = [
            None
            if (values := values_of(distribution)) is None
            else values
            if name not in avoided
            else tuple(value for value in values if value not in avoided[name])
            for name, distribution in distributions.items()
        ]

    @property
    def size(self) -> float:
        """Number of points without values that are left alone, tried ones among them."""
        sizes = [math.inf if values is None else len(values) for values in self._values]
        return 0 if 0 in sizes else math.prod(sizes)

    @property
    def are_used_up(self) -> bool:
        """Whether no point is left."""
        # Fewer were tried than there are: no need to look at each.
        return self.size <= len(self._tried) and next(self._from(0), None) is None

    def holds(self, point: Point) -> bool:
        """Whether a point of the space is free."""
        left_alone = any(point[name] in values for name, values in self._avoided.items())
        return not left_alone and point_key(point) not in self._tried

    def pick(self, seed: int) -> dict[str, Any]:
        """A free point of a finite space that is not used up."""
        return next(self._from(seed % int(self.size)))

    def without_avoided(self, point: Point, seed: int) -> dict[str, Any]:
        """The point, with another value in the place of each that is left alone."""
        changed = dict(point)
        for name, values in zip(self._names, self._values, strict=True):
            if values is not None and point[name] in self._avoided.get(name, ()):
                changed[name] = values[seed % len(values)]
        return changed

    def _from(self, start: int) -> Any:
        """The free points of a finite space in a fixed order, from the one at place `start`."""
        size = int(self.size)
        for place in itertools.islice(itertools.cycle(range(size)), start, start + size):
            point, rest = {}, place
            for name, values in zip(self._names, self._values, strict=True):
                assert values is not None
                rest, index = divmod(rest, len(values))
                point[name] = values[index]
            if point_key(point) not in self._tried:
                yield point


def space_size(distributions: Distributions) -> float:
    """Number of points of a space; infinite where a range has too many values to count."""
    return FreePoints(distributions, (), {}).size
