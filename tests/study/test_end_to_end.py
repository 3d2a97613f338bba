"""The real command with real Ray, on three small products, one of them without defects: what a
study leaves, and what ends it early.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import optuna
import psutil
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from clsnf.cli import main
from clsnf.core.config import DetectorSettings, from_dict
from clsnf.data.images import read_image, read_mask
from clsnf.data.layouts import read_category
from clsnf.detector import Detector
from clsnf.evaluation.evaluate import evaluate_detector
from clsnf.evaluation.selection_rules import RULES
from clsnf.metrics import METRICS, image_auroc
from clsnf.reporting.build import build_report
from clsnf.results import to_plain
from clsnf.training.prepare import rows_of
from tests.support.running_study import Study, wait_for_trial
from tests.support.small_data import write_category

pytestmark = pytest.mark.slow

TRIALS = 3
TESTED, UNTESTED = ["alpha", "beta"], "gamma"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, resnet18_weights: Path) -> Study:
    """A finished study."""
    made = Study(tmp_path_factory.mktemp("study"), resnet18_weights)
    write_category(made.data / "alpha", seed=1)
    write_category(made.data / "beta", seed=2, size=(64, 96))
    write_category(made.data / "gamma", seed=3, good=0, defective=0)
    code, stdout, stderr = made.run("--trials", str(TRIALS))
    assert code == 0, stderr
    (made.folder / "stdout").write_text(stdout)
    (made.folder / "stderr").write_text(stderr)
    return made


# ---- what a study leaves ----


def test_the_table_names_every_category_and_where_everything_lies(study: Study) -> None:
    stdout = (study.folder / "stdout").read_text()
    for name in [
        *TESTED,
        UNTESTED,
        "mean",
        str(study.out / "winners"),
        str(study.out / "summary.json"),
    ]:
        assert name in stdout
    for category in TESTED:
        assert (
            f"{study.summary()['categories'][category]['test']['figures']['image_auroc']:.4f}"
            in stdout
        )


def test_every_ended_trial_is_in_the_table_of_trials(study: Study) -> None:
    trials, found = study.trials(), study.summary()["categories"]
    assert sorted((t["category"], t["trial"]) for t in trials) == [
        (c, n) for c in sorted([*TESTED, UNTESTED]) for n in range(TRIALS)
    ]
    for category in [*TESTED, UNTESTED]:
        own = [t for t in trials if t["category"] == category]
        assert len(own) == TRIALS
        finished = [t for t in own if t["status"] == "finished"]
        assert len(finished) == found[category]["finished_trials"] >= 1
        assert own[0]["config/finetune_epochs"] == own[0]["config/flow_depth"] == 1, (
            "the first trial is the settings as they stand"
        )
        for trial in finished:
            swept = dict(json.loads(trial["sweep"]))
            assert trial["objective"] == swept[trial["config/fusion_weight"]] == max(swept.values())
            assert {0.0, 0.25, 1.0} <= swept.keys()
            families = [value for name, value in trial.items() if name.startswith("family_")]
            assert (
                trial["objective"]
                == trial["validation_pixel_ap"]
                == pytest.approx(sum(families) / len(families))
            )


def test_a_trial_whose_loss_is_not_finite_fails_alone_and_is_named(study: Study) -> None:
    trials, found = study.trials(), study.summary()["categories"]
    failed = [t for t in trials if t["status"] == "failed"]
    assert failed, "no trial drew the impossible learning rate: choose another seed"
    stderr = (study.folder / "stderr").read_text()
    for trial in trials:
        assert (trial["status"] == "failed") == (trial["config/finetune.learning_rate"] == 1e30)
    for trial in failed:
        assert trial["objective"] is None
        assert {"trial": trial["trial"], "cause": trial["cause"]} in found[trial["category"]][
            "failed_trials"
        ]
        assert trial["cause"].startswith("TrainingError: The classifier's loss became ")
        assert "lower finetune.learning_rate" in trial["cause"]
        assert (
            f"note: {trial['category']}, trial {trial['trial']} failed: {trial['cause']}" in stderr
        )
    assert all("winner" in category for category in found.values())


def test_the_winner_is_the_best_that_the_last_sweep_saw(study: Study) -> None:
    for category, found in study.summary()["categories"].items():
        swept = [
            (value, sweep["config"], weight)
            for sweep in found["sweeps"]
            for weight, value in sweep["weights"]
        ]
        best = max(value for value, _, _ in swept)
        assert found["validation"]["pixel_ap"] == pytest.approx(best)
        chosen = dict(found["chosen"])
        assert chosen.pop("score_weight") == found["settings"]["score_weight"]
        assert (chosen, best) in [
            ({**config, "fusion_weight": w}, value) for value, config, w in swept
        ]
        own = {
            t["trial"]: t
            for t in study.trials()
            if t["category"] == category and t["status"] == "finished"
        }
        assert best == max(t["objective"] for t in own.values()), "the same number"
        winner = own[found["trial"]]
        assert (
            winner["config/flow_depth"]
            == found["settings"]["flow"]["depth"]
            == found["chosen"]["flow_depth"]
        )
        assert winner["config/finetune_epochs"] == found["settings"]["finetune"]["joint_epochs"]


@pytest.mark.parametrize("category", TESTED)
def test_a_winner_reproduces_its_test_metrics_exactly(study: Study, category: str) -> None:
    found = study.summary()["categories"][category]
    detector = Detector.load(found["winner"])
    assert detector.settings == from_dict(DetectorSettings, found["settings"])
    assert detector.threshold.value == found["threshold"]["value"]
    test = rows_of(read_category(study.data, category), "test")
    assert to_plain(evaluate_detector(detector, test)) == found["test"]
    regions = {name for name, metric in METRICS.items() if metric.regions}
    assert set(found["test"]["figures"]) == set(METRICS) - regions


def test_good_pictures_alone_have_a_winner_and_what_is_left_out_is_said(study: Study) -> None:
    found = study.summary()["categories"][UNTESTED]
    assert found["test"] is None
    assert 0 < found["validation"]["pixel_ap"] <= 1
    detector = Detector.load(found["winner"])
    assert detector.threshold.normals == found["threshold"]["normals"] == 4
    stderr = (study.folder / "stderr").read_text()
    assert (
        "note: gamma has no labelled test pictures with defects: test metrics are left out"
        in stderr
    )
    assert "a false-reject rate of 0.200 at best" in stderr


def test_test_images_are_unlocked_once_a_category_and_after_all_trials(study: Study) -> None:
    ledger = [json.loads(line) for line in (study.out / "ledger.jsonl").read_text().splitlines()]
    assert sorted(entry["category"] for entry in ledger) == TESTED
    for entry in ledger:
        assert entry["opened"] == "test images"
        assert f"trial {study.summary()['categories'][entry['category']]['trial']}," in entry["for"]
    told = (study.folder / "stderr").read_text().splitlines()
    last_trial = max(index for index, line in enumerate(told) if " trials ended: " in line)
    assert all(index > last_trial for index, line in enumerate(told) if line.endswith(": done"))


@pytest.mark.parametrize("category", TESTED)
def test_what_trials_read_holds_no_test_image(study: Study, category: str) -> None:
    test = rows_of(read_category(study.data, category), "test")
    seen = [
        pq.read_table(study.out / "tables" / f"{category}.{name}.parquet")
        for name in ("train", "validation")
    ]
    for table in seen:
        assert "test" not in table["split"].to_pylist()
        assert not set(table["path"].to_pylist()) & set(test["path"].to_pylist())
        assert not set(table["sha256"].to_pylist()) & set(test["sha256"].to_pylist())
    fit, validation = (
        set(rows_of(seen[0], split)["sha256"].to_pylist()) for split in ("fit", "validation")
    )
    assert not fit & validation
    normals = [row["sha256"] for row in seen[1].to_pylist() if row["label"] == 0]
    assert set(normals) == validation, "metrics rest on the normals that training did not see"


def test_the_validation_set_is_a_data_set_to_look_at(study: Study) -> None:
    folder = study.out / "validation" / "alpha"
    assert (folder / "contact_sheet.png").is_file()
    families = sorted(p.name for p in (folder / "ground_truth").iterdir())
    assert families == sorted(study.summary()["categories"]["alpha"]["validation"]["families"])
    for family in families:
        assert len(list((folder / "test" / family).iterdir())) == 2


def test_examples_of_answers_are_pictures(study: Study) -> None:
    for found in study.summary()["categories"].values():
        assert read_image(found["examples"]).std() > 10


@pytest.mark.parametrize("category", TESTED)
def test_the_regret_is_what_an_oracle_would_have_gained(study: Study, category: str) -> None:
    found = study.summary()["categories"][category]
    for choice in found["regret"]["fusion_weight"], found["regret"]["trial"]:
        for metric in ("pixel_ap", "image_auroc"):
            assert choice[metric]["regret"] == pytest.approx(
                choice[metric]["oracle"] - choice[metric]["selected"]
            )
            assert choice[metric]["regret"] >= 0
            assert (
                choice[metric]["selected"] == found["regret"]["fusion_weight"][metric]["selected"]
            )
    for metric in ("pixel_ap", "image_auroc"):
        assert (
            found["regret"]["trial"][metric]["oracle"]
            >= found["regret"]["fusion_weight"][metric]["oracle"]
        )
    assert set(found["rules"]) == set(found["regret"]["rules"]) == set(RULES)
    chosen = {
        k: v for k, v in found["chosen"].items() if k not in ("fusion_weight", "score_weight")
    }
    assert found["rules"]["mean"] == {
        "config": chosen,
        "fusion_weight": found["chosen"]["fusion_weight"],
    }
    assert (
        found["regret"]["rules"]["mean"]["pixel_ap"]
        == found["regret"]["fusion_weight"]["pixel_ap"]["selected"]
    )


def test_trials_can_be_watched_with_tensorboard(study: Study) -> None:
    files = list((study.out / "tune").rglob("events.out.tfevents.*"))
    assert len(files) == 3 * (TRIALS + 1)  # each category's winner is a run too


def test_optunas_own_tools_open_the_trials(study: Study) -> None:
    storage = JournalStorage(JournalFileBackend(str(study.out / "optuna.journal")))
    for category in [*TESTED, UNTESTED]:
        trials = optuna.load_study(study_name=category, storage=storage).trials
        own = [t for t in study.trials() if t["category"] == category]
        assert [t.value for t in trials] == [t["objective"] for t in own]


def test_the_room_that_artifacts_need_is_said_beforehand(study: Study) -> None:
    said = (study.folder / "stderr").read_text()
    (line,) = (line for line in said.splitlines() if line.startswith("disk: up to "))
    number, unit = line.split()[3:5]
    estimate = float(number) * {"MB": 1e6, "GB": 1e9}[unit]
    written = sum(f.stat().st_size for f in (study.out / "stages").rglob("*") if f.is_file())
    assert written < estimate < 10 * written, "most of its trials failed early"


def test_trials_share_artifacts(study: Study) -> None:
    """Three trials and the last choice on at most two backbones: no backbone is trained twice."""
    for kind, most in (("finetuned", 2), ("flows", 4)):
        finite = [t for t in study.trials() if t["status"] == "finished"]
        kinds = {
            (t["category"], t["config/finetune_epochs"], kind == "flows" and t["config/flow_depth"])
            for t in finite
        }
        # The baseline beside the winner: on the pretrained backbone, before training and after it.
        if kind == "flows":
            kinds |= {
                (category, 0, depth)
                for category in study.summary()["categories"]
                for depth in (0, 1)
            }
        made = len(list((study.out / "stages" / kind).iterdir()))
        diverged = (
            len(
                {
                    (t["category"], t["config/finetune_epochs"])
                    for t in study.trials()
                    if t["status"] == "failed"
                }
            )
            * most
        )
        assert len(kinds) <= made <= len(kinds) + diverged
    assert sum(t["stages_reused"] for t in study.trials() if t["status"] == "finished") > 0


# ---- what reports are made from ----


@pytest.mark.parametrize("category", TESTED)
def test_the_evidence_agrees_with_the_summary_and_the_masks(study: Study, category: str) -> None:
    found = study.summary()["categories"][category]
    folder = study.out / "evidence" / category
    images = pq.read_table(folder / "images.parquet").to_pylist()
    test = [row for row in images if row["split"] == "test"]
    assert [(row["path"], row["score"]) for row in test] == [
        (row["path"], row["score"]) for row in found["test"]["scores"]
    ]
    assert [row["verdict"] for row in test] == [row["verdict"] for row in found["test"]["scores"]]
    normals = [row for row in images if row["split"] == "validation" and not row["label"]]
    assert len(normals) == found["threshold"]["normals"]
    assert sum(row["verdict"] for row in normals) == 0, (
        "with so few normals the threshold is the highest of their scores"
    )
    assert image_auroc(
        [row["baseline_score"] for row in test], [row["label"] for row in test]
    ) == pytest.approx(found["evidence"]["baseline"]["figures"]["image_auroc"])
    regions = pq.read_table(folder / "regions.parquet").to_pylist()
    table = rows_of(read_category(study.data, category), "test").to_pylist()
    assert sum(row["pixels"] for row in regions) == sum(
        int(read_mask(row["mask_path"]).sum()) for row in table if row["label"]
    )
    assert all(0 <= row["overlap"] <= 1 and row["found"] == (row["overlap"] > 0) for row in regions)
    assert all(row["contrast"] > 0.1 for row in regions), "they are drawn white or black on grey"


@pytest.mark.parametrize("category", TESTED)
def test_the_baseline_is_judged_on_the_same_images_with_intervals_and_a_paired_gain(
    study: Study, category: str
) -> None:
    found = study.summary()["categories"][category]
    baseline, intervals = found["evidence"]["baseline"], found["evidence"]["intervals"]
    assert baseline["depth"] in (0, 1)
    assert (
        set(baseline["figures"])
        == set(intervals)
        == set(baseline["intervals"])
        == set(baseline["gain"])
        == {name for name, metric in METRICS.items() if not metric.regions}
    )
    for metrics, bounds in (
        (found["test"]["figures"], intervals),
        (baseline["figures"], baseline["intervals"]),
    ):
        for name in ("image_auroc", "pixel_auroc"):
            assert bounds[name][0] - 0.02 <= metrics[name] <= bounds[name][1] + 0.02
    for name, gain in baseline["gain"].items():
        assert gain["low"] <= found["test"]["figures"][name] - baseline["figures"][name] + 0.02, (
            name
        )
        assert gain["high"] >= found["test"]["figures"][name] - baseline["figures"][name] - 0.02, (
            name
        )


def test_a_finished_study_has_a_report_with_pictures_curves_and_what_is_missing(
    study: Study, tmp_path: Path
) -> None:
    built = build_report(study.out, tmp_path / "report")
    found = study.summary()["categories"]
    assert list(built.decisions) == sorted(found)
    assert all("no test images" in line or "failed" in line for line in built.missing)
    assert (
        sum(line.startswith(UNTESTED) and "no test images" in line for line in built.missing) == 1
    )
    facts = {
        name: json.loads((study.out / "evidence" / name / "facts.json").read_text())
        for name in found
    }
    assert [facts[name]["shown"] for name in sorted(found)] == ["test", "test", "validation"]
    for name, known in facts.items():
        assert known["pictures"]
        assert known["losses"]["finetuning"]
        for case in known["pictures"]:
            assert {"input", "density", "classifier", "fused"} <= set(case["files"])
            assert ("truth" in case["files"]) == bool(case["label"])
            for file in case["files"].values():
                assert read_image(study.out / "evidence" / name / "pictures" / file).shape[:2] <= (
                    224,
                    224,
                )


# ---- again ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "is in use: choose another --out, or say --resume OUT to go on with the study in it."),
        (
            ["--resume", "--seed", "1"],
            "was begun with other settings (seed was 0, is 1): choose another --out.",
        ),
        (
            ["--resume", "--categories", "alpha"],
            "was begun with other data (beta is gone; gamma is gone): choose another --out.",
        ),
        (
            ["--resume", "--objectives", "au_pro"],
            "was begun with other objectives (it was ['pixel_ap'], is ['au_pro']): choose "
            "another --out.",
        ),
        (
            ["--resume", "--textures", "data"],
            "was begun with other textures (they were drawn by code, are pictures of --textures): "
            "choose another --out.",
        ),
        (
            ["--resume", "--optuna-storage", "other.journal"],
            "was begun with its trials in its own journal: say the same again.",
        ),
    ],
)
def test_a_folder_in_use_is_refused_for_another_study(
    study: Study, arguments: list[str], said: str
) -> None:
    files = {path: path.stat().st_mtime_ns for path in study.out.rglob("*")}
    base = ["study", "--data", str(study.data), "--out", str(study.out), *study.options]
    given = [str(study.data) if argument == "data" else argument for argument in arguments]
    result = CliRunner().invoke(main, [*base, *given])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {'The study in ' if arguments else ''}{study.out} ")
    assert result.stderr.endswith(f"{said.replace('OUT', str(study.out))}\n")
    assert {path: path.stat().st_mtime_ns for path in study.out.rglob("*")} == files


def test_a_resumed_study_runs_nothing_again_and_leaves_the_test_images_closed(study: Study) -> None:
    before, files = study.summary(), sorted((study.out / "stages").rglob("*"))
    trials, ledger = study.trials(), (study.out / "ledger.jsonl").read_text()
    code, stdout, stderr = study.run("--trials", str(TRIALS), "--resume")
    assert code == 0, stderr
    assert "9 trials ended before: 0 are left" in stderr
    assert sorted((study.out / "stages").rglob("*")) == files
    assert study.trials() == trials
    assert (study.out / "ledger.jsonl").read_text() == ledger
    assert study.summary()["categories"] == before["categories"]
    assert "mean" in stdout


# ---- ended early ----


def tear(out: Path) -> None:
    """What a power cut may leave: half a record, the journal's lock, and a flipped bit in every
    artifact.
    """
    with (out / "optuna.journal").open("ab") as journal:
        journal.write(b'{"op_code":6,"wor')
    lock = out / "optuna.journal.lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(out / "optuna.journal")
    for file in (out / "stages").rglob("tensors.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)


def test_a_study_killed_twice_torn_and_moved_ends_as_an_undisturbed_one(
    study: Study, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for ended, more in ((1, []), (5, ["--resume"])):
        process = study.start("--trials", str(TRIALS), *more, out=out)
        wait_for_trial(process, ended)
        # Ray's agents look for their parent once in a while only.
        started = [
            p
            for p in psutil.Process(process.pid).children(recursive=True)
            if "Agent" not in p.name()
        ]
        process.kill()
        process.communicate()
        assert psutil.wait_procs(started, timeout=30)[1] == [], (
            "Ray's processes end with the driver"
        )
    tear(out)
    moved = out.rename(tmp_path / "moved")
    process = study.start("--trials", str(TRIALS), "--resume", out=moved)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "optuna.journal: the lock of a process that was killed is removed" in stderr
    assert "optuna.journal is torn: what follows its last whole record (1 line, " in stderr
    again = study.at(moved)
    assert "damaged, and computed anew" in stderr
    compared = {"seconds", "wall_seconds", "dropped"} | {
        name for name in study.trials()[0] if name.startswith(("seconds_", "stages_", "stream_"))
    }

    def plain(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in trial.items() if k not in compared and v is not None}
            for trial in trials
        ]

    assert plain(again.trials()) == plain(study.trials())
    for category, found in study.summary()["categories"].items():
        for name in (
            "chosen",
            "settings",
            "validation",
            "threshold",
            "sweeps",
            "test",
            "regret",
            "failed_trials",
        ):
            assert again.summary()["categories"][category][name] == found[name], name


def test_trials_from_scratch_have_the_same_metrics_and_a_front_of_two_objectives_is_saved(
    study: Study, tmp_path: Path
) -> None:
    out, storage = tmp_path / "out", tmp_path / "studies.db"
    options = [
        "--trials",
        "4",
        "--categories",
        "alpha",
        "--no-reuse",
        "--objectives",
        "pixel_ap,latency",
        "--cpus-per-trial",
        "1",
    ]
    options += [
        "--selection",
        "worst",
        "--optuna-storage",
        f"sqlite:///{storage}",
        "--warm-start",
        str(study.out),
    ]
    process = study.start(*options, out=out)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    again = study.at(out)
    config = [name for name in study.trials()[0] if name.startswith("config/")]
    config.remove("config/fusion_weight")
    metrics = [name for name in study.trials()[0] if name.startswith(("family_", "validation_"))]
    earlier = {
        tuple(t[c] for c in config): t
        for t in study.trials()
        if t["category"] == "alpha" and t["status"] == "finished"
    }
    repeated = [t for t in again.trials() if tuple(t[c] for c in config) in earlier]
    assert len(repeated) >= min(3, len(earlier)), "what was best before is tried first"
    for trial in repeated:
        same = earlier[tuple(trial[c] for c in config)]
        assert {name: trial[name] for name in metrics} == {name: same[name] for name in metrics}, (
            "to the last bit"
        )
        assert trial["stages_computed"] > 0
    found = again.summary()["categories"]["alpha"]
    assert found["front"][0]["objectives"]["pixel_ap"] == max(
        t["objective"] for t in again.trials() if t["objective"] is not None
    )
    assert found["chosen"] in [member["config"] for member in found["front"]]
    for member in found["front"]:
        assert member["objectives"]["latency"] > 0
        assert (
            Detector.load(member["detector"]).settings.flow.depth == member["config"]["flow_depth"]
        )
        assert Path(member["detector"]).is_relative_to(out / "front" / "alpha")
    assert f"each a detector in {out / 'front' / 'alpha'}" in stdout
    assert not list(out.glob(".scratch-*"))
    names = optuna.get_all_study_names(f"sqlite:///{storage}")
    assert len(names) == 1
    assert names[0].endswith("/alpha")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_every_process_and_leave_what_was_finished(
    study: Study, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = study.start("--trials", "100", "--categories", "alpha,beta", out=out)
    wait_for_trial(process, 2)
    started = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in p.name() for p in started)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)  # as Kubernetes does
    stdout, stderr = process.communicate(timeout=60)

    assert process.returncode == 128 + number, stderr
    assert stderr.endswith(
        f"interrupted: what was finished is kept; to go on, say clsnf study --resume {out}\n"
    )
    assert "Aborted" not in stderr
    assert "Traceback" not in stderr + stdout
    assert psutil.wait_procs(started, timeout=10)[1] == []
    trials = pq.read_table(out / "trials.parquet").to_pylist()
    assert len(trials) >= 2
    assert any(t["status"] == "finished" for t in trials)
    assert not (out / "summary.json").exists()
    assert not (out / "ledger.jsonl").exists(), (
        "no look at the test images before selection has ended"
    )
    assert list((out / "stages" / "finetuned").iterdir())
    assert not list((out / "stages").rglob("*.part"))
