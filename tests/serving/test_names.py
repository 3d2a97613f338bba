"""Categories have the names that people give them: all of the server takes any of them."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import requests
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from clsnf.cli import main
from clsnf.serving.metrics import ServerMetrics
from clsnf.serving.ray_metrics import RaySink
from tests.support.small_data import tiny_options, write_category
from tests.support.small_server import TOKEN, encoded, http_server, picture, small_settings
from tests.support.watching import wait_until

NAMES = [
    "Größe-π",
    "Schraube M4 (links)",
    "q\"uo'te\\back",
    "new\nline",
    "50% ?#&+;",
    "🔩",
    "<b>",
    unicodedata.normalize("NFD", "é"),
]


@pytest.fixture(scope="module")
def server(winners: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("names")
    (folder / "token").write_text(TOKEN)
    for name in NAMES:
        (folder / "winners").mkdir(exist_ok=True)
        shutil.copytree(winners / "plate", folder / "winners" / name)
    settings = small_settings(folder / "winners", token_file=str(folder / "token"))
    with http_server(settings, ServerMetrics("0", RaySink)) as address:
        yield f"http://{address}"


def test_a_category_of_such_a_name_trains_predicts_and_is_served(
    resnet18_weights: Path, tmp_path: Path
) -> None:
    name, pictures = "Größe-π 'x'", tmp_path / "data" / "Größe-π 'x'" / "train" / "good"
    write_category(tmp_path / "data" / name)
    tiny = tiny_options(resnet18_weights)
    for command in (
        ["train", "--data", tmp_path / "data", "--out", tmp_path / "winners" / name, *tiny],
        ["predict", tmp_path / "winners", pictures, "--out", tmp_path / "maps"],
    ):
        done = CliRunner().invoke(main, [str(part) for part in command])
        assert done.exit_code == 0, done.output
    assert list((tmp_path / "maps").iterdir())
    with http_server(small_settings(tmp_path / "winners")) as address:
        answer = requests.post(
            f"http://{address}/v1/models/{quote(name)}/inspect",
            data=(pictures / "000.png").read_bytes(),
            timeout=60,
        )
    assert answer.json()["category"] == name


def counted(server: str, metric: str) -> dict[str, float]:
    """Values by category."""
    families = text_string_to_metric_families(requests.get(f"{server}/metrics", timeout=60).text)
    found: dict[str, float] = {}
    for family in families:
        for sample in family.samples:
            if sample.name == metric:
                name = sample.labels["category"]
                found[name] = found.get(name, 0) + sample.value
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_route_takes_any_name(server: str, name: str) -> None:
    model, body = f"{server}/v1/models/{quote(name)}", encoded(picture())
    lines = requests.get(f"{server}/v1/models", timeout=60).json()["models"]
    assert name in [line["category"] for line in lines]
    assert requests.get(model, timeout=60).json()["category"] == name
    answer = requests.post(f"{model}/inspect", data=body, timeout=60)
    assert answer.json()["category"] == name
    overlay = requests.post(
        f"{model}/inspect", data=body, headers={"Accept": "image/png"}, timeout=60
    )
    assert overlay.content.startswith(b"\x89PNG")
    assert overlay.headers["Clsnf-Version"] == answer.json()["version"]
    changed = requests.put(
        f"{model}/threshold",
        json={"false_reject_rate": 0.3},
        headers={"Authorization": f"Bearer {TOKEN}"},
        timeout=60,
    )
    assert changed.json()["threshold"]["source"] == "rate"
    v2 = f"{server}/v2/models/{quote(name)}"
    assert requests.get(v2, timeout=60).json()["name"] == name
    assert requests.get(f"{v2}/ready", timeout=60).json() == {"name": name, "ready": True}
    images = {
        "name": "images",
        "datatype": "UINT8",
        "shape": [1, 16, 16, 3],
        "data": [128] * (16 * 16 * 3),
    }
    inferred = requests.post(f"{v2}/infer", json={"inputs": [images]}, timeout=60)
    assert inferred.json()["model_name"] == name
    assert counted(server, "clsnf_verdicts_total")[name] == 3
    # An answer is counted a moment after it was sent.
    wait_until(lambda: counted(server, "clsnf_requests_total").get(name) == 3)
    assert "clsnf_metric_errors_total{" not in requests.get(f"{server}/metrics", timeout=60).text


def test_a_name_that_does_not_exist_makes_no_series(server: str) -> None:
    for name in ("Gröse", "%ff", "%00", "a%0d%0aSet-Cookie:%20a"):
        path = name if "%" in name else quote(name)
        answer = requests.post(f"{server}/v1/models/{path}/inspect", data=b"x", timeout=60)
        assert answer.status_code == 404
        assert answer.json()["error"].startswith("There is no model")
    wait_until(lambda: "-" in counted(server, "clsnf_requests_total"))
    assert not any("Cookie" in name for name in counted(server, "clsnf_requests_total"))
