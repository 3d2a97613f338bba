"""The Ray stream on a real Ray: the bits of the local one, even if a worker is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch

from clsnf.core.config import DefectSettings, ImageSettings
from clsnf.core.errors import ImageError
from clsnf.data.layouts import read_category
from clsnf.streams.ray_stream import RayStream
from clsnf.streams.stream import DefectRecipe, consecutive
from clsnf.study.cluster import ray_session
from clsnf.synthesis.textures import draw_textures
from clsnf.synthesis.training_defects import DefectMaker
from tests.streams.test_stream import CPU, Brightness, epoch, in_memory, recipe, same
from tests.support.small_data import write_category

N = 10


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    home = os.environ.get("HOME")
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))
    # Workers import what tests define from where the tests lie.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))
    )
    with ray_session(None, 1 << 28):
        yield
    if home is not None:
        os.environ["HOME"] = home


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("data")
    write_category(root / "nut", train=N, good=0, defective=0, size=(48, 64))
    found: list[str] = read_category(root, "nut")["path"].to_pylist()
    return found


@pytest.mark.parametrize(
    ("workers", "aspect", "mask_mode"), [(1, "squeeze", "off"), (2, "fit", "dark")]
)
def test_its_batches_are_those_of_the_local_streams(
    running: None, paths: list[str], workers: int, aspect: str, mask_mode: str
) -> None:
    settings = ImageSettings(32, 32, aspect)
    memory, stream = in_memory(paths, settings), RayStream(paths, settings, workers)
    made = recipe(memory, mask_mode)
    for number in (0, 1):
        chosen, keys = epoch(3, number)
        first, second = (
            list(s.training_batches(made, chosen, keys, CPU)) for s in (memory, stream)
        )
        assert len(first) == len(second)
        assert all(same(a, b) for a, b in zip(first, second, strict=True))
        assert all(batch.defects.images.is_contiguous() for batch in second)
    plain = list(stream.batches(consecutive(N, 4)))
    assert torch.equal(torch.cat([batch.images for batch in plain]), memory.images)
    state = stream.counters.totals()
    assert state["images"] == state["read_images"] == state["decode_images"] == 3 * N
    assert state["defects_images"] == 2 * N


def test_donors_lie_once_in_the_store_and_batches_without_any_defect_arrive(
    running: None, paths: list[str]
) -> None:
    settings = ImageSettings(32, 32)
    memory, stream = in_memory(paths, settings), RayStream(paths, settings, 1)
    donors = stream.load_shared(torch.arange(N), CPU)
    assert torch.equal(donors, memory.images)
    maker = DefectMaker(DefectSettings(threshold=0.999), draw_textures(4, (32, 32), 0), donors)
    assert maker.donors.data_ptr() == donors.data_ptr()
    chosen, keys = epoch(3)
    for made in (DefectRecipe(maker), recipe(memory)):
        first, second = (
            list(s.training_batches(made, chosen, keys, CPU)) for s in (memory, stream)
        )
        assert all(same(a, b) for a, b in zip(first, second, strict=True))
        assert any(batch.defects.regions.any() for batch in first) == (made.maker is not maker)
    _, _, sent, _ = ray.get(stream._send(DefectRecipe(maker)))
    assert ray.get(sent).__array_interface__["data"][0] == donors.data_ptr(), (
        "workers get the very same memory"
    )


def test_actors_hold_the_worker_and_give_every_batch_in_order(
    running: None, paths: list[str]
) -> None:
    settings = ImageSettings(32, 32)
    memory, stream = in_memory(paths, settings), RayStream(paths, settings, 1)
    found = list(stream.map_batches(Brightness, consecutive(N, 4), CPU))
    assert np.array_equal(
        np.concatenate([f["mean"] for f in found]),
        memory.images.float().mean(dim=(1, 2, 3)).numpy(),
    )


def test_a_picture_that_can_not_be_read_is_named(running: None, paths: list[str]) -> None:
    stream = RayStream([*paths[:2], "/no/such/picture.png"], ImageSettings(32, 32), 1)
    with pytest.raises(ImageError, match=r"/no/such/picture\.png"):
        list(stream.batches(consecutive(3, 2)))


def readers_of(pipe: Path) -> list[psutil.Process]:
    """Processes of Ray that have a pipe open."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            files = [os.readlink(file) for file in Path(f"/proc/{process.pid}/fd").iterdir()]
        except OSError:  # it ended meanwhile
            continue
        if str(pipe) in files:
            found.append(process)
    return found


def opened_by_a_reader(pipe: Path) -> int:
    """The writing end of a pipe, as soon as somebody reads it."""
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody yet
            time.sleep(0.02)


def test_rows_of_a_killed_worker_come_again_once(
    running: None, paths: list[str], tmp_path: Path
) -> None:
    settings = ImageSettings(32, 32)
    memory = in_memory(paths, settings)
    # One picture is a pipe: whoever reads it waits, until it is killed and the one that takes over
    # gets the bytes.
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    picture = Path(paths[4]).read_bytes()
    stream = RayStream([*paths[:4], str(pipe), *paths[5:]], settings, 1)
    killed: list[int] = []

    def kill_the_first_reader() -> None:
        end = opened_by_a_reader(pipe)
        while not (readers := readers_of(pipe)):  # it gets its descriptor a moment later
            time.sleep(0.02)
        (reader,) = readers
        reader.send_signal(signal.SIGKILL)
        reader.wait(60)
        os.close(end)
        killed.append(reader.pid)
        pipe.write_bytes(picture)  # waits for the next reader

    helper = threading.Thread(target=kill_the_first_reader, daemon=True)
    helper.start()
    found = list(stream.batches(consecutive(N, 2)))
    helper.join(60)
    assert len(killed) == 1
    assert [batch.indices.tolist() for batch in found] == [
        indices.tolist() for indices in consecutive(N, 2)
    ]
    assert torch.equal(torch.cat([batch.images for batch in found]), memory.images)
