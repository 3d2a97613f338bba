"""The Pareto front: the points that no other point dominates."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def pareto_front(values: ArrayLike) -> list[int]:
    """Indices of the points that no other point dominates, in ascending order.

    A point dominates another one if it is at least as good in every objective and better in one.
    Points that are equal do not dominate each other: all of them are on the front, or none is.

    Args:
        values: (N, K) finite values of K objectives; higher is better in each. Negate an objective
            of which less is better.
    """
    points = np.asarray(values, np.float64)
    if not points.size:
        return []
    return [
        index
        for index, point in enumerate(points)
        if not ((points >= point).all(axis=1) & (points > point).any(axis=1)).any()
    ]
