"""What a user asks the benchmark for, and the cells that it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from clsnf.benchmark.systems import SYSTEMS, WEIGHTS
from clsnf.core.config import DetectorSettings, key_content
from clsnf.core.hashing import content_key
from clsnf.data.checks import MAX_BAD
from clsnf.synthesis.textures import texture_files_key
from clsnf.training.artifacts import RESULTS_VERSION
from clsnf.training.prepare import data_fingerprint

BASE = "base"  # the variant that changes no setting


@dataclass(frozen=True)
class Recipe:
    """Settings of one category under one variant.

    Attributes:
        settings: of everything; each cell has a seed of its own.
        baseline_passes: ``flow.passes`` of the flows on the pretrained backbone.
    """

    settings: DetectorSettings
    baseline_passes: float


@dataclass(frozen=True)
class Cell:
    """One category, one seed and one variant of the settings.

    Attributes:
        variant: its name.
        category: the product.
        table: of the category's images, as the layout's reader gave it.
        recipe: with the cell's seed.
    """

    variant: str
    category: str
    table: pa.Table
    recipe: Recipe

    @property
    def settings(self) -> DetectorSettings:
        """With the cell's seed."""
        return self.recipe.settings

    @property
    def seed(self) -> int:
        """Decides everything random, the split into fit and validation images included."""
        return self.settings.seed

    @property
    def name(self) -> str:
        """For messages."""
        name = f"{self.category}, seed {self.seed}"
        return name if self.variant == BASE else f"{name}, {self.variant}"

    def path(self, out: Path) -> Path:
        """The cell's file in a benchmark's folder."""
        return out / "cells" / self.variant / self.category / f"seed-{self.seed}.json"

    def identity(self, textures: Path | None) -> str:
        """Hash of everything that decides the cell's result."""
        content = {
            "settings": key_content(self.settings),
            "baseline_passes": self.recipe.baseline_passes,
            "data": data_fingerprint(self.table),
            "textures": None if textures is None else texture_files_key(textures),
            "weights": WEIGHTS,
            "version": RESULTS_VERSION,
        }
        return content_key(content)


@dataclass(frozen=True)
class BenchmarkRequest:
    """What a user asks for.

    Attributes:
        tables: one for each category, as the layout's reader gave it.
        recipes: by variant, then by category.
        seeds: of the cells.
        out: the benchmark's folder.
        textures: folder of pictures to make training defects from; None for textures drawn by code.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        test: whether test images are opened once everything is chosen.
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

    def cells(self) -> Iterator[Cell]:
        """All cells, seed by seed: the first results show every category once."""
        for seed in self.seeds:
            for table in self.tables:
                yield from self.cells_of(table, seed)

    def cells_of(self, table: pa.Table, seed: int) -> Iterator[Cell]:
        """The cells of one category and seed: one for each variant."""
        category = category_of(table)
        for variant, recipes in self.recipes.items():
            recipe = recipes[category]
            settings = dataclasses.replace(recipe.settings, seed=seed)
            yield Cell(variant, category, table, dataclasses.replace(recipe, settings=settings))


def category_of(table: pa.Table) -> str:
    """The category of a table's images."""
    return str(table["category"][0].as_py())
