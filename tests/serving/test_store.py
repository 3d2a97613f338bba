"""The store: what is loaded, what makes room, and how new models roll in."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clsnf.core.errors import ClsnfError, ModelError
from clsnf.core.files import write_json
from clsnf.core.hashing import sha256_file
from clsnf.detector import Detector
from clsnf.serving.catalogue import read_catalogue
from clsnf.serving.errors import ServiceUnavailable
from clsnf.serving.store import ModelStore, load_detector


def opened(folder: Path, memory: int = 2**30, loads: list[str] | None = None) -> ModelStore:
    def load(entry: Any) -> Detector:
        if loads is not None:
            loads.append(entry.category)
        return load_detector(entry, "cpu")

    store = ModelStore(memory, load)
    store.roll(folder)
    return store


def test_models_load_once_on_their_first_use_and_the_least_recently_used_makes_room(
    winners: Path,
) -> None:
    sizes = {name: entry.size for name, entry in read_catalogue(winners, 2**30).entries.items()}
    loads: list[str] = []

    async def use(store: ModelStore, *names: str) -> list[str]:
        await asyncio.gather(*(store.get(name) for name in names))
        return [model.entry.category for model in store.loaded]

    roomy = opened(winners, loads=loads)
    assert loads == ["plate"], "one has to answer before the server begins"
    assert sorted(asyncio.run(use(roomy, "plate", "plate", "sheet", "plate"))) == ["plate", "sheet"]
    assert sorted(loads) == ["plate", "sheet"]
    tight = opened(winners, memory=max(sizes.values()) + 1000)
    assert asyncio.run(use(tight, "plate")) == ["plate"]
    assert asyncio.run(use(tight, "sheet")) == ["sheet"]
    with pytest.raises(ModelError, match="memory_mb"):
        opened(winners, memory=1000)


def test_preloading_takes_as_many_models_as_fit(winners: Path) -> None:
    largest = max(entry.size for entry in read_catalogue(winners, 2**30).entries.values())
    for memory, count in ((2**30, 2), (largest + 1000, 1)):
        store = ModelStore(memory, lambda entry: load_detector(entry, "cpu"))
        store.roll(winners, preload=True)
        assert len(store.loaded) == count


def test_new_winners_roll_in_with_what_is_in_use_loaded_and_roll_back(
    winners: Path, tmp_path: Path
) -> None:
    new = tmp_path / "winners"
    shutil.copytree(winners, new)
    better = Detector.load(new / "plate", device="cpu")
    better.calibrate(false_reject_rate=0.4)
    better.save(new / "plate")
    loads: list[str] = []
    store = opened(winners, loads=loads)
    before = asyncio.run(store.get("plate"))
    store.roll(new)
    assert loads == ["plate", "plate"], "what is in use is loaded before the change"
    after = asyncio.run(store.get("plate"))
    assert after.entry.version != before.entry.version
    assert after.detector.threshold == better.threshold
    assert [m.entry.version for m in store.loaded] == [after.entry.version], "the old one goes"
    store.roll(winners)
    assert asyncio.run(store.get("plate")).entry.version == before.entry.version


def copied(winners: Path, to: Path, *recalibrated: str) -> Path:
    """A copy of the winners in which these have another version."""
    shutil.copytree(winners, to)
    for category in recalibrated:
        better = Detector.load(to / category, device="cpu")
        better.calibrate(false_reject_rate=0.4)
        better.save(to / category)
    return to


def flip_a_byte(model: Path) -> None:
    tensors = model / "detector.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)


def fill_with_nan(model: Path) -> None:
    """Weights that are no numbers, with the checksum that they have."""
    tensors = model / "detector.safetensors"
    state = load_file(tensors)
    save_file({n: t * torch.nan if t.is_floating_point() else t for n, t in state.items()}, tensors)
    content = json.loads((model / "detector.json").read_text())
    write_json(model / "detector.json", content | {"tensors_sha256": sha256_file(tensors)})


def nest_brackets(model: Path) -> None:
    (model / "detector.json").write_text("[" * 200_000)


@pytest.mark.parametrize("break_it", [flip_a_byte, fill_with_nan, nest_brackets, shutil.rmtree])
def test_a_category_that_is_broken_keeps_its_version_and_the_others_roll_in(
    winners: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    break_it: Callable[[Path], None],
) -> None:
    new = copied(winners, tmp_path / "winners", "plate", "sheet")
    break_it(new / "plate")
    (new / "plate").mkdir(exist_ok=True)
    changes: list[int] = []
    store = ModelStore(
        2**30, lambda entry: load_detector(entry, "cpu"), lambda: changes.append(len(store.refused))
    )
    store.roll(winners)
    before = asyncio.run(store.get("plate")), asyncio.run(store.get("sheet"))
    for _ in range(2):
        store.roll(new)
    assert asyncio.run(store.get("plate")) is before[0], "it never left the memory"
    after = asyncio.run(store.get("sheet"))
    assert after.entry.version != before[1].entry.version
    (refusal,) = store.refused
    assert (refusal.category, refusal.serves) == ("plate", before[0].entry.version)
    assert changes[-1] == 1
    assert len([r for r in caplog.records if "'plate' is refused" in r.getMessage()]) == 1
    store.roll(winners)
    assert store.refused == []


def test_what_is_overwritten_in_its_place_serves_on_from_memory_whatever_else_needs_room(
    winners: Path, tmp_path: Path
) -> None:
    """The files of the old version are gone: once dropped, it could not be loaded again."""
    models = copied(winners, tmp_path / "winners")
    largest = max(e.size for e in read_catalogue(winners, 2**30).entries.values())
    store = opened(models, memory=largest + 1000)
    before = asyncio.run(store.get("plate"))
    flip_a_byte(models / "plate")
    store.roll(models)
    assert asyncio.run(store.get("sheet")).entry.category == "sheet"
    assert asyncio.run(store.get("plate")) is before
    assert [r.category for r in store.refused] == ["plate"]


def test_a_broken_model_that_is_not_loaded_and_overwritten_says_its_cause(
    winners: Path, tmp_path: Path
) -> None:
    models = copied(winners, tmp_path / "winners")
    store = opened(models)
    flip_a_byte(models / "sheet")
    store.roll(models)
    with pytest.raises(ServiceUnavailable, match="checksum"):
        asyncio.run(store.get("sheet"))
    assert [(r.category, r.serves) for r in store.refused] == [("sheet", None)]
    assert asyncio.run(store.get("plate")).entry.category == "plate"


def test_at_the_start_the_others_serve_and_none_at_all_is_an_error(
    winners: Path, tmp_path: Path
) -> None:
    models = copied(winners, tmp_path / "winners")
    fill_with_nan(models / "plate")
    store = opened(models)
    assert store.catalogue.categories == ["sheet"]
    with pytest.raises(ServiceUnavailable, match="no finite score"):
        asyncio.run(store.get("plate"))
    flip_a_byte(models / "sheet")
    with pytest.raises(ModelError, match=r"No model of .* can be used: .*finite.*1 more"):
        opened(models)


def test_a_folder_that_cannot_be_used_changes_nothing(winners: Path, tmp_path: Path) -> None:
    store = opened(winners)
    model = asyncio.run(store.get("plate"))
    broken = copied(winners, tmp_path / "broken", "plate", "sheet")
    flip_a_byte(broken / "plate")
    nest_brackets(broken / "sheet")
    for folder, words in (
        (broken, "No model of"),
        (tmp_path / "none", "can't be read"),
        (winners / "plate" / "detector.json", "can't be read"),
        (tmp_path / "broken" / "..", "no saved detectors"),
    ):
        with pytest.raises(ClsnfError, match=words):
            store.roll(folder)
        assert store.refused[0].category is None
        assert words in store.refused[0].cause
        assert store.catalogue.folder == winners
        assert asyncio.run(store.get("plate")) is model
    store.roll(winners)
    assert store.refused == []


def test_the_same_folder_again_rolls_in_what_it_holds_now(winners: Path, tmp_path: Path) -> None:
    """Its content was replaced, or the link was switched."""
    first = copied(winners, tmp_path / "first")
    second = copied(winners, tmp_path / "second", "plate")
    link = tmp_path / "current"
    link.symlink_to(first)
    store = opened(link)
    before = asyncio.run(store.get("plate"))
    link.unlink()
    link.symlink_to(second)
    assert asyncio.run(store.get("plate")) is before
    store.roll(link)
    after = asyncio.run(store.get("plate"))
    assert after.entry.version != before.entry.version
    shutil.rmtree(second / "plate")
    shutil.copytree(winners / "plate", second / "plate")
    store.roll(link)
    assert asyncio.run(store.get("plate")).entry.version == before.entry.version


def test_a_roll_holds_no_more_than_the_memory_and_one_model(winners: Path, tmp_path: Path) -> None:
    models, new = tmp_path / "winners", tmp_path / "new"
    for folder, source in ((models, winners), (new, copied(winners, tmp_path / "b", "plate"))):
        for number in range(4):
            shutil.copytree(source / "plate", folder / f"plate{number}")
    size = next(iter(read_catalogue(models, 2**30).entries.values())).size
    alive: weakref.WeakSet[Detector] = weakref.WeakSet()
    most = []

    def load(entry: Any) -> Detector:
        detector = load_detector(entry, "cpu")
        alive.add(detector)
        gc.collect()
        most.append(len(alive))
        return detector

    store = ModelStore(int(2.5 * size), load)
    store.roll(models, preload=True)
    assert len(store.loaded) == 2
    store.roll(new)
    assert len(most) >= 8, "every new one has answered"
    assert max(most) == 3
    assert len({asyncio.run(store.get(f"plate{n}")).entry.version for n in range(4)}) == 1
    assert max(most) == 3


def test_a_model_that_is_damaged_later_is_an_answer_not_a_crash(
    winners: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "winners"
    shutil.copytree(winners, copy)
    store = opened(copy)
    (copy / "sheet" / "detector.safetensors").write_bytes(b"gone")
    with pytest.raises(ServiceUnavailable, match="sheet"):
        asyncio.run(store.get("sheet"))
    assert [refusal.category for refusal in store.refused] == ["sheet"]
    assert asyncio.run(store.get("plate")).entry.category == "plate"
    (copy / "sheet" / "detector.safetensors").write_bytes(
        (winners / "sheet" / "detector.safetensors").read_bytes()
    )
    assert asyncio.run(store.get("sheet")).entry.category == "sheet", "it is tried again"
    assert store.refused == []


@pytest.mark.slow
def test_whoever_asks_while_models_roll_in_gets_one_of_both_versions(
    winners: Path, tmp_path: Path
) -> None:
    """Also with room for one model alone, where each request loads."""
    new = copied(winners, tmp_path / "new", "plate", "sheet")
    entries = read_catalogue(winners, 2**30).entries
    known = {
        e.version
        for folder in (winners, new)
        for e in read_catalogue(folder, 2**30).entries.values()
    }

    async def ask(store: ModelStore, asked: list[str]) -> None:
        rolls = asyncio.create_task(asyncio.to_thread(roll_often, store))
        while not rolls.done():
            for model in await asyncio.gather(store.get("plate"), store.get("sheet")):
                asked.append(model.entry.version)
            await asyncio.sleep(0)
        await rolls

    def roll_often(store: ModelStore) -> None:
        for folder in (new, winners, new, winners):
            store.roll(folder)

    for memory in (2**30, max(e.size for e in entries.values()) + 1000):
        store, asked = opened(winners, memory=memory), list[str]()
        asyncio.run(ask(store, asked))
        assert set(asked) == known
        assert store.refused == []
        assert sum(model.bytes for model in store.loaded) <= memory
