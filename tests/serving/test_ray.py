"""The server on real Ray Serve, over real HTTP: deployed, rolled, killed, and as one command."""

from __future__ import annotations

import base64
import contextlib
import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import psutil
import pytest
import requests
import yaml

from clsnf.cli import main
from clsnf.detector import Detector
from tests.support.listeners import beyond_loopback, listeners
from tests.support.served import BODY, Clients, Served, end, quiet_environment, until
from tests.support.small_server import TOKEN, encoded, free_port

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux", reason="processes are found by what Linux calls them"
    ),
]


# ---- on a cluster ----


class Head:
    """A Ray head of one node with Serve's app on it; every port is chosen here."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.environment = quiet_environment(folder)
        self.port, self.dashboard, self.proxy, self.http = (str(free_port()) for _ in range(4))
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        port, dashboard = self.port, self.dashboard
        names = ["dashboard-agent-listen-port", "dashboard-agent-grpc-port"]
        names += ["runtime-env-agent-port", "metrics-export-port"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += f"--num-cpus 4 --port {port} --node-ip-address 127.0.0.1".split()
        command += ["--temp-dir", str(self.folder / "ray")]
        command += f"--dashboard-host 127.0.0.1 --dashboard-port {dashboard}".split()
        command += f"--ray-client-server-port {free_port()} --object-store-memory 100000000".split()
        command += ["--min-worker-port", "0", "--max-worker-port", "0"]
        command += [part for name in names for part in (f"--{name}", str(free_port()))]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=log, stderr=log
            )
        until(
            lambda: requests.get(f"http://127.0.0.1:{self.dashboard}/api/version", timeout=10).ok,
            self.process,
            self.log,
        )

    def serve(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "ray.serve.scripts", *arguments]
        done = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def deploy(self, **user_config: str | int) -> None:
        """The project's own config file, with what must differ here."""
        config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
        config["http_options"]["port"] = int(self.proxy)
        (application,) = config["applications"]
        application["args"] |= {
            "models": str(self.folder / "first"),
            "port": int(self.http),
            "device": "cpu",
            "threads": 1,
            "state": str(self.folder / "state"),
        }
        application["deployments"][0]["user_config"] = {
            "models": str(self.folder / "first")
        } | user_config
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config))
        self.serve(
            "deploy",
            "--address",
            f"http://127.0.0.1:{self.dashboard}",
            str(self.folder / "config.yaml"),
        )

    def url(self, path: str) -> str:
        """At the replicas' own port."""
        return f"http://127.0.0.1:{self.http}/{path}"

    def proxy_url(self, path: str) -> str:
        """At the port of Ray's proxy."""
        return f"http://127.0.0.1:{self.proxy}/{path}"

    def models(self) -> dict[str, Any]:
        answer = requests.get(self.url("v1/models"), timeout=60)
        return answer.json() if answer.ok else {}

    def version(self, category: str = "plate") -> str:
        models = self.models().get("models", [])
        return next((m["version"] for m in models if m["category"] == category), "")

    def replicas(self) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended
                if "ServeReplica:clsnf" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def until(self, holds: Callable[[], Any]) -> Any:
        return until(holds, self.process, self.log)


@pytest.fixture(scope="module")
def head(winners: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    made = Head(tmp_path_factory.mktemp("s"))  # short: paths of sockets have an end
    for name in ("first", "second"):
        shutil.copytree(winners, made.folder / name)
    better = Detector.load(made.folder / "second" / "plate", device="cpu")
    better.calibrate(false_reject_rate=0.4)
    better.save(made.folder / "second" / "plate")
    try:
        made.start()
        made.deploy()
        made.until(made.version)
        yield made
    finally:
        end(made.process)


def test_a_deployed_server_answers_as_the_detector_does(head: Head, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(BODY)
    expected = Detector.load(head.folder / "first" / "plate", device="cpu").predict(
        [tmp_path / "picture.png"]
    )
    for url in (head.url, head.proxy_url):
        answer = requests.post(
            url("v1/models/plate/inspect"),
            data=BODY,
            headers={"Content-Type": "image/png"},
            timeout=120,
        )
        assert answer.json()["score"] == pytest.approx(float(expected.scores[0]), abs=1e-6)
    assert requests.get(head.url("readyz"), timeout=60).json()["models"] == 2
    unknown = requests.post(head.url("v1/models/nothing/inspect"), data=BODY, timeout=60)
    assert (unknown.status_code, unknown.json()["categories"]) == (404, ["plate", "sheet"])
    assert "clsnf_requests_total" in requests.get(head.url("metrics"), timeout=60).text


@pytest.mark.parametrize("megapixels", [12, 50])
def test_large_answers_come_whole_by_the_port_and_by_the_proxy(head: Head, megapixels: int) -> None:
    side = int((megapixels * 1e6) ** 0.5)
    body = encoded(np.full((side, side, 3), 120, np.uint8))
    for url in (head.url, head.proxy_url):
        for query in ("overlay", "png", "npy"):
            answer = requests.post(
                url(f"v1/models/plate/inspect?map={query}"), data=body, timeout=120
            )
            assert answer.status_code == 200, answer.text[:300]
            assert answer.json()["map"]["format"] == query
        alone = requests.post(
            url("v1/models/plate/inspect"), data=body, headers={"Accept": "image/png"}, timeout=120
        )
        assert alone.content.startswith(b"\x89PNG")


def test_sixteen_pictures_of_one_request_get_all_outputs(head: Head) -> None:
    content = [
        {"name": "files", "datatype": "BYTES", "shape": [16]}
        | {"data": [base64.b64encode(BODY).decode()] * 16}
    ]
    for url in (head.url, head.proxy_url):
        for binary in (False, True):
            answer = requests.post(
                url("v2/models/plate/infer"),
                json={"inputs": content, "parameters": {"binary_data_output": binary}},
                timeout=120,
            )
            assert answer.status_code == 200, answer.text[:300]
            assert len(answer.content) > 16 * 64 * 64 * 4


def test_new_winners_roll_in_and_back_without_a_dropped_request_or_a_new_process(
    head: Head,
) -> None:
    first = head.version()
    before = [p.pid for p in head.replicas()]
    with Clients(head.url("")) as clients:
        head.until(lambda: len(clients.versions) > 5)
        head.deploy(models=str(head.folder / "second"))
        second = head.until(lambda: (v := head.version()) != first and v)
        head.until(lambda: clients.versions[-1] == second)
        head.deploy()
        head.until(lambda: clients.versions[-1] == first)
        better = Detector.load(head.folder / "first" / "sheet", device="cpu")
        better.calibrate(false_reject_rate=0.3)
        better.save(head.folder / "first" / "sheet")
        before_again = head.version("sheet")
        head.deploy(generation=1)
        head.until(lambda: head.version("sheet") not in ("", before_again))
    assert clients.failed == []
    assert set(clients.versions) == {first, second}
    assert [p.pid for p in head.replicas()] == before


def test_winners_that_cannot_be_used_are_refused_and_the_old_ones_serve_on(head: Head) -> None:
    before = head.version()
    with Clients(head.url("")) as clients:
        head.deploy(models=str(head.folder / "nowhere"))
        refused = head.until(lambda: head.models().get("refused"))
    assert "nowhere" in refused
    assert clients.failed == []
    assert head.version() == before
    head.deploy()
    head.until(lambda: head.models() and head.models()["refused"] is None)


def test_a_killed_replica_comes_back_and_no_client_needs_more_than_one_retry(head: Head) -> None:
    (killed,) = head.replicas()
    with Clients(head.proxy_url(""), retries=1) as clients:
        head.until(lambda: len(clients.versions) > 5)
        killed.kill()
        head.until(lambda: any(p.pid != killed.pid for p in head.replicas()))
        answered = len(clients.versions)
        head.until(lambda: len(clients.versions) > answered + 5)
    assert clients.failed == []


def test_serve_run_takes_the_projects_own_app(head: Head) -> None:
    options = ["--non-blocking", "--name", "second", "--route-prefix", "/second"]
    options += ["--address", f"127.0.0.1:{head.port}"]
    settings = [f"models={head.folder / 'second'}", "device=cpu", "threads=1", "batch_size=4"]
    head.serve("run", *options, "serve.app:app", *settings)
    head.until(lambda: requests.get(head.proxy_url("second/readyz"), timeout=60).ok)
    answer = requests.post(head.proxy_url("second/v1/models/sheet/inspect"), data=BODY, timeout=120)
    assert answer.json()["category"] == "sheet"


# ---- as one command ----


@pytest.mark.parametrize("way", [[], ["--local"]], ids=["ray", "local"])
def test_one_command_serves_over_https_rolls_on_sighup_and_ends_cleanly(
    way: list[str], winners: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("l")
    models = folder / "runs" / "NAME" / "winners"
    shutil.copytree(winners, models)
    certificate, key = write_certificate(folder)
    environment = quiet_environment(folder) | {
        "CLSNF_TOKEN": TOKEN,
        "CLSNF_TLS_CERT": str(certificate),
        "CLSNF_TLS_KEY": str(key),
        "RAY_TMPDIR": str(folder),
    }
    port, log = free_port(), folder / "log"
    (in_readme,) = [
        line.split()[1:]
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("clsnf serve ")
    ]
    command = [sys.executable, "-c", "from clsnf.cli import main; main()", *in_readme]
    command += ["--port", str(port), "--device", "cpu", *way]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--set", "threads=1"], env=environment, cwd=folder, stdout=file, stderr=file
        )
    url = f"https://127.0.0.1:{port}/v1/models/plate"

    def page() -> dict[str, Any]:
        answer = requests.get(url, verify=str(certificate), timeout=60)
        return answer.json() if answer.ok else {}

    try:
        first = until(page, process, log)["version"]
        asked = requests.post(f"{url}/inspect", data=BODY, verify=str(certificate), timeout=120)
        assert asked.json()["version"] == first
        if shutil.which("curl"):
            (line,) = [
                line
                for line in (ROOT / "README.md").read_text().splitlines()
                if line.startswith("curl ")
            ]
            line = line.replace("http://127.0.0.1:8000/v1/models/CATEGORY", url)
            (folder / "part.png").write_bytes(BODY)
            done = subprocess.run(
                [*shlex.split(line), "--silent", "--cacert", str(certificate)],
                cwd=folder,
                capture_output=True,
                timeout=120,
            )
            assert json.loads(done.stdout)["score"] == asked.json()["score"]
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        kept = requests.put(
            f"{url}/threshold",
            json={"false_reject_rate": 0.3},
            headers=bearer,
            verify=str(certificate),
            timeout=60,
        )
        assert kept.json()["threshold"]["source"] == "rate"
        detector = Detector.load(models / "plate", device="cpu")
        detector.calibrate(false_reject_rate=0.4)
        detector.save(models / "plate")
        process.send_signal(signal.SIGHUP)
        until(lambda: page().get("version", first) != first, process, log)
        until(lambda: "rolled in" in log.read_text(), process, log)
        assert page()["threshold"]["false_reject_rate"] == 0.3, (
            "a rate that was set outlives the roll"
        )
        family = psutil.Process(process.pid).children(recursive=True)
        assert way or len(listeners(family)) > 5
        assert beyond_loopback([psutil.Process(process.pid), *family]) == []
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0, log.read_text()
        assert psutil.wait_procs(family, timeout=20)[1] == []
    finally:
        end(process)


def test_two_servers_share_a_machine_a_replica_that_dies_keeps_its_port_and_a_lost_ray_is_said(
    winners: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("w")
    first, second = (Served(folder / name, winners) for name in "ab")
    try:
        for server in (first, second):
            server.until(server.ready)
        (replica,) = first.family("ServeReplica")
        with Clients(second.url()) as clients:
            second.until(lambda: len(clients.versions) > 5)
            replica.kill()
            # The port is there all the time: who asks now waits for the next replica.
            answer = requests.post(first.url() + "v1/models/plate/inspect", data=BODY, timeout=120)
            assert answer.ok
            (raylet,) = first.family("raylet/raylet")
            raylet.kill()
            assert first.process.wait(10) == 1
            assert "start it again" in first.log.read_text().splitlines()[-1]
            answered = len(clients.versions)
            second.until(lambda: len(clients.versions) > answered + 5)
        assert clients.failed == []
        second.process.send_signal(signal.SIGTERM)
        assert second.process.wait(90) == 0, second.log.read_text()
    finally:
        end(first.process)
        end(second.process)


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


def test_what_cannot_be_served_is_one_line_before_ray_starts(winners: Path, tmp_path: Path) -> None:
    def refused(*arguments: str, **environment: str) -> str:
        done = click.testing.CliRunner(env=environment).invoke(main, ["serve", *arguments])
        assert done.exit_code == 2, done.output
        return done.stderr.splitlines()[-1]

    assert "no folder of models" in refused(str(tmp_path / "none"))
    assert "no saved detectors" in refused(str(tmp_path))
    assert "batch_size" in refused(str(winners), "--set", "batch_sise=3")
    assert "raise memory_mb" in refused(str(winners), "--set", "memory_mb=1")
    assert "CLSNF_TLS_KEY" in refused(str(winners), CLSNF_TLS_CERT=str(tmp_path))
    (tmp_path / "file").write_text("")
    secure = {"CLSNF_TLS_CERT": str(tmp_path / "file"), "CLSNF_TLS_KEY": str(tmp_path / "file")}
    for way in ([], ["--local"]):
        assert "can't be used" in refused(str(winners), "--port", "0", *way, **secure)
    assert "not both" in refused(str(winners), "--local", "--address", "auto")
    assert "max_replicas" in refused(str(winners), "--local", "--set", "max_replicas=2")
    assert "--open" in refused(str(winners), "--host", "0.0.0.0")
    assert "16 or more" in refused(str(winners), CLSNF_TOKEN="short")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "--port" in refused(str(winners), "--port", str(taken.getsockname()[1]))
