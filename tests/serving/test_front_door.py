"""What a request's headers alone decide, tokens for asking, and what every answer carries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from clsnf.core.errors import SettingsError
from clsnf.serving.hosts import is_known_host, is_same_host, own_hosts
from clsnf.serving.ports import Ports
from clsnf.serving.service import InspectionService
from clsnf.serving.tokens import Tokens
from tests.support.small_server import TOKEN, encoded, http_server, picture, small_settings

ADMIN = "the administrators token 456"
BODY = encoded(picture(1))
INSPECT, INFER = "/v1/models/plate/inspect", "/v2/models/plate/infer"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@contextmanager
def served(winners: Path, folder: Path, **more: Any) -> Iterator[TestClient]:
    made = small_settings(winners, state=str(folder / "state"), **more)
    with TestClient(Ports(InspectionService(made)).app) as client:
        yield client


@pytest.fixture(scope="module")
def client(winners: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("door")
    (folder / "token").write_text(TOKEN)
    with served(winners, folder, token_file=str(folder / "token")) as client:
        yield client


# ---- hosts ----


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "a.localhost", "127.0.0.1:1", "[::1]:8000", "10.1.2.3", "::1"],
)
def test_addresses_and_own_names_are_known(client: TestClient, host: str) -> None:
    if host != "::1":  # without brackets it is no host of HTTP's
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200
    assert is_known_host(host, own_hosts()) is (host != "::1")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "@"]
)
def test_a_name_that_a_page_let_point_here_is_refused(client: TestClient, host: str) -> None:
    for answer in (
        client.get("/v1/models", headers={"Host": host}),
        client.get("/", headers={"Host": host}),
        client.post(INSPECT, content=BODY, headers={"Host": host}),
        client.post(INFER, content=b"{}", headers={"Host": host, "Origin": f"http://{host}"}),
    ):
        assert answer.status_code == 421
        assert "allowed_hosts" in answer.json()["error"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/v2/health/ready"])
def test_probes_may_come_under_any_name(client: TestClient, path: str) -> None:
    assert client.get(path, headers={"Host": "anything.example:9"}).status_code == 200


def test_names_that_are_allowed_may_have_a_star(winners: Path, tmp_path: Path) -> None:
    with served(winners, tmp_path, allowed_hosts="Mes.plant.local, *.line.local") as client:
        for host, status in {
            "mes.plant.local:80": 200,
            "a.b.line.local": 200,
            "line.local": 421,
            "plant.local": 421,
        }.items():
            assert client.get("/v1/models", headers={"Host": host}).status_code == status
    with served(winners, tmp_path, allowed_hosts="*") as client:
        assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 200


@pytest.mark.parametrize(
    "wrong",
    [
        {"allowed_hosts": "http://a.b"},
        {"allowed_hosts": "a:80"},
        {"allowed_origins": "mes.plant.local"},
        {"allowed_origins": "https://a/b"},
        {"allowed_origins": "*"},
    ],
)
def test_lists_that_make_no_sense_are_refused(winners: Path, wrong: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        small_settings(winners, **wrong)


# ---- pages of others ----


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://testserver:81", ""])
def test_pages_of_others_may_send_nothing(client: TestClient, origin: str) -> None:
    headers = {"Origin": origin} | bearer(TOKEN)
    for answer in (
        client.post(INSPECT, content=BODY, headers=headers),
        client.post(INFER, content=b"{}", headers=headers),
        client.post("/v2/repository/index", headers=headers),
        client.put("/v1/models/plate/threshold", json={"value": 0.5}, headers=headers),
        client.delete("/v1/models/plate/threshold", headers=headers),
    ):
        assert answer.status_code == 403
        assert "allowed_origins" in answer.json()["error"]
    assert client.get("/v1/models/plate").json()["threshold"]["source"] == "model"


def test_the_servers_own_pages_may(client: TestClient) -> None:
    for origin in ("http://testserver", "https://testserver", "http://testserver:80"):
        answer = client.post(INSPECT, content=BODY, headers={"Origin": origin})
        assert answer.status_code == 200
    assert is_same_host("http://Line:8000", "line:8000")
    assert not is_same_host("http://line:8000", "line")


def test_pages_that_are_named_may_and_can_read_the_answer(winners: Path, tmp_path: Path) -> None:
    origin = {"Origin": "https://mes.plant.local"}
    with served(winners, tmp_path, allowed_origins="https://mes.plant.local/") as client:
        asked = client.options(INSPECT, headers=origin | {"Access-Control-Request-Method": "POST"})
        assert asked.status_code == 200
        answer = client.post(INSPECT, content=BODY, headers=origin)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://mes.plant.local"
        other = client.post(INSPECT, content=BODY, headers={"Origin": "https://evil.example"})
        assert other.status_code == 403
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "application/xml"])
def test_json_is_read_from_bodies_that_say_so(client: TestClient, kind: str) -> None:
    headers = {"Content-Type": kind} | bearer(TOKEN)
    assert client.post(INFER, content=b"{}", headers=headers).status_code == 415
    answer = client.put("/v1/models/plate/threshold", content=b'{"value": 0.5}', headers=headers)
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded"])
def test_a_body_without_a_type_is_read_from_programs_alone(
    client: TestClient, kind: str | None
) -> None:
    headers = {"Content-Type": kind} if kind else {}
    assert client.post(INFER, content=b"{}", headers=headers).status_code != 415
    own = headers | {"Origin": "http://testserver"}
    assert client.post(INFER, content=b"{}", headers=own).status_code == 415
    assert client.post(INSPECT, content=BODY, headers=headers).status_code == 200  # curl's default


# ---- tokens ----


def test_without_a_token_nothing_can_be_asked_where_one_is_needed(
    winners: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLSNF_TOKEN", TOKEN)
    monkeypatch.setenv("CLSNF_ADMIN_TOKEN", ADMIN)
    with served(winners, tmp_path, ask_token=True) as client:
        asks = [
            ("GET", "/v1/models"),
            ("GET", "/v1/models/plate"),
            ("POST", INSPECT),
            ("GET", "/v2/models/plate"),
            ("GET", "/v2/models/plate/ready"),
            ("POST", INFER),
            ("POST", "/v2/repository/index"),
        ]
        for method, path in asks:
            for headers in ({}, bearer("wrong"), {"Authorization": f"Basic {TOKEN}"}):
                answer = client.request(method, path, headers=headers)
                assert answer.status_code == 401, path
                assert answer.headers["www-authenticate"] == "Bearer"
            for token in (TOKEN, ADMIN):
                assert client.request(method, path, headers=bearer(token)).status_code != 401
        for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz", "/metrics", "/v2"):
            assert client.get(path).status_code == 200

        threshold = "/v1/models/plate/threshold"
        refused = client.put(threshold, json={"value": 0.5}, headers=bearer(TOKEN))
        assert refused.status_code == 403
        assert "administrator" in refused.json()["error"]
        assert client.put(threshold, json={"value": 0.5}, headers=bearer("x")).status_code == 401
        assert client.put(threshold, json={"value": 0.5}, headers=bearer(ADMIN)).status_code == 200
        assert client.delete(threshold, headers=bearer(ADMIN)).status_code == 200


def test_a_server_that_needs_a_token_does_not_start_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CLSNF_TOKEN", raising=False)
    monkeypatch.delenv("CLSNF_TOKEN_FILE", raising=False)
    with pytest.raises(SettingsError, match="ask_token") as caught:
        Tokens.read(None, needed_to_ask=True)
    assert "\n" not in str(caught.value)


def test_the_token_comes_before_the_body(winners: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    made = small_settings(
        winners, state=str(tmp_path), token_file=str(tmp_path / "token"), ask_token=True
    )
    path = "/v1/models/plate/threshold"
    with http_server(made) as address:
        for method, place in (("PUT", path), ("POST", INSPECT), ("POST", INFER)):
            # Announced, but never sent: an answer can't have waited for it.
            announced = {"Content-Length": "2000000000", "Content-Type": "application/json"}
            assert status_of(address, method, place, announced) == 401
        large = {"Content-Length": "2000000000", "Content-Type": "application/json"}
        assert status_of(address, "PUT", path, large | bearer(TOKEN)) == 413


def status_of(address: str, method: str, path: str, headers: dict[str, str]) -> int:
    connection = HTTPConnection(address, timeout=20)
    connection.putrequest(method, path)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    assert json.loads(answer.read())["error"]
    connection.close()
    return answer.status


# ---- every answer ----


def test_head_answers_as_get_does_without_a_body(client: TestClient) -> None:
    paths = ["/", "/docs", "/page/page.js", "/openapi.json", "/healthz", "/metrics", "/v1/models"]
    for path in [*paths, "/v1/models/plate", "/v1/models/none", "/v2/models/plate"]:
        got, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (got.status_code, b"")
        assert head.headers["content-type"] == got.headers["content-type"]
        if path != "/metrics":
            assert head.headers["content-length"] == got.headers["content-length"]
    assert client.head(INSPECT).status_code == 405


def test_options_and_405_name_the_methods_of_a_path(client: TestClient) -> None:
    for path, methods in {
        INSPECT: "OPTIONS, POST",
        "/v1/models/plate/threshold": "DELETE, OPTIONS, PUT",
        "/": "GET, HEAD, OPTIONS",
        "/page/page.js": "GET, HEAD, OPTIONS",
        "/v2/models/plate": "GET, HEAD, OPTIONS",
    }.items():
        asked = client.options(path)
        assert (asked.status_code, asked.headers["allow"]) == (204, methods)
        if path != "/page/page.js":
            refused = client.patch(path)
            assert (refused.status_code, refused.headers["allow"]) == (405, methods)
    assert client.options("/none").status_code == 404


@pytest.mark.parametrize(
    "path", ["/none", "/page/none.js", "/docs-static/none", "/v1/none", "/v2/x"]
)
def test_what_is_not_there_is_said_in_json(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/json")
    assert answer.json()["error"]


def test_every_answer_keeps_browsers_from_guessing_and_framing(client: TestClient) -> None:
    for path in ("/", "/docs", "/page/page.js", "/v1/models", "/none", "/metrics"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
    for path in ("/", "/docs"):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "script-src 'self'" in policy
        assert "'unsafe-inline'" not in policy.partition("script-src")[2]
