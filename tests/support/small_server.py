"""Two tiny saved detectors, pictures as bytes, and a server in a thread."""

from __future__ import annotations

import asyncio
import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clsnf.core.config import DetectorSettings, from_dict
from clsnf.data.layouts import read_category
from clsnf.data.splits import assign_splits
from clsnf.detector import Detector
from clsnf.serving.listening import bound_socket
from clsnf.serving.metrics import ServerMetrics
from clsnf.serving.ports import Ports
from clsnf.serving.service import InspectionService
from clsnf.serving.settings import ServingSettings
from tests.support.small_data import TINY, draw_normal, write_category

TOKEN = "a token of the tests 123"


def write_winners(folder: Path, weights: Path, seed: int = 0) -> Path:
    """Save two tiny detectors, plate and sheet; sheet keeps the shape of pictures."""
    data = folder.parent / "data"
    for number, (category, image) in enumerate(
        {"plate": {}, "sheet": {"width": 96, "aspect": "fit"}}.items()
    ):
        write_category(data / category, seed=seed + number, train=14, size=(64, 80))
        content: dict[str, Any] = {"image": {"height": 64, "width": 64} | image, "seed": seed}
        content["backbone"] = {"name": "resnet18", "levels": [1, 2], "weights": str(weights)}
        for name, value in TINY.items():
            section, _, key = name.partition(".")
            content.setdefault(section, {})[key] = value
        table = assign_splits(read_category(data, category), 0.4, seed=seed)
        Detector.fit(table, from_dict(DetectorSettings, content), device="cpu").save(
            folder / category
        )
    return folder


def small_settings(models: Path, **more: Any) -> ServingSettings:
    """Settings for one core; `more` may name any setting."""
    made = {"models": str(models), "device": "cpu", "threads": 1, "allowed_hosts": "testserver"}
    return ServingSettings.from_args(made | more)


def picture(seed: int = 0, size: tuple[int, int] = (72, 60)) -> np.ndarray:
    """An RGB picture (h, w, 3) uint8."""
    return draw_normal(np.random.default_rng(seed), size)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format=kind)
    return file.getvalue()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def http_server(settings: ServingSettings, metrics: ServerMetrics | None = None) -> Iterator[str]:
    """Serve the app over real HTTP, without Ray; gives ``127.0.0.1:PORT``."""
    listening = bound_socket("127.0.0.1", 0)
    port, stop, started = listening.getsockname()[1], threading.Event(), threading.Event()

    async def serve() -> None:
        ports = Ports(InspectionService(settings, metrics))
        async with ports.app.router.lifespan_context(ports.app):
            await ports.open(listening)
            started.set()
            while not stop.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    while not started.wait(0.1):
        assert thread.is_alive()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        stop.set()
        thread.join(30)
