"""What a watch remembers: over restarts, bounded, for each output apart."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clsnf.core.errors import OutageError, OutputError
from clsnf.watching.state import State
from tests.support.watching import made_result


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., State]]:
    states: list[State] = []

    def open_state(outputs: tuple[str, ...] = ("out", "mqtt"), limit: int = 100) -> State:
        for state in states:
            state.close()
        states.append(State(tmp_path / "state", outputs, limit, lines.append))
        return states[-1]

    lines: list[str] = []
    open_state.lines = lines  # type: ignore[attr-defined]
    yield open_state
    for state in states:
        state.close()


def test_results_wait_for_each_output_in_order_and_over_restarts(
    opened: Callable[..., State],
) -> None:
    state = opened()
    added = [state.add(made_result(source=f"{n}.png")) for n in range(5)]
    assert [r.id for r in added] == sorted({r.id for r in added})
    numbered = state.next_for("out", 3)
    assert [result for _, result in numbered] == added[:3]
    state.confirm("out", [n for n, _ in numbered])
    again = opened()
    assert again.waiting() == {"out": 2, "mqtt": 5}
    assert [result for _, result in again.next_for("out", 100)] == added[3:]
    assert [result for _, result in again.next_for("mqtt", 100)] == added
    later = again.add(made_result())
    assert later.id > added[-1].id


def test_what_everybody_has_is_no_longer_on_the_disk(
    opened: Callable[..., State], tmp_path: Path
) -> None:
    state = opened()
    for _ in range(3):
        state.add(made_result())
    for output in ("out", "mqtt"):
        state.confirm(output, [n for n, _ in state.next_for(output, 10)])
    state.close()
    with sqlite3.connect(tmp_path / "state" / "watch.sqlite") as database:
        assert database.execute("SELECT COUNT(*) FROM results").fetchone() == (0,)


def test_of_too_many_results_the_oldest_are_dropped_counted_and_told(
    opened: Callable[..., State],
) -> None:
    state = opened(limit=3)
    added = [state.add(made_result()) for _ in range(8)]
    state.confirm("mqtt", [n for n, _ in state.next_for("mqtt", 2)])
    assert [r for _, r in state.next_for("out", 10)] == added[5:]
    assert state.lost == {"out": 5, "mqtt": 5}
    assert state.waiting() == {"out": 3, "mqtt": 1}
    assert sum("the oldest are dropped" in line for line in opened.lines) == 2  # type: ignore[attr-defined]


def test_judged_files_are_known_by_path_size_and_time(opened: Callable[..., State]) -> None:
    name = os.fsdecode(b"/x/caf\xe9.png")
    opened().add(made_result(source=name, size=5, mtime_ns=7))
    state = opened()
    assert state.was_judged(name, (5, 7))
    assert not state.was_judged(name, (5, 8))
    assert not state.was_judged("/x/other.png", (5, 7))
    state.forget_missing("/y")
    assert state.was_judged(name, (5, 7))
    state.forget_missing("/x")
    assert not opened().was_judged(name, (5, 7))


def test_a_folder_belongs_to_one_watch(opened: Callable[..., State], tmp_path: Path) -> None:
    opened()
    with pytest.raises(OutputError, match="in use by another watch"):
        State(tmp_path / "state", [], 1, print)


def test_a_damaged_memory_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "watch.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(OutputError, match="move it away"):
        State(tmp_path, [], 1, print)
    (tmp_path / "watch.sqlite").unlink()
    State(tmp_path, [], 1, print).close()  # the lock is free again


def test_a_database_that_can_not_be_written_is_an_outage(
    opened: Callable[..., State], tmp_path: Path
) -> None:
    state = opened()
    other = sqlite3.connect(tmp_path / "state" / "watch.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    state._database.execute("PRAGMA busy_timeout=50")
    with pytest.raises(OutageError):
        state.add(made_result(source="/x/a.png", size=1, mtime_ns=2))
    assert not state.was_judged("/x/a.png", (1, 2))
    other.close()
    state.add(made_result())
    assert state.waiting() == {"out": 1, "mqtt": 1}
