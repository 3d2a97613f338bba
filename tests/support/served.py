"""``clsnf serve`` as a process of its own, with Ray or without."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import requests
from urllib3.util import Retry

from tests.support.small_server import encoded, free_port, picture

BODY = encoded(picture(7))


def until(holds: Callable[[], Any], process: subprocess.Popen[bytes], log: Path) -> Any:
    """The first true result of `holds`; failed connections are tried again."""
    end = time.monotonic() + 180
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        with contextlib.suppress(requests.ConnectionError):
            found = holds()
            if found:
                return found
        time.sleep(0.2)


def quiet_environment(folder: Path) -> dict[str, str]:
    """The environment without what concerns Ray and this project, and with a HOME of its own."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "CLSNF_"))}
    (folder / "home").mkdir(exist_ok=True)
    return inherited | {
        "HOME": str(folder / "home"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    members: list[Any] = [process, *family]
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            member.kill()


class Served:
    """``clsnf serve`` on a port of this machine.

    Args:
        folder: of its log, state and HOME; short, because Ray's sockets lie below it.
        models: to serve.
        arguments: further ones of the command.
        environment: beside :func:`quiet_environment`.
    """

    def __init__(
        self, folder: Path, models: Path, *arguments: str, environment: dict[str, str] | None = None
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.port, self.log = free_port(), folder / "log"
        command = [sys.executable, "-c", "from clsnf.cli import main; main()", "serve"]
        command += [str(models), "--port", str(self.port), "--device", "cpu"]
        command += ["--set", "threads=1", "--set", f"state={folder / 'state'}", *arguments]
        own = quiet_environment(folder) | {"RAY_TMPDIR": str(folder)} | (environment or {})
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(command, env=own, cwd=folder, stdout=file, stderr=file)

    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def ready(self) -> bool:
        return requests.get(self.url() + "readyz", timeout=60).ok

    def until(self, holds: Callable[[], Any]) -> Any:
        return until(holds, self.process, self.log)

    def family(self, name: str = "") -> list[psutil.Process]:
        """It and the processes that it has started, with a part of their command line."""
        found = []
        own = psutil.Process(self.process.pid)
        for process in [own, *own.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return found


class Clients:
    """Two clients that ask while the block runs.

    Each request is retried `retries` times at most, and followed by a pause in seconds.
    """

    def __init__(self, url: str, retries: int = 0, pause: float = 0.0) -> None:
        self._pause = pause
        self._url, self._retries = url + "v1/models/plate/inspect", retries
        self.versions: list[str] = []
        self.failed: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(2)]

    def _ask(self) -> None:
        with requests.Session() as session:
            retry = Retry(
                total=self._retries,
                status_forcelist=[500, 502, 503],
                allowed_methods=None,
                raise_on_status=False,
            )
            session.mount("http://", requests.adapters.HTTPAdapter(max_retries=retry))
            while not self._stop.wait(self._pause):
                try:
                    answer = session.post(self._url, data=BODY, timeout=120)
                    if answer.ok:
                        self.versions.append(answer.json()["version"])
                    else:
                        self.failed.append(f"{answer.status_code} {answer.text[:200]}")
                except requests.RequestException as error:
                    self.failed.append(str(error))

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(150)
