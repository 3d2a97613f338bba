"""What tests of ``clsnf watch`` share: results, waiting, a broker, and the command as a process."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from clsnf.watching.output import OutputContext
from clsnf.watching.result import Judgement, Result, now
from tests.support.small_server import free_port

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
needs_mosquitto = pytest.mark.skipif(
    MOSQUITTO is None, reason="there is no MQTT broker here: apt-get install mosquitto"
)


def made_result(
    number: int = 1, verdict: str = "ok", source: str = "a.png", **more: object
) -> Result:
    """A result as a judge makes it."""
    content: dict[str, Any] = {
        "id": f"0123abcd-{number:09d}",
        "at": now(),
        "source": source,
        "frame": None,
        "verdict": verdict,
        "score": 0.25,
        "threshold": 0.5,
        "p_value": 0.75,
        "category": "plate",
        "model_version": "0123456789ab",
        "milliseconds": 12.5,
    }
    return Result(**(content | more))


def made_context(lines: list[str] | None = None, **more: Any) -> OutputContext:
    """What outputs know of a watch; what they say is added to `lines`."""
    said = [] if lines is None else lines
    return OutputContext("0123abcd", said.append, **more)


def judgement(number: int = 1, verdict: str = "ok", **more: Any) -> Judgement:
    """A judgement without a picture."""
    return Judgement(made_result(number, verdict, **more))


def wait_until(holds: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until something holds; fails when it takes far too long."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it never held"
        time.sleep(0.02)


class Broker:
    """Debian's mosquitto on a port of loopback; it can be stopped and started again."""

    def __init__(self, folder: Path, user: str = "", password: str = "") -> None:
        self.port = free_port()
        lines = [
            f"listener {self.port} 127.0.0.1",
            "persistence true",
            f"persistence_location {folder}/",
        ]
        if user:
            passwords = folder / "passwords"
            passwords.touch(0o600)
            tool = shutil.which("mosquitto_passwd") or "mosquitto_passwd"
            subprocess.run([tool, "-b", passwords, user, password], check=True, capture_output=True)
            lines += ["allow_anonymous false", f"password_file {passwords}"]
        else:
            lines += ["allow_anonymous true"]
        if os.getuid() == 0:
            lines += ["user root"]
        self._file = folder / "mosquitto.conf"
        self._file.write_text("\n".join(lines) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it listens."""
        assert MOSQUITTO is not None
        self._process = subprocess.Popen(
            [MOSQUITTO, "-c", self._file], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(self._listens)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        """Stop it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None


@contextmanager
def broker(folder: Path, user: str = "", password: str = "") -> Iterator[Broker]:
    """A broker that runs while the block does."""
    made = Broker(folder, user, password)
    made.start()
    try:
        yield made
    finally:
        made.stop()


class Subscriber:
    """Hears all messages of a broker below a topic, also after the broker was started again."""

    def __init__(self, port: int, topic: str) -> None:
        import paho.mqtt.client as mqtt

        self.messages: list[tuple[str, bytes]] = []
        self.subscribed = threading.Event()
        # The broker keeps what comes while this client is away.
        self._client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, f"subscriber of {topic}", clean_session=False
        )
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = lambda client, *_: client.subscribe(f"{topic}/#", 1)
        self._client.on_subscribe = lambda *_: self.subscribed.set()
        self._client.on_message = lambda client, data, message: self.messages.append(
            (message.topic, bytes(message.payload))
        )
        self._client.connect_async("127.0.0.1", port)
        self._client.loop_start()

    def on(self, topic: str) -> list[bytes]:
        """What came on a topic."""
        return [payload for name, payload in list(self.messages) if name == topic]

    def close(self) -> None:
        """Hear no more."""
        self._client.disconnect()
        self._client.loop_stop()


class WatchProcess:
    """``clsnf watch`` as a process of its own."""

    def __init__(self, *arguments: object, folder: Path, env: dict[str, str] | None = None) -> None:
        self._err = (folder / "stderr.txt").open("ab")
        self.errors = folder / "stderr.txt"
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from clsnf.cli import main; main()", "watch"]
            + [str(a) for a in arguments]
            + ["--device", "cpu"],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=self._err,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        )

    def said(self, text: str) -> bool:
        """Whether it has said this on standard error."""
        if self._process.poll() is not None and text not in self.errors.read_text():
            raise AssertionError(f"it ended: {self.errors.read_text()}")
        return text in self.errors.read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self._process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """The exit code."""
        code = self._process.wait(60)
        self._err.close()
        return code
