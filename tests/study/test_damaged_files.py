"""What a power cut or a bad disk leaves of a study's files: cut short at any length, or with a
flipped byte.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clsnf.core.config import DetectorSettings, StudySettings
from clsnf.core.errors import DataError, OutputError
from clsnf.reporting.build import build_report
from clsnf.results import (
    CategoryResult,
    FinishedCategory,
    StoredRequest,
    StudyIdentity,
    StudySummary,
    TrialResult,
    from_plain,
    read_result,
    read_trials,
    write_result,
    write_trials,
)
from clsnf.study.folder import StudyFolder, claim_folder
from clsnf.study.progress_notes import FileNotes, ProgressNote, progress_notes
from clsnf.study.request import StudyRequest
from clsnf.study.space import DEFAULT_SPACE, Space
from clsnf.study.stored_request import read_request
from clsnf.study.trials import CategoryTrials, SearchPlan, open_storage
from clsnf.study.warm_start import read_earlier_trials
from tests.support.made_up_study import write_study


def damaged(content: bytes, flips: int = 60) -> Iterator[bytes]:
    """A file's content, damaged in many ways."""
    for length in (0, 1, len(content) // 3, len(content) // 2, len(content) - 2):
        yield content[:length]
    rng = random.Random(0)
    for _ in range(flips):
        wrong = bytearray(content)
        wrong[rng.randrange(len(wrong))] ^= 1 << rng.randrange(8)
        yield bytes(wrong)
    yield b"\0" * len(content)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study with every file that is read again."""
    folder = write_study(tmp_path_factory.mktemp("study") / "run", ["nut"])
    request = StudyRequest([], folder, DetectorSettings(), StudySettings(), Space(DEFAULT_SPACE))
    write_result(folder / "request.json", request.stored())
    summary = read_result(StudySummary, folder / "summary.json")
    winner = summary.categories["nut"].winner
    assert winner is not None
    StudyFolder(str(folder)).write_finished("nut", "key", winner, "test")
    plan = SearchPlan(Space(DEFAULT_SPACE).distributions(), 2, {"pixel_ap": "maximize"}, 0, True)
    (folder / "optuna.journal").unlink(missing_ok=True)
    trials = CategoryTrials(open_storage(None, folder), "nut", "nut", plan, [])
    for _ in range(2):
        number, _ = trials.begin()
        trials.fail(number, "made up")
    return folder


@pytest.fixture
def copy(study: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(study, tmp_path / "run"))


READERS: list[tuple[str, Callable[[Path], Any]]] = [
    ("study.json", lambda path: read_result(StudyIdentity, path)),
    ("summary.json", lambda path: read_result(StudySummary, path)),
    ("finished/nut.json", lambda path: read_result(FinishedCategory, path)),
    ("request.json", lambda path: read_result(StoredRequest, path)),
    ("request.json", lambda path: read_request(path.parent)),
    ("trials.parquet", read_trials),
]


@pytest.mark.parametrize(("name", "read"), READERS)
def test_a_damaged_file_is_named_in_one_line(
    name: str, read: Callable[[Path], Any], copy: Path
) -> None:
    path = copy / name
    refused: list[OutputError] = []
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        try:
            read(path)
        except OutputError as error:
            refused.append(error)
    assert len(refused) >= 5
    assert all(path.name in str(error) and "\n" not in str(error) for error in refused)


def test_a_winner_in_a_damaged_file_is_found_anew(copy: Path) -> None:
    folder, path = StudyFolder(str(copy)), copy / "finished" / "nut.json"
    found = folder.read_finished("nut", "key", "test")
    assert found is not None
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        folder.read_finished("nut", "key", "test")
    path.write_bytes(path.read_bytes()[:100])
    assert folder.read_finished("nut", "key", "test") is None
    folder.write_finished("nut", "key", found, "test")
    assert folder.read_finished("nut", "key", "other test images") is None


@pytest.mark.parametrize(
    "name", ["trials.parquet", "summary.json", "study.json", "finished/nut.json", "optuna.journal"]
)
def test_a_report_does_without_a_damaged_file(name: str, copy: Path, tmp_path: Path) -> None:
    path = copy / name
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\0" * len(whole)):
        path.write_bytes(content)
        built = build_report(copy, tmp_path / "report")
        assert (tmp_path / "report" / "report.html").is_file()
        assert all("\n" not in line for line in built.missing)
        if name == "trials.parquet":
            assert "The trials are read from optuna.journal instead." in built.missing
        if name == "summary.json":
            assert any("made anew by clsnf study --resume" in line for line in built.missing)


def test_a_warm_start_reads_the_journal_where_the_table_is_torn(copy: Path) -> None:
    table = copy / "trials.parquet"
    table.write_bytes(table.read_bytes()[:200])
    found = read_earlier_trials(copy)
    assert [(trial.category, trial.status) for trial in found] == [("nut", "failed")] * 2
    (copy / "optuna.journal").unlink()
    with pytest.raises(DataError, match=r"no readable trials.parquet or optuna.journal"):
        read_earlier_trials(copy)


def test_a_damaged_progress_note_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / ".progress"
    folder.mkdir()
    note = b'{"category": "nut", "task": "t", "done": 1, "total": 2, "at": 9999999999.0}'
    good = ProgressNote("nut", "t", 1, 2, 9999999999.0)
    (folder / "nut.1.json").write_bytes(note)
    assert progress_notes(FileNotes(tmp_path)) == [good]
    for content in (*damaged(note), b"5", b'"x"', note.replace(b"1", b'"one"'), b"[]"):
        (folder / "nut.2.json").write_bytes(content)
        assert all(isinstance(found.done, int) for found in progress_notes(FileNotes(tmp_path)))
        assert good in progress_notes(FileNotes(tmp_path))


def test_a_folder_of_a_study_that_was_killed_at_its_start_is_begun_again(tmp_path: Path) -> None:
    for name in (".lock", "request.json", "optuna.journal", ".study.json.0a1b2c3d.part"):
        (tmp_path / name).touch()
    claim_folder(tmp_path, resume=False)
    (tmp_path / "optuna.journal").write_text("{}\n")
    with pytest.raises(OutputError, match=re.escape(f"{tmp_path} is in use")):
        claim_folder(tmp_path, resume=False)


def test_tables_and_results_are_on_the_disk_before_they_have_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr("clsnf.core.files._sync", lambda path: synced.append(path.name))
    write_trials(tmp_path / "trials.parquet", [TrialResult("nut", 0, "failed")])
    write_result(tmp_path / "study.json", CategoryResult())
    assert [name.split(".")[1] for name in synced if name.endswith(".part")] == ["trials", "study"]
    assert synced.count(tmp_path.name) == 2
    assert from_plain(CategoryResult, {}, "it") == CategoryResult()
