"""A remote study has one driver: a second one is refused, unless the first is silent."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from clsnf.core.errors import OutputError
from clsnf.core.remote import RemoteFolder
from clsnf.study.driver_lease import DRIVER, DriverLease
from clsnf.training.leases import sign, this_process
from tests.support.object_store import bucket


@pytest.fixture(params=["file", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RemoteFolder]:
    if request.param == "file":
        yield RemoteFolder(f"file://{tmp_path}/remote")
        return
    with bucket() as end:
        yield RemoteFolder(f"s3://bucket/{tmp_path.name}{end}")


def lease(remote: RemoteFolder, said: list[str] | None = None) -> DriverLease:
    say = (lambda line: None) if said is None else said.append
    return DriverLease(remote, say, heartbeat=0.2, lifetime=3.0)


def elsewhere() -> str:
    """A lease of a process on another machine."""
    return sign(replace(this_process(), machine="other-host ns"), 7)


def test_a_second_driver_is_refused_and_the_first_keeps_its_lease(remote: RemoteFolder) -> None:
    with lease(remote).hold() as first:
        said = r"in use by another study right now \(process \d+"
        with pytest.raises(OutputError, match=said), lease(remote).hold():
            pytest.fail("two drivers")
        assert not first.is_lost
        assert json.loads(remote.read(DRIVER) or b"")["count"] > 0
    assert remote.read(DRIVER) is None


def test_a_silent_driver_of_another_machine_loses_its_lease(remote: RemoteFolder) -> None:
    remote.write(DRIVER, elsewhere().encode())
    said: list[str] = []
    with lease(remote, said).hold() as second:
        assert said[0].count("on other-host: waiting for 3 s to see whether it still runs") == 1
        assert not second.is_lost


def test_a_driver_that_lost_its_lease_knows_and_leaves_the_new_one(remote: RemoteFolder) -> None:
    with lease(remote).hold() as first:
        remote.write(DRIVER, elsewhere().encode())
        until = time.monotonic() + 20
        while not first.is_lost and time.monotonic() < until:
            time.sleep(0.05)
        assert first.is_lost
    assert (remote.read(DRIVER) or b"").decode() == elsewhere_of(remote)


def elsewhere_of(remote: RemoteFolder) -> str:
    content = (remote.read(DRIVER) or b"").decode()
    assert json.loads(content)["owner"]["machine"] == "other-host ns"
    return content


def test_a_killed_driver_of_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    remote = RemoteFolder(f"file://{tmp_path}/remote")
    code = (
        "import os, signal\n"
        "from clsnf.core.remote import RemoteFolder\n"
        "from clsnf.study.driver_lease import DriverLease\n"
        f"with DriverLease(RemoteFolder({remote.uri!r})).hold():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert remote.read(DRIVER) is not None
    said: list[str] = []
    with DriverLease(remote, said.append).hold():
        assert said == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"owner": {"pid": "x"}}'])
def test_a_damaged_lease_is_free_when_it_stays_as_it_is(tmp_path: Path, content: bytes) -> None:
    remote = RemoteFolder(f"file://{tmp_path}/remote")
    remote.write(DRIVER, content)
    with lease(remote).hold() as held:
        assert not held.is_lost


def test_of_drivers_that_begin_at_once_one_goes_on(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/remote"
    held: list[int] = []
    refused: list[int] = []
    together, done = threading.Barrier(4), threading.Barrier(4)

    def drive(number: int) -> None:
        together.wait()
        try:
            with lease(RemoteFolder(uri)).hold():
                held.append(number)
                done.wait(60)
                return
        except OutputError:
            refused.append(number)
        done.wait(60)

    threads = [threading.Thread(target=drive, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
    assert len(refused) == 3
