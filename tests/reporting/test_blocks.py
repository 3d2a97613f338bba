"""Tables as text, and numbers as people read them."""

import csv
import io
import math

from hypothesis import given
from hypothesis import strategies as st

from clsnf.reporting import formats
from clsnf.reporting.blocks import Column, Table


def one(text: str) -> Table:
    return Table("t", "T", [Column("a", "A"), Column("b", "B", "metric")], [{"a": text, "b": 0.5}])


@given(st.text())
def test_any_text_survives_csv_and_is_no_formula(text: str) -> None:
    (_, (cell, value)) = csv.reader(io.StringIO(one(text).csv(), newline=""))
    kept = text.replace("\r", " ")
    assert cell in (kept, f"'{kept}")
    assert not cell.startswith(("=", "+", "-", "@", "\t"))
    assert value == "0.5"


@given(st.text())
def test_any_text_is_one_cell_of_a_markdown_table_without_markup(text: str) -> None:
    table = [line for line in one(text).markdown().split("\n") if line.startswith("|")]
    assert len(table) == 3
    cell = table[2].removeprefix("| ").removesuffix(" | 0.500 |")
    unescaped = cell.replace("\\\\", "")
    for mark in "|<>`*_[]":
        assert unescaped.count(mark) == unescaped.count("\\" + mark)


@given(st.one_of(st.floats(), st.none(), st.integers(-(10**9), 10**9)))
def test_no_number_that_is_not_finite_looks_like_one(value: float | None) -> None:
    for name, how in formats.FORMATS.items():
        text = how(value)
        assert text
        if name not in ("text", "setting") and (value is None or not math.isfinite(value)):
            assert not any(character.isdigit() for character in text), name


def test_numbers_read_as_people_write_them() -> None:
    assert [formats.percent(share) for share in (0.0384, 0.01, 0.0013)] == [
        "3.8 %",
        "1 %",
        "0.13 %",
    ]
    assert formats.percent(0.917) == "92 %"
    assert formats.percent(0) == "0 %"
    assert formats.gain(-0.0123) == "−0.012"
    assert [formats.duration(s) for s in (0.31, 42, 600, 9000)] == [
        "0.3 s",
        "42 s",
        "10 min",
        "2.5 h",
    ]
