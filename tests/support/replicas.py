"""Several replicas behind one port, in threads of this process, without Ray."""

from __future__ import annotations

import asyncio
import http.client
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import requests

from clsnf.serving.metrics import ServerMetrics
from clsnf.serving.replica_ports import ReplicaPorts
from clsnf.serving.service import InspectionService
from clsnf.serving.settings import ServingSettings


class Replica:
    """A replica that runs; :meth:`end` closes its port."""

    def __init__(self, settings: ServingSettings, folder: Path, name: str) -> None:
        self.name, self.metrics = name, ServerMetrics(name)
        self.service: InspectionService
        self.loop: asyncio.AbstractEventLoop
        self.port = 0
        self._settings, self._folder = settings, folder
        self._stop, self._started = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),), daemon=True)
        self._thread.start()
        while not self._started.wait(0.1):
            assert self._thread.is_alive()

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.service = InspectionService(self._settings, self.metrics)
        self._ports = ReplicaPorts(self.service, self._folder)
        app = self._ports.app
        async with app.router.lifespan_context(app):
            self.port = await self._ports.open_shared()
            self._started.set()
            while not self._stop.is_set():
                await asyncio.sleep(0.02)

    def counted(self, metric: str, *labels: str) -> float:
        """The sum of a counter's series, of those that have these labels."""
        lines = self.metrics.text().decode().splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith(metric + "{") and all(f'="{label}"' in line for label in labels)
        )

    def connected(self) -> requests.Session:
        """A client with a connection that this replica has accepted."""
        for _ in range(200):
            session = requests.Session()
            if self._is_named_in(session.get(f"http://127.0.0.1:{self.port}/metrics").text):
                return session
            session.close()
        raise AssertionError(f"{self.name} accepts no connection")

    def connection(self) -> http.client.HTTPConnection:
        """The same, for requests that no client would send."""
        for _ in range(200):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            connection.request("GET", "/metrics")
            if self._is_named_in(connection.getresponse().read().decode()):
                return connection
            connection.close()
        raise AssertionError(f"{self.name} accepts no connection")

    def _is_named_in(self, text: str) -> bool:
        return f'replica="{self.name}"' in text

    def cut_peers(self) -> None:
        """Cut the connections over which others pass requests on, as the end of a process does."""
        self.loop.call_soon_threadsafe(self._ports._private._connections.abort)

    def end(self) -> None:
        self._stop.set()
        self._thread.join(30)


@contextmanager
def replicas(settings: ServingSettings, folder: Path, count: int = 2) -> Iterator[list[Replica]]:
    """Replicas that share a port, as those of one node do."""
    with ExitStack() as ending:
        started = []
        for number in range(count):
            started.append(Replica(settings, folder, f"replica{number}"))
            ending.callback(started[-1].end)
        yield started
