"""Notes of workers: small files that the driver reads, and that may get lost without harm."""

import json
import threading
import time
from pathlib import Path

from clsnf.study.progress_notes import FileNotes, NotedProgress, progress_notes, report_notes


def test_a_note_says_where_a_worker_is_until_the_task_ends(tmp_path: Path) -> None:
    progress = NotedProgress(FileNotes(tmp_path), "nut")
    progress("finetune", 1, 8)
    (note,) = progress_notes(FileNotes(tmp_path))
    assert (note.category, note.task, note.done, note.total) == ("nut", "finetune", 1, 8)
    progress("finetune", 8, 8)
    assert progress_notes(FileNotes(tmp_path)) == []


def test_notes_are_written_twice_a_second_at_most(tmp_path: Path) -> None:
    progress = NotedProgress(FileNotes(tmp_path), "nut")
    for done in range(1, 1000):
        progress("features", done, 100_000)
    assert progress_notes(FileNotes(tmp_path))[0].done < 999


def test_old_and_damaged_notes_are_left_out(tmp_path: Path) -> None:
    NotedProgress(FileNotes(tmp_path), "nut")("flow", 1, 2)
    (file,) = (tmp_path / ".progress").glob("*.json")
    old = json.loads(file.read_text()) | {"at": time.time() - 3600}
    (tmp_path / ".progress" / "old.json").write_text(json.dumps(old))
    (tmp_path / ".progress" / "cut.json").write_text('{"category": "nu')
    assert len(progress_notes(FileNotes(tmp_path))) == 1


def test_a_folder_that_cannot_be_written_costs_the_note_and_nothing_else(tmp_path: Path) -> None:
    NotedProgress(FileNotes(tmp_path / "gone"), "nut")("flow", 1, 2)
    NotedProgress(FileNotes(tmp_path / "gone"), "nut")("flow", 2, 2)
    assert progress_notes(FileNotes(tmp_path / "gone")) == []
    assert list(tmp_path.iterdir()) == []


def test_notes_are_reported_while_the_block_runs(tmp_path: Path) -> None:
    seen = threading.Event()
    NotedProgress(FileNotes(tmp_path), "nut")("flow", 1, 2)
    with report_notes(FileNotes(tmp_path), lambda notes: seen.set() if notes else None, every=0.01):
        assert seen.wait(10)
    threads = threading.active_count()
    with report_notes(FileNotes(tmp_path), lambda notes: None):
        assert threading.active_count() == threads + 1
    assert threading.active_count() == threads
