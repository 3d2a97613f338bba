"""Results as types: round trips, the files' keys of earlier versions, damage, newer formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import create_study
from optuna.trial import TrialState, create_trial

from clsnf.core.config import DetectorSettings, StudySettings, to_dict
from clsnf.core.errors import OutputError
from clsnf.results import (
    FORMAT,
    LATENCY,
    CategoryResult,
    CellResult,
    EvidenceFacts,
    FailedTrial,
    FinishedCategory,
    ImageEvidence,
    Measurements,
    RegionEvidence,
    StreamTotals,
    StudyIdentity,
    StudySummary,
    TrialResult,
    WinnerResult,
    from_plain,
    read_result,
    read_table,
    read_trials,
    to_plain,
    trials_of_journal,
    write_result,
    write_rows,
    write_table,
    write_trials,
)

# ---- files as earlier versions wrote them: without a format, with the names of then ----

SETTINGS = to_dict(DetectorSettings())
METRICS = {"image_auroc": 0.95, "pixel_ap": 0.31}
WINNER: dict[str, Any] = {
    "winner": "/runs/night/winners/gear",
    "trial": 0,
    "settings": SETTINGS,
    "chosen": {"fusion_weight": 0.8, "finetune_epochs": 8, "score_weight": 0.7},
    "validation": {"pixel_ap": 0.35, "families": {"crack": {"pixel_ap": 0.35}}},
    "threshold": {
        "value": 0.159,
        "false_reject_rate": 0.01,
        "supported_rate": 0.038,
        "normals": 25,
        "interval": [0.001, 0.137],
    },
    "object_mask": {"kind": "bright", "reason": "the product is brighter"},
    "sweeps": [{"config": {"finetune_epochs": 8}, "weights": [[0.0, 0.24], [0.02, 0.26]]}],
    "rules": {"mean": {"config": {"finetune_epochs": 8}, "fusion_weight": 0.8}},
    "test": {
        "figures": METRICS,
        "counts": {"good": 12, "burr": 6},
        "false_reject_rate": 0.08,
        "recall": 0.92,
        "scores": [
            {
                "path": "/data/gear/test/burr/000.png",
                "defect_type": "burr",
                "label": 1,
                "score": 0.4,
                "verdict": True,
            }
        ],
    },
    "regret": {
        "fusion_weight": {
            "pixel_ap": {"selected": 0.31, "oracle": 0.37, "regret": 0.06, "weight": 0.0}
        },
        "trial": {
            "pixel_ap": {
                "selected": 0.31,
                "oracle": 0.37,
                "regret": 0.06,
                "trial": None,
                "weight": 0.0,
            }
        },
        "rules": {"mean": {"pixel_ap": 0.31}},
    },
    "front": [
        {
            "trial": 2,
            "config": {"flow_depth": 4},
            "objectives": {"pixel_ap": 0.3, "latency": 12.5},
            "detector": "/runs/night/front/gear/trial-2",
        }
    ],
    "examples": "/runs/night/examples/gear.png",
    "evidence": {
        "folder": "/runs/night/evidence/gear",
        "intervals": {"pixel_ap": [0.26, 0.39]},
        "baseline": {
            "figures": METRICS,
            "intervals": {"pixel_ap": [0.2, 0.3]},
            "recall": 0.5,
            "false_reject_rate": 0.0,
            "gain": {"pixel_ap": {"low": 0.01, "high": 0.1, "ahead": 0.99}},
            "depth": 2,
        },
    },
    "seconds": 33.5,
}
CATEGORY: dict[str, Any] = {
    "finished_trials": 3,
    "stopped_trials": 1,
    "failed_trials": [{"trial": 4, "cause": "TrainingError: the loss is not finite"}],
    **WINNER,
    "skipped": [{"path": "/data/gear/train/good/004.png", "cause": "it is cut short"}],
    "stream": {"images": 2343, "waited_seconds": 1.7, "images_per_second": {"defects": 1364.9}},
}
NO_WINNER = {
    "finished_trials": 0,
    "stopped_trials": 0,
    "failed_trials": [{"trial": 0, "cause": "TrainingError: no"}],
    "skipped": [],
}
SUMMARY = {
    "clsnf": "0.1.0",
    "at": "2026-11-26T23:13:06+00:00",
    "seconds": 225.1,
    "origin": "/data",
    "backbone": "demo",
    "study": to_dict(StudySettings()),
    "stream": "local, from memory",
    "space": {"fusion_weight": {"type": "float", "low": 0.0, "high": 1.0}},
    "settings": SETTINGS,
    "categories": {"gear": CATEGORY, "tire": NO_WINNER},
}
IDENTITY = {
    "settings": SETTINGS,
    "space": {"flow_depth": {"type": "choice", "values": [0, 2, 4]}},
    "data": {"gear": "7cf37785a19c162d0cafe8cc6b8e652ef0e5f741"},
    "objectives": ["pixel_ap"],
    "studies": "night-0a1b2c/",
    "copy": "night",
}
FINISHED = {"rests_on": "0f1e2d3c", "result": WINNER}
FACTS = {
    "shown": "test",
    "pictures": [
        {
            "kind": "miss",
            "path": "/data/gear/test/burr/006.png",
            "defect_type": "burr",
            "label": 1,
            "score": 0.12,
            "files": {"input": "miss-0-input.webp", "truth": "miss-0-truth.webp"},
        }
    ],
    "map_threshold": 0.16,
    "losses": {"finetuning": [0.07, 0.05], "flows": [[1.5, 1.2], [0.7, 0.5]]},
    "frozen_epochs": 16,
    "machine": {"system": "Linux x86_64", "cpus": 2, "memory_gib": 23.5, "device": "cpu"},
    "versions": {"clsnf": "0.1.0", "torch": "2.14.1"},
}
CANDIDATE = {"epoch": 8, "depth": 2, "weight": 0.25, "score_weight": None, "pixel_ap": 0.4}
CHOSEN = {"epoch": 8, "depth": 2, "weight": 0.25, "score_weight": 0.5}
CELL = {
    "variant": "shipped",
    "category": "screw",
    "seed": 1,
    "identity": "a1b2",
    "at": "2026-11-26T23:13:06+00:00",
    "systems": {
        "flow": {
            "candidates": [CANDIDATE],
            "selected": CHOSEN,
            "last": CHOSEN,
            "validation": {"pixel_ap": 0.4},
            "families": {"crack": {"pixel_ap": 0.4}},
            "test": {
                "selected": METRICS,
                "last": METRICS,
                "oracle": METRICS,
                "intervals": {"pixel_ap": [0.2, 0.4]},
                "fused_ahead_by": {"pixel_ap": {"low": 0.01, "high": 0.1, "ahead": 1.0}},
            },
        }
    },
    "object_mask": {"kind": "off", "reason": "as asked"},
    "images": {"fit": 40, "validation": 10, "test": 30, "validation set": 138},
    "seconds": {"reading": 1.5},
    "cost": None,
    "stages": {"computed": {"maps": 2}, "reused": {}},
}
FILES: dict[type, dict[str, Any]] = {
    StudySummary: SUMMARY,
    StudyIdentity: IDENTITY,
    FinishedCategory: FINISHED,
    EvidenceFacts: FACTS,
    CellResult: CELL,
}
every_file = pytest.mark.parametrize("cls", FILES, ids=lambda cls: cls.__name__)


def lacking(content: Any, written: Any, place: str = "") -> list[str]:
    """Places where `written` lacks an entry of `content`, or has another value."""
    if isinstance(content, dict) and isinstance(written, dict):
        return [
            found
            for name, value in content.items()
            for found in (
                lacking(value, written[name], f"{place}.{name}")
                if name in written
                else [f"{place}.{name}"]
            )
        ]
    if isinstance(content, list) and isinstance(written, list) and len(content) == len(written):
        pairs = enumerate(zip(content, written, strict=True))
        return [found for n, (a, b) in pairs for found in lacking(a, b, f"{place}[{n}]")]
    return [] if content == written else [place]


@every_file
def test_a_file_of_an_earlier_version_is_read_and_written_with_the_same_keys(
    cls: type, tmp_path: Path
) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(FILES[cls]))
    result: Any = read_result(cls, path)
    write_result(path, result)
    written = json.loads(path.read_text())
    assert lacking(FILES[cls], written) == []
    assert written["format"] == FORMAT
    assert read_result(cls, path) == result


def test_entries_have_their_new_names_in_the_types() -> None:
    summary = from_plain(StudySummary, SUMMARY, "summary.json")
    gear, tire = summary.categories["gear"], summary.categories["tire"]
    assert gear.winner is not None
    assert gear.winner.test is not None
    assert gear.winner.test.metrics == METRICS
    assert gear.winner.folder == "/runs/night/winners/gear"
    assert gear.winner.validation.families == {"crack": {"pixel_ap": 0.35}}
    assert gear.winner.settings == DetectorSettings()
    assert gear.failed_trials == [FailedTrial(4, "TrainingError: the loss is not finite")]
    assert (tire.winner, tire.error, tire.finished_trials) == (None, None, 0)
    assert summary.version == "0.1.0"


def test_a_category_is_written_alone_as_in_its_summary() -> None:
    category = from_plain(CategoryResult, CATEGORY, "gear")
    assert lacking(CATEGORY, to_plain(category)) == []
    assert list(to_plain(category))[:4] == [
        "finished_trials",
        "stopped_trials",
        "failed_trials",
        "winner",
    ]
    assert to_plain(from_plain(CategoryResult, NO_WINNER, "tire")) == NO_WINNER


def test_what_a_winner_does_not_have_is_not_written() -> None:
    content = {name: value for name, value in WINNER.items() if name != "front"}
    content["evidence"] = {"folder": "/runs/night/evidence/gear"}
    written = to_plain(from_plain(WinnerResult, content, "winner"))
    assert "front" not in written
    assert written["evidence"] == content["evidence"]


def test_settings_of_an_earlier_version_get_the_defaults_of_what_they_lack() -> None:
    settings = {name: value for name, value in SETTINGS.items() if name != "smoothing"}
    identity = from_plain(StudyIdentity, IDENTITY | {"settings": settings}, "study.json")
    assert identity.settings == DetectorSettings()


def test_what_a_study_of_an_earlier_version_did_not_write_down_is_unknown() -> None:
    identity = from_plain(StudyIdentity, IDENTITY, "study.json")
    assert identity.textures is None
    assert identity.weights is None
    assert (identity.results_version, identity.generator_version) == (None, None)


def test_a_schedule_by_its_old_name_is_the_same() -> None:
    settings = SETTINGS | {"finetune": SETTINGS["finetune"] | {"schedule": "trunk"}}
    identity = from_plain(StudyIdentity, IDENTITY | {"settings": settings}, "study.json")
    assert identity == from_plain(StudyIdentity, IDENTITY, "study.json")


# ---- damage and newer versions ----


@every_file
def test_a_newer_format_is_refused(cls: type, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(FILES[cls] | {"format": FORMAT + 1}))
    said = rf"file\.json has format {FORMAT + 1}, .* formats up to {FORMAT}: use a newer version"
    with pytest.raises(OutputError, match=said):
        read_result(cls, path)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"categories": 1}, "categories"),
        ({"seconds": "soon"}, "seconds"),
        ({"categories": {"gear": CATEGORY | {"trial": "first"}}}, "categories.gear.winner.trial"),
        ({"settings": {"no_such": 1}}, "no_such"),
        ({"categories": {"gear": CATEGORY | {"threshold": {}}}}, "winner.threshold.value"),
    ],
)
def test_damage_is_one_line_with_its_place(
    change: dict[str, Any], place: str, tmp_path: Path
) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(SUMMARY | change))
    with pytest.raises(OutputError, match=r"summary\.json is damaged \(") as raised:
        read_result(StudySummary, path)
    assert place in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00"])
def test_a_file_that_is_no_result_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_text(content)
    with pytest.raises(OutputError, match=r"study\.json is damaged \(.*\): choose another --out\."):
        read_result(StudyIdentity, path, "choose another --out")
    with pytest.raises(OutputError, match=r"gone\.json is damaged"):
        read_result(StudyIdentity, tmp_path / "gone.json")


# ---- trials ----

TRIAL_ROW = {
    "category": "blister",
    "trial": 0,
    "status": "finished",
    "cause": None,
    "objective": 0.31,
    "seconds": 54.6,
    "wall_seconds": 58.9,
    "config/fusion_weight": 0.25,
    "config/backbone.levels": [1, 2],
    "validation_pixel_ap": 0.31,
    "family_crack": 0.14,
    "stream_images": 1775,
    "stream_waited": 4.6,
    "seconds_trunk": 29.9,
    "latency": 12.5,
    "stages_computed": 13,
    "stages_reused": 3,
}
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.text(st.characters(codec="ascii", categories=("Ll", "Nd")), min_size=1, max_size=8)
MEASUREMENTS = st.builds(
    Measurements,
    validation=st.dictionaries(NAMES, NUMBERS, max_size=3),
    families=st.dictionaries(NAMES, NUMBERS, max_size=3),
    latency=st.none() | NUMBERS,
    seconds=st.none() | NUMBERS,
    seconds_by_kind=st.dictionaries(NAMES, NUMBERS, max_size=3),
    artifacts_computed=st.none() | st.integers(0, 100),
    artifacts_reused=st.none() | st.integers(0, 100),
    stream=st.dictionaries(NAMES, NUMBERS | st.integers(0, 2**40), max_size=3),
    traceback=st.none() | st.text(max_size=20),
)
TRIALS = st.builds(
    TrialResult,
    category=NAMES,
    number=st.integers(0, 1000),
    status=st.sampled_from(["finished", "stopped", "failed", "under way"]),
    cause=st.none() | st.text(max_size=20),
    objective=st.none() | NUMBERS,
    wall_seconds=st.none() | NUMBERS,
    config=st.dictionaries(NAMES, NUMBERS | st.integers(-5, 5) | st.text(max_size=5), max_size=3),
    measured=MEASUREMENTS,
)


@given(TRIALS)
def test_a_trial_survives_its_row(trial: TrialResult) -> None:
    assert TrialResult.from_row(trial.to_row()) == trial
    assert Measurements.from_flat(trial.measured.flat()) == trial.measured


def test_a_row_of_an_earlier_version_is_read_and_written_with_the_same_columns() -> None:
    trial = TrialResult.from_row(TRIAL_ROW)
    assert trial.to_row() == TRIAL_ROW
    assert trial.config == {"fusion_weight": 0.25, "backbone.levels": [1, 2]}
    assert trial.measured.seconds_by_kind == {"trunk": 29.9}
    assert trial.value_of("pixel_ap") == 0.31
    assert trial.value_of(LATENCY) == 12.5


def test_an_objective_that_was_not_measured_is_a_key_error() -> None:
    for name in ("au_pro", LATENCY):
        with pytest.raises(KeyError, match=name):
            TrialResult("nut", 0, "failed").value_of(name)


def test_trials_of_different_kinds_share_a_table(tmp_path: Path) -> None:
    trials = [
        TrialResult.from_row(TRIAL_ROW),
        TrialResult("nut", 0, "failed", cause="TrainingError: no", config={"flow_depth": 2}),
        TrialResult("nut", 1, "stopped"),
    ]
    write_trials(tmp_path / "trials.parquet", trials)
    assert read_trials(tmp_path / "trials.parquet") == trials
    write_trials(tmp_path / "none.parquet", [])
    assert read_trials(tmp_path / "none.parquet") == []


def test_a_damaged_table_of_trials_is_one_line_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "trials.parquet"
    path.write_text("no table")
    with pytest.raises(OutputError, match=r"trials\.parquet is damaged \("):
        read_trials(path)
    write_table(path, pa.table({"category": ["nut"], "status": ["finished"]}))
    with pytest.raises(OutputError, match=r"trials\.parquet, row 0 is damaged \(number: "):
        read_trials(path)
    write_table(path, pa.table({"category": ["nut"], "trial": [1], "status": ["lost"]}))
    with pytest.raises(OutputError, match=r"trials\.parquet, row 0 is damaged \(status: "):
        read_trials(path)


def test_the_trials_of_a_journal_are_those_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "optuna.journal"
    study = create_study(storage=JournalStorage(JournalFileBackend(str(path))), study_name="a/nut")
    distributions = {
        "fusion_weight": FloatDistribution(0, 1),
        "flow_depth": CategoricalDistribution([0, 2]),
    }
    params = {"fusion_weight": 0.5, "flow_depth": 2}
    attributes = {"validation_pixel_ap": 0.5, "seconds": 2.0, "stages_reused": 1}
    for state, value, more in (
        (TrialState.COMPLETE, 0.5, {}),
        (TrialState.FAIL, None, {"cause": "TrainingError: no"}),
        (TrialState.RUNNING, None, {}),
        (TrialState.WAITING, None, {}),
    ):
        study.add_trial(
            create_trial(
                state=state,
                value=value,
                params=params,
                distributions=distributions,
                user_attrs=attributes | more,
            )
        )
    trials = trials_of_journal(path)
    assert [(t.category, t.number, t.status) for t in trials] == [
        ("nut", 0, "finished"),
        ("nut", 1, "failed"),
        ("nut", 2, "under way"),
    ]
    assert [t.objective for t in trials] == [0.5, None, None]
    assert [t.cause for t in trials] == [None, "TrainingError: no", None]
    assert trials[0].config == params
    assert trials[0].measured == Measurements({"pixel_ap": 0.5}, seconds=2.0, artifacts_reused=1)
    whole = path.read_bytes()
    torn_line = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole + torn_line[:20] + torn_line + torn_line)
    assert trials_of_journal(path) == trials, "what follows a torn line is left out"


# ---- rows of the evidence ----

IMAGE_ROW = {
    "split": "test",
    "path": "/data/gear/test/good/000.png",
    "defect_type": "good",
    "label": 0,
    "score": 0.12,
    "verdict": False,
    "baseline_score": 0.44,
}
REGION_ROW = {
    "path": "/data/gear/test/burr/000.png",
    "defect_type": "burr",
    "pixels": 256,
    "share": 0.004,
    "contrast": None,
    "overlap": 1.0,
    "found": True,
    "rejected": True,
}


def read_rows(cls: type[Any], path: Path) -> list[Any]:
    """The rows of a table as a type."""
    rows = enumerate(read_table(path))
    return [from_plain(cls, row, f"{path}, row {number}") for number, row in rows]


@pytest.mark.parametrize(("cls", "row"), [(ImageEvidence, IMAGE_ROW), (RegionEvidence, REGION_ROW)])
def test_rows_of_the_evidence_are_read_and_written_with_the_same_columns(
    cls: type, row: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "rows.parquet"
    write_table(path, pa.Table.from_pylist([row, row]))
    rows: list[Any] = read_rows(cls, path)
    assert to_plain(rows) == [row, row]
    write_rows(path, rows)
    assert read_rows(cls, path) == rows
    write_rows(path, [])
    assert read_rows(cls, path) == []
    write_table(path, pa.Table.from_pylist([row, row | {"label": None, "pixels": None}]))
    with pytest.raises(OutputError, match=r"rows\.parquet, row 1 is damaged \((label|pixels): "):
        read_rows(cls, path)


@given(st.builds(StreamTotals, st.integers(0), NUMBERS, st.dictionaries(NAMES, NUMBERS)))
def test_totals_survive_json(totals: StreamTotals) -> None:
    plain = json.loads(json.dumps(to_plain(totals)))
    assert from_plain(StreamTotals, plain, "totals") == totals
