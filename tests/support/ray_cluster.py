"""A Ray cluster on this machine: a head that computes nothing, workers, token authentication."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.support.running_study import ROOT

RAY = ["-c", "from ray.scripts.scripts import main; main()"]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Cluster:
    """Nodes in processes of their own.

    Every port is chosen here: nodes on one machine would otherwise use the same ones.

    Args:
        folder: of the nodes' files; short, because Ray's sockets lie below it.
        python: the nodes' interpreter.
        environment: of all processes; their HOME gets a token for Ray.
        worker_cpus: of each worker.
        own_files: give each node a TMPDIR of its own, as on a machine of its own. Replicas share a
            port through that folder.
    """

    def __init__(
        self,
        folder: Path,
        python: str,
        environment: dict[str, str],
        worker_cpus: int = 1,
        own_files: bool = True,
    ) -> None:
        self._folder, self._python, self._own_files = folder, python, own_files
        self._worker_cpus, self.port, self.dashboard = worker_cpus, _free_port(), _free_port()
        self.environment = environment | {
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.nodes: list[subprocess.Popen[bytes]] = []  # the head, and workers as they came

    def start(self) -> None:
        self.ray("get-auth-token", "--generate")
        self._start(
            *("--head", "--port", self.port, "--num-cpus", "0"),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", self.dashboard),
        )
        self._wait("head", lambda: self._listens(self.dashboard))
        # One after the other: two raylets that start at once on one machine may use the same ports.
        for _ in range(2):
            self.add_worker()

    def add_worker(self) -> int:
        """Start a worker, and wait until the cluster has it; its number."""
        number = len(self.nodes)
        self._start("--address", f"127.0.0.1:{self.port}", "--num-cpus", str(self._worker_cpus))
        self._wait(f"node {number}", lambda: "Ray runtime started" in self.log(number).read_text())
        return number

    def is_there(self, number: int) -> bool:
        """Whether a node was started and not removed."""
        return self.nodes[number].poll() is None

    def remove(self, number: int) -> None:
        """Kill all processes of a node, as a power cut does."""
        lost = self.processes(number)
        for process in lost:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(lost, timeout=20)
        self.nodes[number].wait(20)

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [self._python, *RAY, *arguments]
        return subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=300
        )

    def _start(self, *arguments: str) -> None:
        own_ports = (
            "dashboard-agent-listen-port",
            "dashboard-agent-grpc-port",
            "runtime-env-agent-port",
            "metrics-export-port",
        )
        command = [
            self._python,
            *RAY,
            "start",
            *arguments,
            "--block",
            "--node-ip-address",
            "127.0.0.1",
        ]
        # Nodes that share a folder would delete each other's copies of a job's working directory.
        command += ["--temp-dir", str(self._folder / f"ray{len(self.nodes)}")]
        command += [
            "--object-store-memory",
            "100000000",
            "--min-worker-port",
            "0",
            "--max-worker-port",
            "0",
        ]
        command += [part for name in own_ports for part in (f"--{name}", _free_port())]
        files = self._folder / f"tmp{len(self.nodes) if self._own_files else ''}"
        files.mkdir(exist_ok=True)
        environment = self.environment | {"TMPDIR": str(files)}
        with self.log(len(self.nodes)).open("ab") as log:
            self.nodes.append(
                subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )

    def log(self, number: int) -> Path:
        """What `ray start` of a node has said."""
        return self._folder / f"ray{number}.log"

    @staticmethod
    def _listens(port: str) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", int(port))) == 0

    def _wait(self, what: str, is_there: Any) -> None:
        until = time.monotonic() + 120
        while not is_there():
            assert time.monotonic() < until, f"{what} never came"
            time.sleep(0.5)

    def processes(self, number: int) -> list[psutil.Process]:
        """All processes of a node."""
        folder = re.compile(re.escape(str(self._folder / f"ray{number}")) + r"(?!\d)")
        own = [
            p
            for p in psutil.process_iter(["cmdline"])
            if folder.search(" ".join(p.info["cmdline"] or []))
        ]
        return list(
            {
                p.pid: p for parent in own for p in (parent, *parent.children(recursive=True))
            }.values()
        )

    def stop(self) -> None:
        family = [p for number in range(len(self.nodes)) for p in self.processes(number)]
        for node in reversed(self.nodes):
            node.send_signal(signal.SIGTERM)
        for node in self.nodes:
            try:
                node.wait(30)
            except subprocess.TimeoutExpired:
                node.kill()
        for process in psutil.wait_procs(family, timeout=20)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
