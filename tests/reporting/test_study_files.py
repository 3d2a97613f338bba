"""Files of a study that are damaged or newer: what is whole is read all the same."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from clsnf.cli import main
from clsnf.reporting.build import build_report
from clsnf.reporting.joint_choices import JointLabels
from clsnf.reporting.study_files import read_study
from clsnf.results import read_trials, write_trials
from tests.support.made_up_study import change, put, write_study


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_study(tmp_path / "night", ["alpha", "beta"])


def content(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("value", ["0.5", True, None, [0.5]])
def test_a_metric_of_another_type_is_no_number_and_costs_its_category_alone(
    run: Path, value: Any
) -> None:
    test = content(run / "summary.json")["categories"]["alpha"]["test"]
    change(run, "alpha", test=test | {"figures": test["figures"] | {"pixel_ap": value}})
    built = build_report(run)
    assert built.decisions == {"alpha": "No winner", "beta": "Ready to deploy"}
    (line,) = [line for line in built.missing if "damaged" in line]
    assert line.startswith("alpha in summary.json is damaged")
    assert "pixel_ap" in line


def test_a_category_that_is_damaged_in_the_summary_is_read_from_its_own_file(run: Path) -> None:
    result = content(run / "summary.json")["categories"]["alpha"]
    put(run / "finished" / "alpha.json", {"rests_on": "x", "result": result})
    change(run, "alpha", threshold=["damaged"])
    assert build_report(run).decisions["alpha"] == "Ready to deploy"


def test_damaged_rows_are_counted_and_left_out(run: Path) -> None:
    for name, key in (("trials.parquet", "category"), ("evidence/alpha/images.parquet", "path")):
        rows = pq.read_table(run / name).to_pylist()
        rows[0][key] = None
        pq.write_table(pa.Table.from_pylist(rows), run / name)
    study = read_study(run)
    alpha, beta = study.products
    assert len(alpha.trials) == len(beta.trials) - 1
    assert len(alpha.images) == len(beta.images) - 1
    for table in ("trials.parquet of night", "images.parquet of alpha"):
        assert any(f"{table}: 1 of " in line and "left out" in line for line in study.missing)


@pytest.mark.parametrize("name", ["summary.json", "study.json"])
def test_a_study_of_a_newer_version_is_refused_in_one_line(run: Path, name: str) -> None:
    put(run / name, content(run / name) | {"format": 99})
    told = CliRunner().invoke(main, ["report", str(run)])
    assert told.exit_code == 2
    (line,) = told.stderr.strip().splitlines()
    assert name in line
    assert "format 99" in line
    assert "newer version" in line


def test_evidence_of_a_newer_version_is_left_out_and_named(run: Path) -> None:
    facts = run / "evidence" / "alpha" / "facts.json"
    put(facts, content(facts) | {"format": 99})
    assert any("facts.json of alpha has format 99" in line for line in build_report(run).missing)


def test_reports_do_not_import_torch() -> None:
    code = (
        "import sys, clsnf.reporting.build, clsnf.reporting.compare;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_joint_choices_have_short_labels_in_tables_and_charts(run: Path) -> None:
    small = {"backbone.name": "demo", "backbone.levels": [1, 2]}
    large = {"backbone.name": "resnet18", "backbone.levels": [1, 2, 3], "image.height": 96}
    summary = content(run / "summary.json")
    summary["space"]["network"] = {"type": "choice", "values": [small, large]}
    for found in summary["categories"].values():
        found["chosen"]["network"] = large
    put(run / "summary.json", summary)
    trials = [
        replace(trial, config={**trial.config, "network": small if trial.number % 2 else large})
        for trial in read_trials(run / "trials.parquet")
    ]
    write_trials(run / "trials.parquet", trials)
    assert read_trials(run / "trials.parquet") == trials
    study = read_study(run)
    shown = {trial.config["network"] for product in study.products for trial in product.trials}
    assert shown == {"demo", "resnet18"}
    winners = [product.winner for product in study.products if product.winner is not None]
    assert [winner.chosen["network"] for winner in winners] == ["resnet18"] * 2
    build_report(run)
    page = (run / "report" / "report.html").read_text()
    assert "(backbone.name demo, backbone.levels [1, 2])" in page, "what was searched, in full"
    numbers = JointLabels(
        {"n": {"type": "choice", "values": [{"seed": 1, "flow.depth": 2}, {"seed": 1}]}}
    )
    assert numbers.config({"n": {"seed": 1}, "x": 2}) == {"n": "as set", "x": 2}
