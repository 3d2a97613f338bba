"""The benchmark as a user runs it, on two small products: its files, and how it goes on."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from clsnf.benchmark import cell as cell_module
from clsnf.benchmark.request import BASE
from clsnf.benchmark.run import read_cells
from clsnf.benchmark.systems import (
    SYSTEMS,
    Candidate,
    ComponentMaps,
    fused_candidates,
    last_candidate,
    single_candidates,
)
from clsnf.benchmark.tables import Spread, long_rows, overview, spread, system_table
from clsnf.cli import main
from clsnf.core.errors import TrainingError
from clsnf.model.score_maps import fuse
from clsnf.results import (
    CandidateResult,
    CellResult,
    MaskReport,
    SystemResult,
    SystemTest,
    read_result,
    write_result,
)
from clsnf.training.pipeline import CategoryPipeline
from tests.support.small_data import tiny_options, write_category

CATEGORIES = ("plate", "screw")  # the authors have metrics for one of them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    for seed, name in enumerate(CATEGORIES):
        write_category(folder / "data" / name, seed=seed, train=12)
    return folder


def run(folder: Path, weights: Path, *more: str, out: str = "out") -> Any:
    options = ["--data", str(folder / "data"), "--out", str(folder / out), *tiny_options(weights)]
    return CliRunner().invoke(
        main,
        [
            "benchmark",
            *options,
            "--set",
            "finetune.joint_epochs=2",
            "--set",
            "finetune.decay_epochs=2",
            *more,
        ],
    )


@pytest.fixture(scope="module")
def finished(folder: Path, resnet18_weights: Path) -> Path:
    result = run(folder, resnet18_weights, "--seeds", "2")
    assert result.exit_code == 0, result.output
    return folder / "out"


# ---- what it leaves ----


def test_every_category_and_seed_is_a_cell_of_five_systems_with_three_columns(
    finished: Path,
) -> None:
    cells = read_cells(finished)
    assert [(cell.variant, cell.category, cell.seed) for cell in cells] == [
        (BASE, c, s) for c in CATEGORIES for s in (0, 1)
    ]
    for cell in cells:
        assert list(cell.systems) == list(SYSTEMS)
        for found in cell.systems.values():
            test = found.test
            assert test is not None
            for metric, value in test.oracle.items():
                assert value >= max(test.selected[metric], test.last[metric]) - 1e-12
            for metric, value in test.selected.items():
                low, high = test.intervals[metric]
                assert 0 <= low <= high <= 1
                assert 0 <= value <= 1


def test_the_selected_candidate_is_the_best_on_validation_and_the_last_is_what_the_settings_say(
    finished: Path,
) -> None:
    for cell in read_cells(finished):
        for found in cell.systems.values():
            best = max(candidate.objective or 0.0 for candidate in found.candidates)
            assert found.validation["pixel_ap"] == pytest.approx(best)
        assert cell.systems["fused"].last == CandidateResult(2, 1, 0.25)
        assert cell.systems["classifier"].last == CandidateResult(2, None, 1.0)
        # Where the rate begins to fall, and after each epoch in which it does.
        assert [c.epoch for c in cell.systems["classifier"].candidates] == [0, 1, 2]
        assert [c.depth for c in cell.systems["cflow"].candidates] == [0, 1]


def test_the_work_that_systems_share_is_done_once(finished: Path) -> None:
    for cell in read_cells(finished):
        computed = cell.artifacts["computed"]
        assert computed["finetuned"] == 1
        # depths 0 and 1, on the finetuned backbone and on the pretrained one
        assert computed["flows"] == 4
        cost = cell.cost
        assert cost is not None
        assert 1 < cost["systems_over_trainings"] < cost["everything_over_trainings"]


def test_results_csv_holds_the_metrics_of_the_cells(finished: Path) -> None:
    rows = list(csv.DictReader((finished / "results.csv").open()))
    assert {row["system"] for row in rows} == set(SYSTEMS)
    values = {
        (r["category"], r["seed"], r["system"], r["column"], r["figure"]): float(r["value"])
        for r in rows
    }
    for cell in read_cells(finished):
        for name, found in cell.systems.items():
            key = (cell.category, str(cell.seed), name, "selected", "pixel_ap")
            assert found.test is not None
            assert values[key] == pytest.approx(found.test.selected["pixel_ap"])


def test_a_cell_s_file_keeps_its_keys(finished: Path, tmp_path: Path) -> None:
    """Scripts read these files: what is not there has no key."""
    path = finished / "cells" / BASE / "plate" / "seed-0.json"
    content = json.loads(path.read_text())
    assert list(content) == [
        "variant",
        "category",
        "seed",
        "identity",
        "at",
        "systems",
        "object_mask",
        "images",
        "seconds",
        "cost",
        "stages",
        "format",
    ]
    fused, flow = content["systems"]["fused"], content["systems"]["flow"]
    assert list(fused["selected"]) == ["epoch", "depth", "weight", "score_weight"]
    assert list(fused["candidates"][0]) == [*fused["selected"], "pixel_ap"]
    columns = ["selected", "last", "oracle", "intervals"]
    assert list(fused["test"]) == columns
    assert list(flow["test"]) == [*columns, "fused_ahead_by"]
    assert set(flow["test"]["fused_ahead_by"]["pixel_ap"]) == {"low", "high", "ahead"}
    write_result(tmp_path / "copy.json", read_result(CellResult, path))
    assert json.loads((tmp_path / "copy.json").read_text()) == content


def test_tables_show_the_authors_metrics_only_where_they_have_some(finished: Path) -> None:
    table = (finished / "tables" / "fused.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("|")}
    assert "94.52" in table  # the authors' image AUROC of screw
    assert rows["plate"].split("|")[-2].strip() == "-"
    assert "94.52" not in (finished / "tables" / "cflow.md").read_text()
    assert "±" in (finished / "tables" / "overview.md").read_text()


def test_the_protocol_names_what_produced_the_numbers(finished: Path) -> None:
    protocol = json.loads((finished / "protocol.json").read_text())
    assert set(protocol["data"]) == set(CATEGORIES)
    assert protocol["seeds"] == [0, 1]
    assert protocol["recipes"][BASE]["screw"]["settings"]["flow"]["depth"] == 1
    assert {"torch", "timm", "FrEIA"} <= set(protocol["versions"])


def test_the_ledger_says_when_the_test_images_were_looked_at(finished: Path) -> None:
    entries = [json.loads(line) for line in (finished / "ledger.jsonl").read_text().splitlines()]
    assert sorted(entry["category"] for entry in entries) == sorted(CATEGORIES * 2)


# ---- going on ----


def test_finished_cells_are_not_made_again_and_a_lost_one_costs_no_training(
    finished: Path, folder: Path, resnet18_weights: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in finished.glob("cells/*/*/*.json")}
    lost = finished / "cells" / BASE / "screw" / "seed-1.json"
    record = json.loads(lost.read_text())
    lost.unlink()
    result = run(folder, resnet18_weights, "--seeds", "2")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("finished before") == 3
    again = json.loads(lost.read_text())
    assert again["systems"] == record["systems"]
    assert again["stages"]["computed"] == {}
    assert again["cost"] is None
    assert all(path.read_bytes() == content for path, content in before.items() if path != lost)


def test_other_settings_are_refused_and_nothing_is_touched(
    finished: Path, folder: Path, resnet18_weights: Path
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*.json")}
    result = run(folder, resnet18_weights, "--seeds", "2", "--set", "flow.clamp=1.5")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith(
        "was made with other settings or data: choose another --out."
    )
    assert {path: path.read_bytes() for path in finished.rglob("*.json")} == before


def test_a_folder_of_other_things_is_refused(folder: Path, resnet18_weights: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "thesis.txt").write_text("x")
    result = run(folder, resnet18_weights, out="other")
    assert result.exit_code == 2
    assert [p.name for p in (folder / "other").iterdir()] == ["thesis.txt"]


def test_a_cell_that_fails_costs_no_other(
    folder: Path, resnet18_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = CategoryPipeline.flows

    def flows(self: CategoryPipeline, epochs: int, depth: int) -> Any:
        if self.settings.seed == 0:
            raise TrainingError("The loss of a flow became nan.")
        return inner(self, epochs, depth)

    monkeypatch.setattr(CategoryPipeline, "flows", flows)
    result = run(folder, resnet18_weights, "--seeds", "2", "--categories", "plate", out="failing")
    assert result.exit_code == 2
    assert "failed: The loss of a flow became nan." in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: 1 of the cells failed")
    assert [(cell.category, cell.seed) for cell in read_cells(folder / "failing")] == [("plate", 1)]
    monkeypatch.undo()
    assert (
        run(
            folder, resnet18_weights, "--seeds", "2", "--categories", "plate", out="failing"
        ).exit_code
        == 0
    )
    assert len(read_cells(folder / "failing")) == 2


# ---- variants, and the test images ----


def test_variants_stand_beside_the_base_and_test_images_stay_locked(
    folder: Path, resnet18_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "variants.yaml").write_text(
        "no_memory: {flow: {memory: 0}}\nmore-weight: {fusion_weight: 0.7}\n"
    )

    def locked(*_: Any) -> None:
        raise AssertionError("the test images were opened")

    monkeypatch.setattr(cell_module, "record_unlock", locked)
    monkeypatch.setattr(cell_module, "compare_systems", locked)
    more = [
        "--variants",
        str(folder / "variants.yaml"),
        "--seeds",
        "1",
        "--categories",
        "plate",
        "--no-test",
        "--systems",
        "flow,fused",
    ]
    result = run(folder, resnet18_weights, *more, out="variants")
    assert result.exit_code == 0, result.output
    cells = read_cells(folder / "variants")
    assert [cell.variant for cell in cells] == [BASE, "more-weight", "no_memory"]
    assert [list(cell.systems) for cell in cells] == [["flow", "fused"]] * 3
    assert not (folder / "variants" / "ledger.jsonl").exists()
    flow = {cell.variant: cell.systems["flow"].validation for cell in cells}
    assert flow[BASE] == flow["more-weight"] != flow["no_memory"]
    assert "no_memory" in (folder / "variants" / "tables" / "overview.md").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: {}", "'base' must be a name"),
        ("x: 3", "'x' must be a name"),
        ("x: {flow: {dept: 3}}", "There is no setting 'flow.dept'"),
        ("'../x': {}", "must be a name"),
    ],
)
def test_a_variants_file_that_makes_no_sense_is_one_line(
    folder: Path, resnet18_weights: Path, text: str, said: str
) -> None:
    (folder / "bad.yaml").write_text(text)
    result = run(folder, resnet18_weights, "--variants", str(folder / "bad.yaml"), out="bad")
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (folder / "bad").exists()


def test_an_unknown_system_is_one_line(folder: Path, resnet18_weights: Path) -> None:
    result = run(folder, resnet18_weights, "--systems", "fussed", out="bad")
    assert result.exit_code == 2
    assert "Did you mean 'fused'?" in result.stderr


def test_a_damaged_cell_is_named(finished: Path, folder: Path, resnet18_weights: Path) -> None:
    shutil.copytree(finished, folder / "damaged")
    path = folder / "damaged" / "cells" / BASE / "plate" / "seed-0.json"
    path.write_text("{")
    result = run(folder, resnet18_weights, "--seeds", "2", out="damaged")
    assert result.exit_code == 2
    assert f"{path} is damaged" in result.stderr
    assert "delete it, and the cell is made anew." in result.stderr


def test_the_paper_preset_is_each_category_s_own_with_the_authors_baseline(
    folder: Path, resnet18_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clsnf.benchmark import run as run_module
    from clsnf.benchmark.request import BenchmarkRequest

    seen: list[BenchmarkRequest] = []

    def stop(request: BenchmarkRequest, *_: Any) -> None:
        seen.append(request)
        raise TrainingError("stop")

    monkeypatch.setattr(run_module, "run_benchmark", stop)
    arguments = [
        "--data",
        str(folder / "data"),
        "--out",
        str(folder / "paper"),
        "--preset",
        "paper",
        "--seeds",
        "3",
        "--seed",
        "5",
    ]
    result = CliRunner().invoke(main, ["benchmark", *arguments, "--weights", str(resnet18_weights)])
    assert result.stderr.splitlines()[-1] == "error: stop", result.output
    plate, screw = (seen[0].recipes[BASE][name] for name in CATEGORIES)
    assert list(seen[0].seeds) == [5, 6, 7]
    assert (screw.settings.finetune.frozen_epochs, screw.settings.finetune.joint_epochs) == (35, 5)
    assert (plate.settings.finetune.frozen_epochs, plate.settings.finetune.joint_epochs) == (
        85,
        15,
    )  # what most of theirs share
    assert screw.settings.backbone.name == "wide_resnet50_2"
    assert (
        screw.settings.flow.memory,
        screw.settings.flow.neighbourhood,
        screw.settings.flow.start,
    ) == (0, 1, "random")
    assert screw.baseline_passes == 200
    assert screw.settings.fusion_weight == 0.25  # w_fe 1 over three levels


# ---- systems and candidates ----


def component_maps(
    classifier: torch.Tensor, finetuned: torch.Tensor, pretrained: torch.Tensor
) -> ComponentMaps:
    density = {("finetuned", 2): finetuned, ("pretrained", 2): pretrained}
    return ComponentMaps({8: classifier}, density, None, 0.0)


def test_a_system_s_map_is_made_of_its_own_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    classifier, finetuned, pretrained = (torch.rand(2, 4, 4, generator=generator) for _ in range(3))
    maps = component_maps(classifier, finetuned, pretrained)
    expected = {
        "classifier": classifier,
        "flow": finetuned,
        "fused": fuse(finetuned, classifier, 0.3),
        "cflow": pretrained,
        "fused_unshared": fuse(pretrained, classifier, 0.3),
    }
    for name, system in SYSTEMS.items():
        found = maps.scores(system, last_candidate(system, 8, 2, 0.3))
        torch.testing.assert_close(found.maps, expected[name])
        torch.testing.assert_close(found.scores, expected[name].amax(dim=(1, 2)))


def test_image_scores_come_from_the_map_of_their_own_weight() -> None:
    classifier, density = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    maps, system = component_maps(classifier, density, density), SYSTEMS["fused"]
    found = maps.scores(system, Candidate(8, 2, 0.3, 0.0))
    torch.testing.assert_close(found.scores, density.amax(dim=(1, 2)))
    torch.testing.assert_close(found.maps, fuse(density, classifier, 0.3))
    alike = maps.scores(system, Candidate(8, 2, 0.3))
    assert torch.equal(alike.scores, alike.maps.amax(dim=(1, 2)))


def test_the_settings_own_candidate_is_among_those_to_choose_from() -> None:
    for system in SYSTEMS.values():
        last = last_candidate(system, 8, 2, 0.33)
        if system.is_fused:
            candidates = fused_candidates([7, 8], [0, 2], 0.33)
        else:
            candidates = single_candidates(system, [7, 8], [0, 2])
        assert last in candidates
        assert len(candidates) == len(set(candidates))


def test_fused_candidates_are_given_once_where_validation_prefers_the_last() -> None:
    assert len(fused_candidates([8, 8], [2, 2], 0.5)) == 11
    assert len(fused_candidates([7, 8], [2, 2], 0.25)) == 24
    assert Candidate(8, 2, 0.0) in fused_candidates([7, 8], [2, 2], 0.25)


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
