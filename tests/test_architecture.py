"""Imports point one way: each floor of the house may import those below it, none above."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOORS = ("tune", "serve", "datasets", "reports")

# Each folder, and each module that lies in none, has a floor; data flows downwards, imports point
# down.
FLOORS = {
    "clsnf.cli": 9,
    "clsnf.study": 8,
    "clsnf.serving": 8,
    "clsnf.reporting": 8,
    "clsnf.benchmark": 8,
    "clsnf.watching": 8,
    "clsnf.evaluation": 7,
    "clsnf.paper": 7,
    "clsnf.results": 7,
    "clsnf.detector": 6,
    "clsnf.detector_file": 6,
    "clsnf.detector_folders": 6,
    "clsnf.training": 5,
    "clsnf.streams": 4,
    "clsnf.synthesis": 3,
    "clsnf.datasets": 3,
    "clsnf.data": 2,
    "clsnf.model": 2,
    "clsnf.metrics": 2,
    "clsnf.core": 1,
}
# What users import: `from clsnf import Detector`. It imports lazily, so that whoever imports a part
# does not import the detector.
FACE = "clsnf"
RAY = (
    "clsnf.study",
    "clsnf.serving",
    "clsnf.streams.ray_stream",
    "clsnf.streams.private_ray",
    *DOORS,
)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name_of(path): path
    for folder in ("clsnf", *DOORS)
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def floor_of(module: str) -> int | None:
    if any(within(module, door) for door in DOORS):
        return 9
    return next((floor for package, floor in FLOORS.items() if within(module, package)), None)


def imports_of(module: str) -> Iterator[str]:
    """Names of the modules that a module imports, wherever in its text."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively: write the whole name"
            assert node.module is not None
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in inner)


IMPORTS = {module: sorted(set(imports_of(module))) for module in MODULES}
every_module = pytest.mark.parametrize("module", [module for module in MODULES if module != FACE])


@every_module
def test_a_module_has_a_floor(module: str) -> None:
    assert floor_of(module) is not None, f"say in FLOORS where {module} lives"


@every_module
def test_a_module_imports_nothing_from_a_floor_above(module: str) -> None:
    own = floor_of(module)
    above = [name for name in IMPORTS[module] if (floor_of(name) or 0) > (own or 0)]
    assert above == []


@every_module
def test_the_face_of_the_package_is_imported_from_the_floors_above_the_detector(
    module: str,
) -> None:
    assert FACE not in IMPORTS[module] or (floor_of(module) or 0) > 6


PARTS = ("clsnf.model", "clsnf.data", "clsnf.metrics", "clsnf.synthesis", "clsnf.datasets")
JOBS = ("clsnf.study", "clsnf.serving", "clsnf.reporting", "clsnf.benchmark", "clsnf.watching")


@pytest.mark.parametrize("package", PARTS + JOBS)
def test_neighbours_on_a_floor_do_not_know_each_other(package: str) -> None:
    others = [
        other for other in PARTS + JOBS if other != package and floor_of(other) == floor_of(package)
    ]
    for module, names in IMPORTS.items():
        if within(module, package):
            assert [name for name in names if any(within(name, other) for other in others)] == [], (
                module
            )


def test_model_and_metrics_know_tensors_and_arrays_only() -> None:
    for module, names in IMPORTS.items():
        package = next(
            (part for part in ("clsnf.model", "clsnf.metrics") if within(module, part)), None
        )
        if package is not None:
            outside = [
                name for name in names if within(name, "clsnf") and not within(name, package)
            ]
            assert [name for name in outside if not within(name, "clsnf.core")] == [], module


@every_module
def test_ray_is_imported_by_the_jobs_and_the_doors_alone(module: str) -> None:
    if not any(within(module, place) for place in RAY):
        assert [name for name in IMPORTS[module] if within(name, "ray")] == []


@pytest.mark.parametrize("door", DOORS)
def test_the_doors_folders_are_no_packages_and_nobody_imports_them(door: str) -> None:
    assert not list((ROOT / door).rglob("__init__.py"))
    assert [
        module for module, names in IMPORTS.items() if any(within(name, door) for name in names)
    ] == []
