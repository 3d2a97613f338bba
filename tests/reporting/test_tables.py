"""The report's tables hold what their columns promise."""

from pathlib import Path

import pytest

from clsnf.reporting.study_files import read_study
from clsnf.reporting.tables import TABLES, all_tables
from tests.support.made_up_study import write_study


@pytest.mark.parametrize("name", TABLES)
def test_every_table_names_its_product_and_has_what_its_columns_ask_for(
    name: str, tmp_path: Path
) -> None:
    table = TABLES[name](read_study(write_study(tmp_path / "run", ["alpha", "beta"])))
    assert table.name == name
    assert "category" in {column.key for column in table.columns}
    if name != "suspects":
        assert {row["category"] for row in table.rows} == {"alpha", "beta"}
        for column in table.columns:
            if column.key not in ("cause", "winner", "authors", "next") and not column.key.endswith(
                "_authors"
            ):
                assert any(row.get(column.key) is not None for row in table.rows), column.key


def test_all_tables_are_those_of_the_registry(tmp_path: Path) -> None:
    assert list(all_tables(read_study(write_study(tmp_path / "run", ["a"])))) == list(TABLES)
