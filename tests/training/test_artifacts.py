"""The artifact store: finished work is found again, none is done twice, none is found half done."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clsnf.core.hashing import sha256_file
from clsnf.core.remote import RemoteFolder
from clsnf.training.artifacts import Artifact, ArtifactStore

CONTENT = {"seed": 3, "image": {"height": 64, "width": 96}, "levels": [1, 2]}


def an_artifact(value: float = 1.0) -> Artifact:
    return Artifact(
        {"map": torch.full((2, 3), value), "step": torch.tensor(4.0)},
        {"losses": [0.5, 0.25], "name": "ä"},
    )


def refuse() -> Artifact:
    raise AssertionError("computed again")


def test_an_artifact_is_computed_once_and_comes_back_as_it_was(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "not" / "there" / "yet")
    first = store.get("maps", CONTENT, an_artifact)
    again = ArtifactStore(store.root).get("maps", CONTENT, refuse)
    for artifact in (first, again):
        assert set(artifact.tensors) == {"map", "step"}
        assert torch.equal(artifact.tensors["map"], an_artifact().tensors["map"])
        assert artifact.tensors["step"].shape == ()
        assert artifact.facts == an_artifact().facts


def test_the_store_counts_what_it_computed_and_what_it_found(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    for _ in range(3):
        store.get("maps", CONTENT, an_artifact)
    store.get("flows", CONTENT, an_artifact)
    assert store.computed == {"maps": 1, "flows": 1}
    assert store.reused == {"maps": 2}


def test_a_key_depends_on_the_content_not_on_the_order_of_its_names(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    turned = {"levels": [1, 2], "image": {"width": 96, "height": 64}, "seed": 3}
    assert store.key(CONTENT) == store.key(turned)
    assert store.key(CONTENT) != store.key(CONTENT | {"seed": 4})
    store.get("maps", CONTENT, an_artifact)
    store.get("maps", turned, refuse)


def test_artifacts_of_other_kinds_and_contents_are_apart(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.get("maps", CONTENT, lambda: an_artifact(1))
    store.get("flows", CONTENT, lambda: an_artifact(2))
    store.get("maps", CONTENT | {"seed": 4}, lambda: an_artifact(3))
    assert store.get("maps", CONTENT, refuse).tensors["map"][0, 0] == 1
    assert store.get("flows", CONTENT, refuse).tensors["map"][0, 0] == 2


def test_tensors_that_share_memory_are_stored(tmp_path: Path) -> None:
    image = torch.rand(2, 3, 4, 5)
    shared = {"one": image, "two": image, "part": image[:, 1], "turned": image.transpose(2, 3)}
    store = ArtifactStore(tmp_path)
    store.get("maps", CONTENT, lambda: Artifact(shared, {}))
    found = store.get("maps", CONTENT, refuse).tensors
    assert all(torch.equal(found[name], value) for name, value in shared.items())


def test_tensors_in_any_layout_are_stored(tmp_path: Path) -> None:
    image = torch.rand(2, 3, 4, 5)
    artifact = Artifact(
        {
            "turned": image.transpose(1, 2),
            "last": image.to(memory_format=torch.channels_last),
            "part": image[:, 1],
        },
        {},
    )
    stored = ArtifactStore(tmp_path)
    stored.get("x", CONTENT, lambda: artifact)
    found = stored.get("x", CONTENT, refuse)
    for name, value in artifact.tensors.items():
        assert torch.equal(found.tensors[name], value)


def test_an_artifact_that_failed_is_not_there_and_can_be_tried_again(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)

    def fail() -> Artifact:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        store.get("maps", CONTENT, fail)
    assert store.find("maps", store.key(CONTENT)) is None
    assert store.get("maps", CONTENT, an_artifact).facts == an_artifact().facts


def test_an_artifact_that_can_t_be_written_leaves_nothing(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        store.get("maps", CONTENT, lambda: Artifact({"map": torch.ones(1)}, {"loss": float("nan")}))
    assert list((tmp_path / "maps").iterdir()) == []


def test_two_that_want_the_same_artifact_compute_it_once(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()
    calls = []

    def compute() -> Artifact:
        calls.append(threading.get_ident())
        begun.set()
        go_on.wait(30)
        return an_artifact()

    stores = [ArtifactStore(tmp_path), ArtifactStore(tmp_path)]
    found: list[Artifact] = []
    threads = [
        threading.Thread(target=lambda s=store: found.append(s.get("maps", CONTENT, compute)))
        for store in stores
    ]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert len(calls) == 1
    assert len(found) == 2
    assert all(
        torch.equal(artifact.tensors["map"], an_artifact().tensors["map"]) for artifact in found
    )
    assert stores[1].reused == {"maps": 1}


def test_other_artifacts_do_not_wait_for_one_that_is_being_computed(tmp_path: Path) -> None:
    inner = ArtifactStore(tmp_path)

    def compute() -> Artifact:
        return Artifact(inner.get("features", CONTENT, an_artifact).tensors, {"of": "features"})

    assert ArtifactStore(tmp_path).get("maps", CONTENT, compute).facts == {"of": "features"}


DYING = """
import os, sys
from pathlib import Path
from clsnf.training.artifacts import ArtifactStore

def die():
    os.kill(os.getpid(), 9)

ArtifactStore(Path(sys.argv[1])).get("maps", {"seed": 3}, die)
"""


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", DYING, str(tmp_path)], timeout=120, check=False)
    assert ended.returncode == -9
    store = ArtifactStore(tmp_path)
    assert store.get("maps", {"seed": 3}, an_artifact).facts == an_artifact().facts
    assert store.computed == {"maps": 1}


def test_an_artifact_is_two_files_that_need_no_pickle(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.get("maps", CONTENT, an_artifact)
    folder = tmp_path / "maps" / store.key(CONTENT)
    assert sorted(p.name for p in folder.iterdir()) == ["facts.json", "tensors.safetensors"]
    facts = json.loads((folder / "facts.json").read_text())
    assert facts.pop("sha256")["tensors"] == sha256_file(folder / "tensors.safetensors")
    assert facts == an_artifact().facts
    assert set(load_file(folder / "tensors.safetensors")) == {"map", "step"}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:20])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_a_bit_of_the_content(file: Path) -> None:
    """Of a number: what is left has the right form."""
    content = bytearray(file.read_bytes())
    place = content.index(b"0.25") + 2 if file.suffix == ".json" else len(content) - 1
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["tensors.safetensors", "facts.json"])
@pytest.mark.parametrize("damage", [cut, empty, flip_a_bit_of_the_content])
def test_a_damaged_artifact_is_computed_anew_and_said(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    store = ArtifactStore(tmp_path)
    store.get("maps", CONTENT, an_artifact)
    folder = tmp_path / "maps" / store.key(CONTENT)
    damage(folder / name)
    assert store.find("maps", store.key(CONTENT)) is None
    with pytest.warns(RuntimeWarning, match="is damaged .*: it is computed anew") as said:
        artifact = store.get("maps", CONTENT, an_artifact)
    assert len(said) == 1
    assert str(folder) in str(said[0].message)
    assert "\n" not in str(said[0].message)
    assert artifact.facts == an_artifact().facts
    assert store.computed == {"maps": 2}
    assert store.dropped == [f"maps/{store.key(CONTENT)}"]
    again = ArtifactStore(tmp_path).get("maps", CONTENT, refuse)
    assert torch.equal(again.tensors["map"], an_artifact().tensors["map"])


@pytest.mark.parametrize("damage", [cut, flip_a_bit_of_the_content])
def test_a_damaged_artifact_is_fetched_again_and_a_remote_one_computed_anew(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    remote = RemoteFolder(f"file://{tmp_path}/remote")
    one, two = (ArtifactStore(tmp_path / name, remote) for name in ("one", "two"))
    one.get("maps", CONTENT, an_artifact)
    file = Path("maps") / one.key(CONTENT) / "tensors.safetensors"
    damage(tmp_path / "one" / file)
    with pytest.warns(RuntimeWarning, match="is damaged"):
        one.get("maps", CONTENT, refuse)  # the remote folder has a whole one
    damage(tmp_path / "remote" / file)
    with pytest.warns(RuntimeWarning, match="is damaged"):
        two.get("maps", CONTENT, an_artifact)
    three = ArtifactStore(tmp_path / "three", remote).get("maps", CONTENT, refuse)
    assert torch.equal(three.tensors["map"], an_artifact().tensors["map"])


def test_an_artifact_of_an_earlier_version_has_no_checksum_and_is_read(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.get("maps", CONTENT, an_artifact)
    facts = tmp_path / "maps" / store.key(CONTENT) / "facts.json"
    facts.write_text(json.dumps(an_artifact().facts))
    assert store.get("maps", CONTENT, refuse).facts == an_artifact().facts
    cut(facts.with_name("tensors.safetensors"))
    with pytest.warns(RuntimeWarning, match="is damaged"):
        store.get("maps", CONTENT, an_artifact)


def test_facts_that_json_changes_keep_their_checksum(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    given = {"scales": [(0.1, 2)], "of": {2: "a", 10: "b"}, "tiny": 1e-310, "third": 1 / 3}
    store.get("maps", CONTENT, lambda: Artifact({}, given))
    found = store.get("maps", CONTENT, refuse).facts
    assert found == {**given, "scales": [[0.1, 2]], "of": {"2": "a", "10": "b"}}
