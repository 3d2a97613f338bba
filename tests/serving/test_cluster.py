"""The server on a head and two workers: it grows under load, is replaced, and loses a node."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from tests.support.ray_cluster import Cluster
from tests.support.served import Clients, quiet_environment, until
from tests.support.small_server import free_port

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the ports of several nodes on one machine"),
]

# So that the replicas that start have most of the machine.
PAUSE = 0.03


class Serving:
    """The project's config file on a cluster, whose nodes share the replicas' port."""

    def __init__(self, folder: Path, models: Path, cluster: Cluster) -> None:
        self._folder, self._models, self._cluster = folder, models, cluster
        self._port = free_port()

    def deploy(self, deployment: dict[str, Any], **more: Any) -> None:
        """Deploy the file, with options of the deployment; `more` are arguments of the app."""
        config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
        config["proxy_location"] = "Disabled"  # proxies of nodes on one machine share a port
        (application,) = config["applications"]
        own = {"models": str(self._models), "state": str(self._folder / "state"), "readers": 1}
        own |= {"port": self._port, "device": "cpu", "threads": 1, "target_requests": 0.1}
        application["args"] |= own | {"max_replicas": 2} | more
        deployment = {"user_config": {"models": str(self._models)}} | deployment
        application["deployments"][0] |= deployment
        (self._folder / "config.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", "--address"]
        command += [f"http://127.0.0.1:{self._cluster.dashboard}"]
        done = subprocess.run(
            [*command, str(self._folder / "config.yaml")],
            env=self._cluster.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/"

    def ready(self) -> bool:
        return requests.get(self.url() + "readyz", timeout=60).ok

    def replicas(self, number: int) -> set[int]:
        """The processes of a node's replicas."""
        found = set()
        for process in self._cluster.processes(number):
            try:
                if "ServeReplica:clsnf" in " ".join(process.cmdline()):
                    found.add(process.pid)
            except psutil.NoSuchProcess:
                pass
        return found

    def all_replicas(self) -> set[int]:
        return self.replicas(1) | self.replicas(2)

    def until(self, holds: Callable[[], Any]) -> Any:
        return until(holds, self._cluster.nodes[0], self._cluster.log(0))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("k")  # short: paths of sockets have an end
    made = Cluster(folder, sys.executable, quiet_environment(folder), 2, own_files=False)
    try:
        made.start()
        yield made
    finally:
        for number in range(len(made.nodes)):  # at once: nothing is kept that could be damaged
            made.remove(number)


@pytest.fixture(scope="module")
def serving(cluster: Cluster, winners: Path, tmp_path_factory: pytest.TempPathFactory) -> Serving:
    made = Serving(tmp_path_factory.mktemp("v"), winners, cluster)
    made.deploy({"max_replicas_per_node": 1})
    made.until(made.ready)
    return made


def test_a_server_grows_under_load_is_replaced_and_loses_a_node_without_losing_a_request(
    cluster: Cluster, serving: Serving
) -> None:
    (first,) = serving.all_replicas()
    with Clients(serving.url(), pause=PAUSE) as clients:
        serving.until(lambda: len(serving.all_replicas()) == 2)
        # Both answer on the one port that they share.
        serving.until(lambda: len(names(serving)) == 2)
        before = serving.all_replicas()
        assert first in before
        # Each node has two CPUs, and a replica already: one more starts on each.
        serving.deploy({}, min_replicas=2, queue=65)
        serving.until(lambda: not before & serving.all_replicas())
    assert clients.failed == []

    with Clients(serving.url(), retries=1, pause=PAUSE) as clients:
        assert len(serving.replicas(1)) == len(serving.replicas(2)) == 1
        serving.until(lambda: len(names(serving)) == 2)
        (raylet,) = [p for p in cluster.processes(2) if "raylet/raylet" in p.cmdline()[0]]
        raylet.kill()
        serving.until(lambda: not serving.replicas(2))
        answered = len(clients.versions)
        serving.until(lambda: len(clients.versions) > answered + 50)
    assert clients.failed == []


def names(serving: Serving) -> set[str]:
    """The replicas that answer on new connections."""
    texts = [requests.get(serving.url() + "metrics", timeout=60).text for _ in range(8)]
    return {text.partition('replica="')[2].partition('"')[0] for text in texts}
