"""Leases by real processes and threads: one holder at a time, a dead one's lease is free, a living
one's is not.
"""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from clsnf.training import leases
from clsnf.training.leases import FileLeases

FORK = multiprocessing.get_context("fork")


def _add_one(folder: Path, times: int) -> None:
    """Read, pause, write: two at once would lose a count."""
    counter = folder / "counter"
    for _ in range(times):
        with FileLeases(folder / "leases").hold("work"):
            value = int(counter.read_text())
            time.sleep(0.002)
            counter.write_text(str(value + 1))


def _hold_for_ever(folder: Path) -> None:
    with FileLeases(folder / "leases", heartbeat=0.05).hold("work"):
        (folder / "held").touch()
        signal.pause()


def _wait_for(path: Path) -> None:
    for _ in range(1000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} never came")


def test_many_processes_and_threads_take_turns(tmp_path: Path) -> None:
    (tmp_path / "counter").write_text("0")
    workers: list[Any] = [FORK.Process(target=_add_one, args=(tmp_path, 15)) for _ in range(4)]
    workers += [threading.Thread(target=_add_one, args=(tmp_path, 15)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert (tmp_path / "counter").read_text() == "90"
    assert [p.name for p in (tmp_path / "leases").iterdir()] == []


def test_different_names_do_not_wait_for_each_other(tmp_path: Path) -> None:
    held = FileLeases(tmp_path)
    with held.hold("one"), held.hold("two"):
        assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_holders_lease_is_free_at_once(tmp_path: Path) -> None:
    holder = FORK.Process(target=_hold_for_ever, args=(tmp_path,))
    holder.start()
    _wait_for(tmp_path / "held")
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    done = threading.Event()

    def take() -> None:
        with FileLeases(tmp_path / "leases", lifetime=3600).hold("work"):
            done.set()

    threading.Thread(target=take, daemon=True).start()
    assert done.wait(20), "the dead holder's process number was not looked at"


def test_a_stopped_holder_on_another_machine_loses_its_lease_and_a_beating_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_machine", lambda: "another")
    holder = FORK.Process(
        target=_hold_for_ever, args=(tmp_path,)
    )  # forked: it writes the other machine's name
    holder.start()
    _wait_for(tmp_path / "held")
    monkeypatch.setattr(leases, "_machine", lambda: "this one")
    done = threading.Event()

    def take() -> None:
        with FileLeases(tmp_path / "leases", lifetime=3.0).hold("work"):
            done.set()
            time.sleep(0.3)

    taking = threading.Thread(target=take)
    taking.start()
    try:
        assert not done.wait(4.0), "it beats every 0.05 s"
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGSTOP)  # as a machine that lost its network: alive, and silent
        assert done.wait(30)
        os.kill(holder.pid, signal.SIGCONT)
        taking.join()
        with FileLeases(tmp_path / "leases", lifetime=3.0).hold("work"):
            pass  # the sleeper that woke up holds nothing any more
    finally:
        holder.kill()
        holder.join()


def test_a_lease_ends_with_an_error_in_the_block(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), FileLeases(tmp_path).hold("work"):
        _ = 1 / 0
    with FileLeases(tmp_path).hold("work"):
        pass


@pytest.mark.parametrize(
    "content",
    [
        b"",  # a node that died between creating and writing, on a file system without links
        b'{"owner": {"machine": "a',
        b"\0\0\0\0",
        b"\xff\xfe",
        b"null",
        b"{}",
        b'{"owner": null}',
        b'{"owner": {}}',
        b'{"owner": {"machine": "HERE", "pid": 1}}',
        b'{"owner": {"machine": "HERE", "pid": "1", "born": 1.0, "token": "a"}}',
        b'{"owner": {"machine": "HERE", "pid": -1, "born": 1.0, "token": "a"}}',
        b'{"owner": {"machine": "HERE", "pid": 1, "born": null, "token": "a"}}',
    ],
)
def test_a_damaged_lease_file_is_waited_for_and_then_taken(tmp_path: Path, content: bytes) -> None:
    content = content.replace(b"HERE", leases._machine().encode())
    (tmp_path / "work.7").write_bytes(content)
    began = time.monotonic()
    with FileLeases(tmp_path, lifetime=0.2).hold("work"):
        assert time.monotonic() - began > 0.2
        assert [p.name for p in tmp_path.iterdir()] == ["work.8"]


def test_a_lease_that_is_damaged_while_it_is_held_is_written_anew_by_its_holder(
    tmp_path: Path,
) -> None:
    with FileLeases(tmp_path, heartbeat=0.05).hold("work"):
        (tmp_path / "work.0").write_bytes(b"\0")
        for _ in range(1000):
            if (tmp_path / "work.0").read_bytes() != b"\0":
                break
            time.sleep(0.01)
        assert b"owner" in (tmp_path / "work.0").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_a_lease_that_is_damaged_as_it_ends_fails_nothing(tmp_path: Path) -> None:
    with FileLeases(tmp_path).hold("work"):
        (tmp_path / "work.0").write_bytes(b"{")
    with FileLeases(tmp_path, lifetime=0.2).hold("work"):
        pass
    assert list(tmp_path.iterdir()) == []
