"""The content of a report: sections of blocks, which are tables, charts, notes, cases, facts.

Blocks hold plain content. The templates (see :mod:`clsnf.reporting.page`) decide how it looks.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, ClassVar

from clsnf.reporting.formats import FORMATS


@dataclass(frozen=True)
class Column:
    """A table's column.

    Attributes:
        key: of the row's value.
        title: its heading.
        kind: how values are shown, a name in :data:`clsnf.reporting.formats.FORMATS`.
        pick: whether readers may filter the rows by one of its values.
    """

    key: str
    title: str
    kind: str = "text"
    pick: bool = False

    def text(self, row: dict[str, Any]) -> str:
        """A row's value as the page shows it."""
        return FORMATS[self.kind](row.get(self.key))

    @property
    def is_number(self) -> bool:
        return self.kind not in ("text", "setting")


@dataclass(frozen=True)
class Table:
    """A table of the page, which is also written as CSV and Markdown.

    Attributes:
        name: of its files.
        title, note: for people.
        columns, rows: its content; a row maps keys of columns to values.
    """

    name: str
    title: str
    columns: list[Column]
    rows: list[dict[str, Any]]
    note: str = ""
    kind: ClassVar[str] = "table"

    def without(self, *keys: str) -> Table:
        """The same table without some of its columns."""
        return replace(self, columns=[c for c in self.columns if c.key not in keys])

    def choices(self, column: Column) -> list[str]:
        """The different values of a column, sorted."""
        return sorted({column.text(row) for row in self.rows})

    @property
    def is_long(self) -> bool:
        return len(self.rows) > 8

    def csv(self) -> str:
        """The table as CSV, with full precision.

        A text that a spreadsheet would read as a formula gets an apostrophe before it.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([column.key for column in self.columns])
        writer.writerows(
            [_cell(row.get(column.key)) for column in self.columns] for row in self.rows
        )
        return text.getvalue()

    def markdown(self) -> str:
        """The table as Markdown, with values as the page shows them."""
        lines = [f"# {_plain(self.title)}", "", *([_plain(self.note), ""] if self.note else [])]
        lines.append(f"| {' | '.join(_plain(column.title) for column in self.columns)} |")
        lines.append(
            f"|{'|'.join('---:' if column.is_number else '---' for column in self.columns)}|"
        )
        lines += [
            f"| {' | '.join(_plain(column.text(row)) for column in self.columns)} |"
            for row in self.rows
        ]
        return "\n".join(lines) + "\n"


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if not isinstance(value, str):
        return value
    text = value.replace("\r", " ")  # the csv module does not quote it
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


def _plain(text: str) -> str:
    """A text with nothing in it that Markdown reads as markup."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


@dataclass(frozen=True)
class Chart:
    """A Plotly figure.

    Attributes:
        title: what it shows.
        figure: ``data`` and ``layout``; colours are names of the page's palette, such as ``@1``
            (see :mod:`clsnf.reporting.chart_style`).
        reading: how to read it, and in words what it shows.
        height: in pixels.
    """

    title: str
    figure: dict[str, Any]
    reading: str
    height: int = 340
    kind: ClassVar[str] = "chart"


@dataclass(frozen=True)
class Note:
    """A line of text; `level` is ``plain`` or ``missing``."""

    text: str
    level: str = "plain"
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Case:
    """An image with the network's answers.

    Attributes:
        caption: what it is.
        layers: (title, data URI) of its pictures, in order.
    """

    caption: str
    layers: list[tuple[str, str]]


@dataclass(frozen=True)
class Cases:
    """Several cases of one kind."""

    title: str
    note: str
    cases: list[Case]
    kind: ClassVar[str] = "cases"


@dataclass(frozen=True)
class Facts:
    """A list of names with values."""

    title: str
    rows: list[tuple[str, str]]
    kind: ClassVar[str] = "facts"


Block = Table | Chart | Note | Cases | Facts


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    name: str
    title: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def groups(self) -> list[list[Block]]:
        """The blocks, with charts that follow each other in one group: they stand side by side."""
        return [
            list(group)
            for _, group in groupby(self.blocks, key=lambda block: block.kind == "chart")
        ]
