"""Runs the benchmark cell by cell, goes on where it stopped, and writes the tables after each cell.

    out/protocol.json                           everything that produced a number
    out/cells/<variant>/<category>/seed-N.json  one finished cell (clsnf.results.CellResult)
    out/results.csv, out/tables/                see clsnf.benchmark.tables
    out/ledger.jsonl                            when test images were opened
    out/stages/                                 artifacts of training, found by content: a cell that
                                                was interrupted goes on from there

Machines may share a benchmark: each takes some categories (``--categories``), with the same
``--out`` on shared storage. Cells are files. Whoever finishes one writes the tables from all that
are there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from clsnf.benchmark.cell import run_cell
from clsnf.benchmark.protocol import FILE as PROTOCOL
from clsnf.benchmark.protocol import write_protocol
from clsnf.benchmark.request import BASE, BenchmarkRequest, Cell, category_of
from clsnf.benchmark.tables import write_tables
from clsnf.core.config import to_dict
from clsnf.core.errors import ClsnfError, OutputError
from clsnf.core.files import check_writable
from clsnf.core.hashing import content_key
from clsnf.core.progress import Progress, silent
from clsnf.data.checks import check_category
from clsnf.results import CellResult, read_result, write_result
from clsnf.training.prepare import Prepared, check_ingredients


@dataclass(frozen=True)
class Outcome:
    """What a benchmark came to.

    Attributes:
        cells: all finished cells in its folder.
        failed: name of a cell that failed in this run -> cause.
    """

    cells: list[CellResult]
    failed: dict[str, str]


def run_benchmark(
    request: BenchmarkRequest,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> Outcome:
    """Run every cell that is not finished yet.

    Args:
        request: what the user asks for.
        say: told about each cell in one line.
        progress: told about long work.

    Raises:
        ClsnfError: bad input, before anything long starts.
    """
    out = request.out.absolute()
    request = dataclasses.replace(request, out=out)
    request = dataclasses.replace(request, tables=_checked_tables(request, say, progress))
    out.mkdir(parents=True, exist_ok=True)
    write_protocol(request, out)
    cells = list(request.cells())
    failed: dict[str, str] = {}
    prepared: dict[tuple[str, int], Prepared] = {}
    for number, cell in enumerate(cells, 1):
        label = f"cell {number}/{len(cells)}  {cell.name}"
        if _is_finished(cell, request):
            say(f"{label}: finished before")
            continue

        def in_cell(task: str, done: int, total: int, name: str = cell.name) -> None:
            progress(f"{name}: {task}", done, total)

        started = time.perf_counter()
        key = (cell.category, cell.seed)
        try:
            result, used = run_cell(cell, request, in_cell, prepared.get(key))
        except ClsnfError as error:  # the other cells are worth having
            failed[cell.name] = str(error)
            say(f"{label}: failed: {error}")
            continue
        prepared = {key: used}  # the variants of a category and seed follow one another
        write_result(cell.path(out), result)
        write_tables(out, read_cells(out))
        say(f"{label}: {time.perf_counter() - started:.0f} s")
    finished = read_cells(out)
    if finished:
        write_tables(out, finished)
    return Outcome(finished, failed)


def read_cells(out: Path) -> list[CellResult]:
    """All finished cells of a benchmark's folder, the base variant first.

    Raises:
        OutputError: one is damaged.
    """
    cells = [_read_cell(path) for path in (out / "cells").glob("*/*/seed-*.json")]
    return sorted(
        cells, key=lambda cell: (cell.variant != BASE, cell.variant, cell.category, cell.seed)
    )


def _read_cell(path: Path) -> CellResult:
    return read_result(CellResult, path, "delete it, and the cell is made anew")


def _is_finished(cell: Cell, request: BenchmarkRequest) -> bool:
    """Whether a cell's file holds all systems, and all test metrics, that are wanted now.

    Raises:
        OutputError: the file is damaged, or was made with other settings or data.
    """
    path = cell.path(request.out)
    if not path.is_file():
        return False
    found = _read_cell(path)
    if found.identity != cell.identity(request.textures):
        raise OutputError(f"{path} was made with other settings or data: choose another --out.")
    if any(name not in found.systems for name in request.systems):
        return False
    has_metrics = all(system.test is not None for system in found.systems.values())
    return has_metrics or not request.test or not found.images["test"]


def _checked_tables(
    request: BenchmarkRequest, say: Callable[[str], None], progress: Progress
) -> list[pa.Table]:
    """The tables without unreadable images, after everything is checked that could stop a cell.

    Nothing is written.
    """
    check_writable(request.out, folder=True)
    if _holds_other_things(request.out):
        raise OutputError(f"{request.out} holds other things: choose another --out.")
    recipes = [recipe for recipes in request.recipes.values() for recipe in recipes.values()]
    for settings in {content_key(to_dict(r.settings)): r.settings for r in recipes}.values():
        check_ingredients(settings, request.textures, request.device)
    tables = []
    for given in request.tables:
        table = _checked_table(given, request, say, progress)
        for seed in request.seeds:
            for cell in request.cells_of(table, seed):
                _is_finished(cell, request)  # refuses other settings or data
        tables.append(table)
    return tables


def _holds_other_things(out: Path) -> bool:
    return out.is_dir() and any(out.iterdir()) and not (out / PROTOCOL).is_file()


def _checked_table(
    table: pa.Table, request: BenchmarkRequest, say: Callable[[str], None], progress: Progress
) -> pa.Table:
    """A category's table without unreadable images; `say` is told what was left out."""
    task = f"checking {category_of(table)}"
    report = check_category(
        table,
        allow_leak=request.allow_leak,
        max_bad=request.max_bad,
        progress=lambda done, total: progress(task, done, total),
    )
    for warning in report.warnings:
        say(f"warning: {warning}")
    return report.table
