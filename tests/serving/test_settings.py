"""Settings, the token, refusals, and the files that name settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from clsnf.core.errors import SettingsError
from clsnf.serving import errors
from clsnf.serving.openapi import REASONS
from clsnf.serving.settings import ServingSettings
from clsnf.serving.tokens import read_token
from tests.support.small_server import small_settings


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"batch_sise": 3}, "batch_size"),
        ({"queue": 1}, "images_per_request"),
        ({"max_replicas": 0}, "min_replicas"),
        ({"precision": "half"}, "float32"),
        ({"deadline_s": "x"}, "float"),
        ({"models": "/none"}, "no folder of models"),
        ({"models": ""}, "no models"),
        ({"bodies_mb": 127}, "twice max_megabytes"),
        ({"read_s": 0}, "above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(
    winners: Path, wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        ServingSettings.from_args({"models": str(winners)} | wrong)
    assert "\n" not in str(caught.value)


def test_settings_may_come_as_texts_of_the_command_line(winners: Path) -> None:
    made = small_settings(winners, batch_size="8", preload="true", deadline_s="2.5", device="cpu")
    assert (made.batch_size, made.preload, made.deadline_s) == (8, True, 2.5)
    assert made.state == str(winners.parent / "serving")


def test_the_token_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLSNF_TOKEN_FILE", raising=False)
    monkeypatch.setenv("CLSNF_TOKEN", "from the environment")
    assert read_token(None) == "from the environment"
    (tmp_path / "token").write_text("from a file of some length\n")
    assert read_token(str(tmp_path / "token")) == "from a file of some length"
    (tmp_path / "token").write_text("short")
    with pytest.raises(SettingsError, match="16"):
        read_token(str(tmp_path / "token"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SettingsError, match="0 characters"):
        read_token(str(tmp_path / "empty"))
    with pytest.raises(SettingsError, match="can't be read"):
        read_token(str(tmp_path / "none"))


def test_all_refusals_have_a_status_of_the_request_or_of_the_moment() -> None:
    kinds = {
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.RequestError)
    }
    statuses = {400, 401, 403, 404, 406, 408, 413, 415, 422, 429, 503, 504}
    assert {kind.status for kind in kinds} == set(REASONS) == statuses


def test_the_documentation_lists_every_setting_as_it_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    for field in dataclasses.fields(ServingSettings):
        assert f"| `{field.name}` |" in page
        assert field.metadata["help"] in page


@pytest.mark.parametrize("name", ["config.yaml", "rayservice.yaml"])
def test_the_files_for_deployments_name_settings_that_exist(name: str, winners: Path) -> None:
    content = next(yaml.safe_load_all((Path(__file__).parents[2] / "serve" / name).read_text()))
    config = yaml.safe_load(content["spec"]["serveConfigV2"]) if "spec" in content else content
    (application,) = config["applications"]
    assert application["import_path"] == "clsnf.serving.deployment:app"
    ServingSettings.from_args(application["args"] | {"models": str(winners)})
    (deployment,) = application["deployments"]
    assert set(deployment["user_config"]) == {"models"}
