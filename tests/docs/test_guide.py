"""The guide's commands are run in its order as they stand, on small data; its code is run too, and
does what the guide says.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clsnf.cli import study as study_command
from clsnf.data.layouts import LAYOUTS, read_category
from clsnf.metrics import METRICS
from clsnf.reporting.build import build_report
from clsnf.reporting.sections import PRODUCT_SECTIONS
from clsnf.synthesis.validation_defects import FAMILIES
from tests.support.documented_commands import blocks_of, commands_of, make_example_folder, run
from tests.support.made_up_study import write_study

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guide.md").read_text()

# What is not run here, and where it is.
ELSEWHERE = {
    "python -m venv": "a fresh environment is what CI makes",
    "ray job submit": "tests/study/test_cluster.py submits a job to a real cluster",
    "clsnf serve": "tests/serving/test_ray.py serves winners, and asks about pictures",
    "curl": "as clsnf serve",
}
# What keeps a command small.
SMALLER = {
    "clsnf train": ["--config", "small.yaml"],
    "clsnf data show": ["--config", "small.yaml"],
    "clsnf study": ["--config", "small.yaml", "--space", "space.yaml"],
}


def starts(command: str, known: Any) -> str | None:
    return next((start for start in known if command.startswith(start)), None)


@pytest.mark.slow
def test_every_command_works_in_the_guides_order(tmp_path: Path) -> None:
    folder = make_example_folder(tmp_path)
    done = []
    for command in commands_of(GUIDE):
        if starts(command, ELSEWHERE):
            continue
        more = SMALLER.get(starts(command, SMALLER) or "", [])
        # A later --trials wins: two trials and one more show what eight and two more would.
        trials = {"8": ["--trials", "2"], "10": ["--trials", "3"]}
        given = re.search(r"--trials (\d+)", command)
        run(command, folder, *more, *(trials[given[1]] if given else []))
        done.append(command)
    assert len(done) >= 10
    assert len(list((folder / "heatmaps").glob("*_overlay.png"))) == 3
    for made in (
        "look.png",
        "metrics.json",
        "runs/first/report/report.html",
        "runs/second/comparison/comparison.html",
    ):
        assert (folder / made).is_file(), made


def test_the_install_line_is_the_readmes_without_the_tests() -> None:
    (line,) = [command for command in commands_of(GUIDE) if command.startswith("python -m venv")]
    readme = [
        command
        for command in commands_of((ROOT / "README.md").read_text())
        if command.startswith("python -m venv")
    ]
    assert all(command.startswith(line.removesuffix("-e .")) for command in readme)


def test_the_cluster_commands_options_are_those_of_the_command() -> None:
    (line,) = [command for command in commands_of(GUIDE) if command.startswith("ray job submit")]
    words = shlex.split(line)
    assert line in commands_of((ROOT / "README.md").read_text())
    known = {option for parameter in study_command.params for option in parameter.opts}
    assert {word for word in words[words.index("--") + 1 :] if word.startswith("--")} <= known


def test_every_page_that_the_guide_links_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", GUIDE):
        assert (ROOT / "docs" / target).exists(), target


def test_the_commands_of_the_page_on_reports_work_on_finished_studies(tmp_path: Path) -> None:
    for name in ("last", "night"):
        write_study(tmp_path / "runs" / name, ["alpha"])
    commands = commands_of((ROOT / "docs" / "reports.md").read_text())
    assert len(commands) == 2
    for command in commands:
        run(command, tmp_path)
    for made in ("report/report.html", "report/tables/verdicts.csv", "comparison/comparison.html"):
        assert (tmp_path / "runs" / "night" / made).is_file()


# ---- extending ----


@pytest.fixture
def extended() -> Iterator[dict[str, Any]]:
    """What the guide's code defines; the registries are as before afterwards."""
    registries: list[dict[str, Any]] = [FAMILIES, METRICS, LAYOUTS, PRODUCT_SECTIONS]
    before = [dict(registry) for registry in registries]
    names: dict[str, Any] = {}
    for block in blocks_of(GUIDE, "python"):
        exec(block, names)
    yield names
    for registry, kept in zip(registries, before, strict=True):
        registry.clear()
        registry.update(kept)


def test_the_guides_family_changes_the_picture_where_it_says(extended: dict[str, Any]) -> None:
    image = np.full((64, 64, 3), 100, np.uint8)
    where = np.zeros((64, 64), bool)
    where[20:40, 20:40] = True
    changed, mask = FAMILIES["bubble"](image, where, [], np.random.default_rng(0))
    assert mask.any()
    assert (changed[mask] == 160).all()
    assert (changed[~mask] == 100).all()
    assert (image == 100).all()


def test_the_guides_metric_is_computed_beside_the_others(
    extended: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    function = METRICS["safe_recall"].function
    from clsnf.metrics import count_images

    assert function(count_images([0.1, 0.4, 0.3, 0.9], [0, 0, 1, 1])) == 0.5
    assert function(count_images([0.1, 0.4, 0.4, 0.3], [0, 0, 1, 1])) == 0.0


def test_the_guides_layout_reads_a_folder(extended: dict[str, Any], tmp_path: Path) -> None:
    from clsnf.data.images import write_image

    (tmp_path / "valve").mkdir()
    for index, name in enumerate(("ok-1", "ok-2", "nok-1")):
        write_image(tmp_path / "valve" / f"{name}.png", np.full((8, 8, 3), index, np.uint8))
    table = read_category(tmp_path, "valve", "flat").to_pylist()
    assert [(row["split"], row["label"], row["defect_type"]) for row in table] == [
        ("fit", 0, "good")
    ] * 2 + [("test", 1, "nok")]


def test_the_guides_section_is_in_the_report(extended: dict[str, Any], tmp_path: Path) -> None:
    page = build_report(write_study(tmp_path / "run", ["alpha"])).page.read_text()
    assert "What false rejects cost" in page
    assert "Good parts rejected a shift" in page
