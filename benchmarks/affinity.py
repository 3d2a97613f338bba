"""How often two replicas load models, with and without each other's help.

    # copies of a product of the demo, trained here in a minute
    python benchmarks/affinity.py
    python benchmarks/affinity.py --model runs/NAME/winners/screw --pictures MVTEC/screw/test

Both replicas accept from one port, as those of a node do, and have memory for a quarter of the
models. The same requests go to pairs that pass requests on to a model's owner, and to pairs that
don't, over a new connection each, so that chance decides which replica accepts. All models are
asked equally often, or the n-th one in proportion to 1/n (Zipf).
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from serve_load import bodies, demo_model

from clsnf.detector_file import TENSORS
from clsnf.serving.metrics import ServerMetrics
from clsnf.serving.replica_ports import ReplicaPorts
from clsnf.serving.service import InspectionService
from clsnf.serving.settings import MiB, ServingSettings


@dataclass(frozen=True)
class Pair:
    """Two replicas that run."""

    port: int
    metrics: Sequence[ServerMetrics]

    def loads(self) -> int:
        lines = b"\n".join(metrics.text() for metrics in self.metrics).decode().splitlines()
        found = [line for line in lines if line.startswith("clsnf_model_loads_total{")]
        return round(sum(float(line.rsplit(" ", 1)[1]) for line in found))


@contextmanager
def replica(settings: ServingSettings, folder: Path, metrics: ServerMetrics) -> Iterator[int]:
    """A replica in a thread, at the port of the folder."""
    stop, ports = threading.Event(), list[int]()

    async def serve() -> None:
        service = InspectionService(settings, metrics)
        opened = ReplicaPorts(service, folder)
        async with opened.app.router.lifespan_context(opened.app):
            ports.append(await opened.open_shared())
            while not stop.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    while not ports:
        if not thread.is_alive():
            raise SystemExit("a replica did not start")
        time.sleep(0.05)
    try:
        yield ports[0]
    finally:
        stop.set()
        thread.join(30)


@contextmanager
def pair(settings: ServingSettings, folder: Path, helps: bool) -> Iterator[Pair]:
    """Two replicas; they help each other only where their settings agree."""
    with ExitStack() as ending:
        metrics = [ServerMetrics(str(number)) for number in range(2)]
        other = settings if helps else replace(settings, queue=settings.queue + 1)
        ports = [
            ending.enter_context(replica(own, folder, of_replica))
            for own, of_replica in zip((settings, other), metrics, strict=True)
        ]
        yield Pair(ports[0], metrics)


def ask(port: int, category: str, body: bytes) -> float:
    """Ask over a new connection; the seconds that it took."""
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", f"/v1/models/{category}/inspect", body)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    if answer.status != 200:
        raise SystemExit(f"{answer.status} {text.decode()}")
    return time.perf_counter() - started


def copies(model: Path, folder: Path, count: int) -> tuple[Path, int]:
    """A folder of models that differ in name alone, and MiB of memory for about a quarter."""
    for number in range(count):
        shutil.copytree(model, folder / f"part{number}")
    size = (model / TENSORS).stat().st_size
    return folder, max(-(-size // MiB), round((count // 4 + 0.5) * size / MiB))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a saved detector; default: one of the demo")
    parser.add_argument("--pictures", type=Path, help="a folder of pictures for --model")
    parser.add_argument("--models", type=int, default=20, help="copies of it (default 20)")
    parser.add_argument("--requests", type=int, default=600, help="of each run (default 600)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if bool(given.model) != bool(given.pictures):
        parser.error("give --model and --pictures together")
    table = Table("requests", "replicas", "loads", "of requests", "median", "p95")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, pictures = (
            (given.model, bodies(given.pictures)) if given.model else demo_model(folder)
        )
        models, memory_mb = copies(model, folder / "models", given.models)
        size = (model / TENSORS).stat().st_size
        settings = ServingSettings(
            models=str(models), device="cpu", threads=1, readers=1, memory_mb=memory_mb
        )
        settings = settings.resolved()
        room = memory_mb * MiB // size
        random = np.random.default_rng(given.seed)
        zipf = 1 / np.arange(1, given.models + 1)
        for asked, weights in (("uniform", np.ones(given.models)), ("zipf", zipf)):
            order = random.choice(given.models, given.requests, p=weights / weights.sum())
            for helps in (False, True):
                run = folder / f"{asked}{helps}"
                with pair(settings, run, helps) as served:
                    seconds = [
                        ask(served.port, f"part{number}", pictures[turn % len(pictures)])
                        for turn, number in enumerate(order)
                    ]
                    loads = served.loads()
                table.add_row(
                    asked,
                    "pass on" if helps else "alone",
                    str(loads),
                    f"{loads / given.requests:.0%}",
                    f"{1000 * statistics.median(seconds):.1f} ms",
                    f"{1000 * float(np.quantile(seconds, 0.95)):.1f} ms",
                )
    Console().print(
        f"{given.models} models of {size / MiB:.1f} MiB, room for {room} on each of 2 replicas"
    )
    Console().print(table)


if __name__ == "__main__":
    main()
