"""Tables of finished cells: means, deviations and rows of results.csv."""

import numpy as np
import pytest

from clsnf.benchmark.request import BASE
from clsnf.benchmark.tables import Spread, long_rows, overview, spread, system_table
from clsnf.results import CandidateResult, CellResult, MaskReport, SystemResult, SystemTest


def cell(category: str, seed: int, value: float) -> CellResult:
    metrics = dict.fromkeys(("image_auroc", "pixel_ap", "pixel_auroc", "au_pro"), value)
    candidate = CandidateResult(1, 1, 0.5)
    system = SystemResult(
        candidates=[candidate],
        selected=candidate,
        last=candidate,
        validation={"pixel_ap": value},
        families={},
        test=SystemTest(metrics, metrics, metrics, {"pixel_ap": (0.0, 1.0)}),
    )
    return CellResult(
        variant=BASE,
        category=category,
        seed=seed,
        identity="",
        at="",
        systems={"fused": system},
        object_mask=MaskReport("off"),
        images={},
        seconds={},
        cost=None,
        artifacts={},
    )


def test_means_are_over_categories_first_and_deviations_over_seeds() -> None:
    cells = [cell("a", 0, 0.2), cell("b", 0, 0.4), cell("a", 1, 0.6), cell("b", 1, 0.8)]
    found = spread(cells, "fused", "selected", "pixel_ap")
    assert found is not None
    assert found.mean == pytest.approx(0.5)
    assert found.deviation == pytest.approx(np.std([0.3, 0.7], ddof=1))
    assert str(Spread(0.5, 0.01, 2)) == "50.00 ± 1.00"
    assert str(Spread(0.5, None, 1)) == "50.00"


def test_a_category_that_some_seed_lacks_is_left_out_of_the_mean() -> None:
    cells = [cell("a", 0, 0.2), cell("b", 0, 0.9), cell("a", 1, 0.4)]
    found = spread(cells, "fused", "selected", "pixel_ap")
    assert found is not None
    assert found.mean == pytest.approx(0.3)
    assert spread(cells, "flow", "selected", "pixel_ap") is None
    assert "30.00" in overview(cells)
    assert "| a | 2 | 30.00" in system_table(cells, "fused")


def test_long_rows_carry_intervals_for_the_selected_alone() -> None:
    rows = [row for row in long_rows([cell("a", 0, 0.2)]) if row["figure"] == "pixel_ap"]
    assert [(row["column"], row["low"], row["high"]) for row in rows] == [
        ("validation", None, None),
        ("selected", 0.0, 1.0),
        ("last", None, None),
        ("oracle", None, None),
    ]
