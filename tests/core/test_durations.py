"""Durations as people read them."""

import pytest

from clsnf.core.durations import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (40, "40 s"),
        (1800, "30 min"),
        (8 * 3600, "8 h"),
        (0.4, "0 s"),
        (5400, "1.5 h"),
        (90, "2 min"),
    ],
)
def test_a_duration_reads_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
