"""The store: what is loaded, what makes room, and how new models roll in."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from clsnf.core.errors import ClsnfError, SettingsError
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
    sizes = {name: entry.size for name, entry in read_catalogue(winners).entries.items()}
    loads: list[str] = []

    async def use(store: ModelStore, *names: str) -> list[str]:
        await asyncio.gather(*(store.get(name) for name in names))
        return [model.entry.category for model in store.loaded]

    roomy = opened(winners, loads=loads)
    assert loads == []
    assert sorted(asyncio.run(use(roomy, "plate", "plate", "sheet", "plate"))) == ["plate", "sheet"]
    assert sorted(loads) == ["plate", "sheet"]
    tight = opened(winners, memory=max(sizes.values()) + 1000)
    assert asyncio.run(use(tight, "plate")) == ["plate"]
    assert asyncio.run(use(tight, "sheet")) == ["sheet"]
    with pytest.raises(SettingsError, match="memory_mb"):
        opened(winners, memory=1000)


def test_preloading_takes_as_many_models_as_fit(winners: Path) -> None:
    largest = max(entry.size for entry in read_catalogue(winners).entries.values())
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


def test_winners_that_cannot_be_loaded_are_refused_and_those_of_before_serve_on(
    winners: Path, tmp_path: Path
) -> None:
    store = opened(winners)
    asyncio.run(store.get("plate"))
    damaged = tmp_path / "winners"
    shutil.copytree(winners, damaged)
    better = Detector.load(damaged / "plate", device="cpu")
    better.calibrate(
        false_reject_rate=0.4
    )  # another version: one that is loaded already would not be read again
    better.save(damaged / "plate")
    tensors = damaged / "plate" / "detector.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x01")
    for folder, words in (
        (damaged, "damaged"),
        (tmp_path / "none", "can't be read"),
        (tmp_path, "no saved detectors"),
    ):
        with pytest.raises(ClsnfError, match=words):
            store.roll(folder)
        assert words in str(store.refused)
        assert store.catalogue.folder == winners
    store.roll(winners)
    assert store.refused is None


def test_a_model_that_is_damaged_later_is_an_answer_not_a_crash(
    winners: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "winners"
    shutil.copytree(winners, copy)
    store = opened(copy)
    (copy / "plate" / "detector.safetensors").write_bytes(b"gone")
    with pytest.raises(ServiceUnavailable, match="plate"):
        asyncio.run(store.get("plate"))
    assert asyncio.run(store.get("sheet")).entry.category == "sheet"
