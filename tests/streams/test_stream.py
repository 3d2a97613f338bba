"""Streams bring the same bits in the same order, whichever one it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clsnf.core.config import DefectSettings, ImageSettings
from clsnf.core.errors import ImageError, SettingsError
from clsnf.data.images import load_images
from clsnf.data.layouts import read_category
from clsnf.streams.choice import StreamChoice, choose_stream, open_stream
from clsnf.streams.stream import (
    DefectRecipe,
    ImageBatch,
    LocalStream,
    MemoryStream,
    Stream,
    TrainingBatch,
    consecutive,
)
from clsnf.synthesis.object_mask import decide_mask_mode, decision_indices
from clsnf.synthesis.textures import draw_textures
from clsnf.synthesis.training_defects import DefectMaker, sample_key
from tests.support.small_data import write_category

CPU = torch.device("cpu")
N = 10


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("data")
    write_category(root / "nut", train=N, good=0, defective=0, size=(48, 64))
    found: list[str] = read_category(root, "nut")["path"].to_pylist()
    return found


def in_memory(paths: list[str], settings: ImageSettings) -> MemoryStream:
    loaded = load_images(paths, settings)
    return MemoryStream(loaded.images, loaded.valid)


def recipe(stream: MemoryStream, mask_mode: str = "off") -> DefectRecipe:
    textures = draw_textures(4, (stream.images.shape[2], stream.images.shape[3]), 0)
    return DefectRecipe(DefectMaker(DefectSettings(), textures, stream.images), mask_mode)


def epoch(batch_size: int, number: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(number))
    keys = torch.from_numpy(sample_key(1, number, order.numpy()))
    return list(order.split(batch_size)), list(keys.split(batch_size))


def same(one: TrainingBatch, other: TrainingBatch) -> bool:
    pairs = [
        (getattr(one.defects, name), getattr(other.defects, name))
        for name in ("images", "regions", "clean")
    ]
    pairs.append((one.indices, other.indices))
    if one.valid is not None and other.valid is not None:
        pairs.append((one.valid, other.valid))
    return (one.valid is None) == (other.valid is None) and all(
        torch.equal(*pair) for pair in pairs
    )


@pytest.mark.parametrize("aspect", ["squeeze", "fit"])
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("mask_mode", ["off", "dark"])
def test_a_decoding_stream_gives_what_one_in_memory_gives(
    paths: list[str], aspect: str, threads: int, mask_mode: str
) -> None:
    settings = ImageSettings(32, 32, aspect)
    memory, local = in_memory(paths, settings), LocalStream(paths, settings, threads)
    made = recipe(memory, mask_mode)
    for number in (0, 1):
        chosen, keys = epoch(3, number)
        first, second = (
            list(stream.training_batches(made, chosen, keys, CPU)) for stream in (memory, local)
        )
        assert len(first) == len(second) == 4
        assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert (memory.valid is None) == (local.valid is None) == (aspect == "squeeze")
    if memory.valid is not None and local.valid is not None:
        assert torch.equal(memory.valid, local.valid)
    for some in (torch.tensor([7, 2]), torch.arange(N)):
        assert torch.equal(memory.take(some), local.take(some))
        assert torch.equal(memory.load_shared(some, CPU), local.load_shared(some, CPU))
    assert memory.load_shared(torch.arange(N), CPU).data_ptr() == memory.images.data_ptr(), (
        "no second copy of what lies in memory"
    )


def test_epochs_differ_in_order_and_defects_and_batches_lie_in_one_piece(paths: list[str]) -> None:
    settings = ImageSettings(32, 32)
    stream = LocalStream(paths, settings)
    made = recipe(in_memory(paths, settings))
    first, second = (
        list(stream.training_batches(made, *epoch(5, number), CPU)) for number in (0, 1)
    )
    assert [b.indices.tolist() for b in first] != [b.indices.tolist() for b in second]
    of_first = {
        int(i): image for b in first for i, image in zip(b.indices, b.defects.images, strict=True)
    }
    of_second = {
        int(i): image for b in second for i, image in zip(b.indices, b.defects.images, strict=True)
    }
    assert sorted(of_first) == sorted(of_second) == list(range(N))
    assert any(not torch.equal(of_first[i], of_second[i]) for i in range(N))
    assert all(batch.defects.images.is_contiguous() for batch in first)


def test_pictures_of_several_sizes_have_their_own_padding(tmp_path: Path) -> None:
    write_category(tmp_path / "a", train=2, good=0, defective=0, size=(48, 64))
    write_category(tmp_path / "b", train=2, good=0, defective=0, size=(64, 48))
    paths = [path for name in "ab" for path in read_category(tmp_path, name)["path"].to_pylist()]
    settings = ImageSettings(32, 32, "fit")
    memory, local = in_memory(paths, settings), LocalStream(paths, settings)
    assert memory.valid is not None
    assert local.valid is not None
    assert torch.equal(memory.valid, local.valid)


def test_a_stream_counts_what_it_did(paths: list[str]) -> None:
    stream = LocalStream(paths, ImageSettings(32, 32))
    made = recipe(in_memory(paths, ImageSettings(32, 32)))
    list(stream.training_batches(made, *epoch(4), CPU))
    list(stream.batches(consecutive(N, 4)))
    state = stream.counters.totals()
    assert state["images"] == state["read_images"] == state["decode_images"] == 2 * N
    assert state["defects_images"] == N
    assert all(state[f"{step}_seconds"] > 0 for step in ("read", "decode", "defects"))
    assert state["waited"] > 0


def test_a_stream_reads_no_further_ahead_than_a_few_batches(paths: list[str]) -> None:
    stream = LocalStream(paths, ImageSettings(32, 32), threads=2)
    batches = stream.batches(consecutive(N, 1))
    next(batches)
    assert stream.counters.totals()["decode_images"] <= 4
    batches.close()  # type: ignore[attr-defined]


def test_a_picture_that_can_not_be_read_is_named(paths: list[str]) -> None:
    stream = LocalStream([*paths[:2], "/no/such/picture.png"], ImageSettings(32, 32))
    with pytest.raises(ImageError, match=r"/no/such/picture\.png"):
        list(stream.batches(consecutive(3, 2)))


class Brightness:
    """A worker."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, batch: ImageBatch) -> dict[str, np.ndarray]:
        return {
            "mean": batch.images.to(self.device).float().mean(dim=(1, 2, 3)).cpu().numpy(),
            "index": batch.indices.numpy(),
        }


def test_a_worker_gets_every_batch_in_order(paths: list[str]) -> None:
    settings = ImageSettings(32, 32)
    memory = in_memory(paths, settings)
    expected = memory.images.float().mean(dim=(1, 2, 3)).numpy()
    streams: list[Stream] = [memory, LocalStream(paths, settings)]
    for stream in streams:
        found = list(stream.map_batches(Brightness, consecutive(N, 4), CPU))
        assert np.array_equal(np.concatenate([f["mean"] for f in found]), expected)


def test_few_pictures_decide_what_all_would() -> None:
    images = torch.randint(
        0, 255, (100, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert decide_mask_mode(images[decision_indices(100)]) == decide_mask_mode(images)


# ---- which one ----


def test_auto_takes_memory_where_it_is_enough_else_the_cluster_where_there_is_one() -> None:
    settings = ImageSettings(96, 96)  # 27,648 bytes an image
    choice = choose_stream("auto", [3, 10], settings, budget=300_000, nodes=5)
    assert (choice.kind, "10 images take 0 MB" in choice.reason) == ("memory", True), choice
    choice = choose_stream("auto", [100, 10], settings, budget=300_000, nodes=5, workers=2)
    assert (choice.kind, choice.workers, "5 nodes" in choice.reason) == ("ray", 2, True), choice
    choice = choose_stream("auto", [100], settings, budget=300_000)
    assert (choice.kind, "more than" in choice.reason) == ("local", True), choice
    assert choose_stream("local", [100], settings, budget=300_000, nodes=5).kind == "local"
    assert choose_stream("local", [10], settings, budget=300_000).kind == "memory"
    assert choose_stream("ray", [1], settings).kind == "ray"
    with pytest.raises(SettingsError, match="Did you mean 'local'"):
        choose_stream("locale", [1], settings)


def test_a_ray_stream_without_ray_is_refused(paths: list[str]) -> None:
    with pytest.raises(SettingsError, match="--stream local"):
        open_stream(StreamChoice("ray", "", 1), paths, ImageSettings(32, 32))


# ---- room ----
