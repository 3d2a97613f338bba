"""Leases kept by an actor, for workers that share no file system; those in files have the same
promises (test_leases.py).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clsnf.core.remote import RemoteFolder
from clsnf.study.lease_actor import ActorLeases, LeaseTable, start_lease_actor
from clsnf.training.artifacts import Artifact, ArtifactStore


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_one_owner_at_a_time() -> None:
    leases = LeaseTable()
    assert leases.take("maps", "a")
    assert not leases.take("maps", "b")
    assert leases.take("flows", "b"), "another lease"
    leases.free("maps", "b")
    assert not leases.take("maps", "b"), "only the holder frees it"
    leases.free("maps", "a")
    assert leases.take("maps", "b")


def test_a_silent_owner_loses_its_lease_and_a_heard_one_keeps_it() -> None:
    clock = Clock()
    leases = LeaseTable(lifetime=60, clock=clock)
    assert leases.take("maps", "a")
    clock.now = 59
    assert not leases.take("maps", "b")
    assert leases.take("maps", "a"), "a sign of life"
    clock.now = 118
    assert not leases.take("maps", "b")
    clock.now = 120
    assert leases.take("maps", "b")
    assert not leases.take("maps", "a")
    leases.free("maps", "a")
    assert not leases.take("maps", "c"), "who lost it can't free it"


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    from clsnf.study.cluster import ray_session

    with ray_session(None):
        import ray

        yield ray


@pytest.mark.slow
def test_machines_that_share_a_remote_folder_alone_compute_an_artifact_once(
    ray_here: Any, tmp_path: Path
) -> None:
    """Four tasks, each with a local folder of its own, as on four machines."""
    uri = f"file://{tmp_path}/remote"
    actor = start_lease_actor("test-leases")

    @ray_here.remote(num_cpus=0)
    def worker(number: int) -> tuple[float, dict[str, int]]:
        store = ArtifactStore(
            tmp_path / f"machine{number}", RemoteFolder(uri), ActorLeases("test-leases")
        )
        artifact = store.get(
            "maps", {"seed": 1}, lambda: Artifact({"map": torch.full((3,), float(number))}, {})
        )
        return float(artifact.tensors["map"][0]), store.computed

    found = ray_here.get([worker.remote(number) for number in range(4)])
    assert len({value for value, _ in found}) == 1, "all have the same artifact"
    assert sum(computed.get("maps", 0) for _, computed in found) == 1
    del actor


def test_an_artifact_in_the_remote_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    remote = RemoteFolder(f"file://{tmp_path}/remote")
    first, second = (ArtifactStore(tmp_path / name, remote) for name in ("one", "two"))
    first.get("maps", {"seed": 1}, lambda: Artifact({"map": torch.ones(2)}, {"of": "first"}))
    assert second.get("maps", {"seed": 1}, lambda: Artifact({}, {})).facts == {"of": "first"}
    assert second.reused == {"maps": 1}
    remote.delete(
        f"maps/{first.key({'seed': 1})}/facts.json"
    )  # as if it had not been stored to its end
    third = ArtifactStore(tmp_path / "three", remote)
    assert third.get("maps", {"seed": 1}, lambda: Artifact({}, {"of": "third"})).facts == {
        "of": "third"
    }
    third.drop("maps", {"seed": 1})
    assert remote.read(f"maps/{first.key({'seed': 1})}/facts.json") is None
