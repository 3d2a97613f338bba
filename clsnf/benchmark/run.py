"""Runs the benchmark cell by cell, goes on where it stopped, and writes the tables after every
cell.

    out/protocol.json                           everything that produced a number
    out/cells/<variant>/<category>/seed-N.json  one finished cell
    out/results.csv, out/tables/                see :mod:`clsnf.benchmark.tables`
    out/ledger.jsonl                            when test images were looked at
    out/stages/                                 finished work, found by content: a cell half done
    goes on from there

Unusual: machines may share a benchmark. Each takes some categories (``--categories``) with the same
    ``--out`` on shared storage; cells
are files, and whoever finishes one writes the tables anew from all that are there.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

import clsnf
from clsnf.benchmark.cell import OBJECTIVE, ORACLE_METRICS, REPLICATES, CellRequest, run_cell
from clsnf.benchmark.systems import SYSTEMS, WEIGHTS
from clsnf.benchmark.tables import BASE, Cell, write_tables
from clsnf.core.config import DetectorSettings, key_content, to_dict
from clsnf.core.errors import ClsnfError, OutputError
from clsnf.core.files import check_writable, write_json
from clsnf.core.hashing import content_key
from clsnf.core.ledger import now
from clsnf.core.progress import Progress, silent
from clsnf.data.checks import MAX_BAD, check_category
from clsnf.synthesis.textures import texture_files_key
from clsnf.training.artifacts import RESULTS_VERSION
from clsnf.training.prepare import Prepared, check_ingredients, data_fingerprint


@dataclass(frozen=True)
class Recipe:
    """Settings of one category under one variant.

    Attributes:
        settings: of everything; the seed is each cell's own.
        baseline_passes: ``flow.passes`` of the flows on the pretrained backbone.
    """

    settings: DetectorSettings
    baseline_passes: float


@dataclass(frozen=True)
class BenchmarkRequest:
    """What a user asks for.

    Attributes:
        tables: one a category, as the layout's reader gave it.
        recipes: by variant, then by category.
        seeds: of the cells.
        out: the benchmark's folder.
        textures: folder of pictures to make training defects from; None for textures drawn by code.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        test: whether test images are looked at once everything is chosen.
        allow_leak: go on where training and test images are the same.
        max_bad: share of a category's images that may be unreadable.
        origin: where the data came from.
        systems: names of those that are wanted.
    """

    tables: Sequence[pa.Table]
    recipes: Mapping[str, Mapping[str, Recipe]]
    seeds: Sequence[int]
    out: Path
    textures: Path | None = None
    device: str = "auto"
    test: bool = True
    allow_leak: bool = False
    max_bad: float = MAX_BAD
    origin: str = ""
    systems: tuple[str, ...] = tuple(SYSTEMS)


@dataclass(frozen=True)
class Outcome:
    """What a benchmark came to: all finished cells in its folder, and the causes of those that
    failed now.
    """

    cells: list[Cell]
    failed: dict[str, str]


def run_benchmark(
    request: BenchmarkRequest,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> Outcome:
    """Run every cell that is not finished yet.

    Raises:
        ClsnfError: bad input, before anything long starts.
    """
    out = request.out.absolute()
    request = dataclasses.replace(request, tables=_checked_inputs(request, out, say, progress))
    out.mkdir(parents=True, exist_ok=True)
    _write_protocol(request, out)
    wanted = [
        (variant, table, seed)
        # every category once before any a second time: an early look shows the whole set
        for seed in request.seeds
        for table in request.tables
        for variant in request.recipes
    ]
    failed: dict[str, str] = {}
    held: dict[tuple[str, int], Prepared] = {}
    for number, (variant, table, seed) in enumerate(wanted, 1):
        category = str(table["category"][0].as_py())
        name = f"{category}, seed {seed}" + ("" if variant == BASE else f", {variant}")
        path, identity, recipe = _place(request, out, variant, category, table, seed)
        done = _finished(path, identity, request)
        if done is not None:
            say(f"cell {number}/{len(wanted)}  {name}: finished before")
            continue
        settings = dataclasses.replace(recipe.settings, seed=seed)
        cell = CellRequest(
            table,
            settings,
            recipe.baseline_passes,
            out,
            request.textures,
            request.device,
            request.test,
            request.systems,
        )
        started = time.perf_counter()
        try:
            result, prepared = run_cell(
                cell,
                lambda task, done, total, name=name: progress(f"{name}: {task}", done, total),
                held.get((category, seed)),
            )
            held = {(category, seed): prepared}  # variants of a cell come one after the other
        except ClsnfError as error:  # the other cells are worth having
            failed[name] = str(error)
            say(f"cell {number}/{len(wanted)}  {name}: failed: {error}")
            continue
        write_json(
            path,
            {
                "variant": variant,
                "category": category,
                "seed": seed,
                "identity": identity,
                "at": now(),
                **result,
            },
        )
        write_tables(out, read_cells(out))
        say(f"cell {number}/{len(wanted)}  {name}: {time.perf_counter() - started:.0f} s")
    cells = read_cells(out)
    if cells:
        write_tables(out, cells)
    return Outcome(cells, failed)


def read_cells(out: Path) -> list[Cell]:
    """All finished cells of a benchmark's folder, the base variant first.

    Raises:
        OutputError: one is damaged.
    """
    cells = []
    for path in sorted((out / "cells").glob("*/*/seed-*.json")):
        content = _read(path)
        try:
            cells.append(Cell(content["variant"], content["category"], content["seed"], content))
        except KeyError as error:
            raise OutputError(
                f"{path} is damaged (no entry {error}): delete it, and the cell is made anew."
            ) from error
    return sorted(
        cells, key=lambda cell: (cell.variant != BASE, cell.variant, cell.category, cell.seed)
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(
            f"{path} is damaged ({error}): delete it, and the cell is made anew."
        ) from error


def _place(
    request: BenchmarkRequest, out: Path, variant: str, category: str, table: pa.Table, seed: int
) -> tuple[Path, str, Recipe]:
    """Where a cell lies, what decides it, and its recipe."""
    recipe = request.recipes[variant][category]
    content = {
        "settings": key_content(dataclasses.replace(recipe.settings, seed=seed)),
        "baseline_passes": recipe.baseline_passes,
        "data": data_fingerprint(table),
        "textures": None if request.textures is None else texture_files_key(request.textures),
        "weights": WEIGHTS,
        "version": RESULTS_VERSION,
    }
    return out / "cells" / variant / category / f"seed-{seed}.json", content_key(content), recipe


def _finished(path: Path, identity: str, request: BenchmarkRequest) -> dict[str, Any] | None:
    """A finished cell; None where there is none, or one without the systems or the test figures
    that are wanted now.
    """
    if not path.is_file():
        return None
    content = _read(path)
    if content.get("identity") != identity:
        raise OutputError(f"{path} was made with other settings or data: choose another --out.")
    if any(name not in content["systems"] for name in request.systems):
        return None
    judged = all(found["test"] is not None for found in content["systems"].values())
    return content if judged or not request.test or not content["images"]["test"] else None


def _checked_inputs(
    request: BenchmarkRequest, out: Path, say: Callable[[str], None], progress: Progress
) -> list[pa.Table]:
    """The tables without unreadable images, after everything that could stop a cell was looked at;
    nothing is written.
    """
    check_writable(out, folder=True)
    if out.is_dir() and any(out.iterdir()) and not (out / "protocol.json").is_file():
        raise OutputError(f"{out} holds other things: choose another --out.")
    for recipe in {
        content_key(to_dict(r.settings)): r for of in request.recipes.values() for r in of.values()
    }.values():
        check_ingredients(recipe.settings, request.textures, request.device)
    tables = []
    for found in request.tables:
        category = str(found["category"][0].as_py())

        def checked(done: int, total: int, name: str = category) -> None:
            progress(f"checking {name}", done, total)

        report = check_category(
            found, allow_leak=request.allow_leak, max_bad=request.max_bad, progress=checked
        )
        for warning in report.warnings:
            say(f"warning: {warning}")
        tables.append(report.table)
        for variant in request.recipes:
            for seed in request.seeds:
                path, identity, _ = _place(request, out, variant, category, report.table, seed)
                _finished(path, identity, request)
    return tables


def _write_protocol(request: BenchmarkRequest, out: Path) -> None:
    """Everything that produced a number, category by category; categories of other runs into the
    same folder stay.
    """
    path = out / "protocol.json"
    before = _read(path) if path.is_file() else {}
    data = before.get("data", {}) | {
        str(table["category"][0].as_py()): {
            "images": len(table),
            "sha256_of_contents": data_fingerprint(table),
        }
        for table in request.tables
    }
    recipes = before.get("recipes", {})
    for variant, of in request.recipes.items():
        recipes.setdefault(variant, {}).update(
            {category: dataclasses.asdict(recipe) for category, recipe in of.items()}
        )
    write_json(
        path,
        {
            "clsnf": clsnf.__version__,
            "at": now(),
            "command": sys.argv,
            "origin": request.origin,
            "data": data,
            "textures": None if request.textures is None else texture_files_key(request.textures),
            "seeds": sorted({*before.get("seeds", []), *request.seeds}),
            "recipes": recipes,
            "systems": {name: dataclasses.asdict(system) for name, system in SYSTEMS.items()},
            "selection": {
                "objective": f"{OBJECTIVE}, mean over the validation defect families",
                "candidates": (
                    "joint epochs in which the learning rate falls; flows untrained and trained; "
                    "fusion weights"
                ),
                "fusion_weights": WEIGHTS,
            },
            "image_score": (
                "fused systems: of the fusion weight with the best image AUROC, mean over the "
                "validation defect families"
            ),
            "oracle": {
                "figures": ORACLE_METRICS,
                "rule": "the best candidate on the test images, figure by figure",
            },
            "bootstrap": {
                "replicates": REPLICATES,
                "over": "test images, normal and defective apart",
                "interval": "95 %, percentile",
            },
            "machine": {
                "device": request.device,
                "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                "threads": torch.get_num_threads(),
                "platform": platform.platform(),
                "python": platform.python_version(),
            },
            "versions": {
                name: importlib.metadata.version(name)
                for name in (
                    "torch",
                    "torchvision",
                    "timm",
                    "FrEIA",
                    "numpy",
                    "opencv-python-headless",
                    "pillow",
                )
            },
        },
    )
