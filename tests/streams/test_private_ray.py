"""A private Ray is for its user alone, and starts wherever the home folder lies."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

_ENTER = """
import os
from clsnf.streams.private_ray import on_loopback
for _ in range(2):
    with on_loopback():
        print(len(os.environ.get("RAY_AUTH_TOKEN", "")), end=" ")
print("RAY_AUTH_TOKEN" in os.environ)
"""

_START = """
import logging, ray
from clsnf.streams.private_ray import on_loopback
for _ in range(2):
    with on_loopback():
        ray.init("local", include_dashboard=False, num_cpus=1, object_store_memory=80 * 2**20,
                 log_to_driver=False, logging_level=logging.ERROR)
        print(ray.get(ray.remote(lambda: 7).remote()))
        ray.shutdown()
"""


def run(code: str, home: Path) -> str:
    """What a process with this home folder prints."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment = inherited | {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("before", [None, "a token of Ray's own 0123456789abcdef"])
def test_the_file_of_the_token_is_for_its_user_alone(tmp_path: Path, before: str | None) -> None:
    file = tmp_path / ".ray" / "auth_token"
    if before is not None:
        file.parent.mkdir()
        file.write_text(before)
        file.chmod(0o644)
    assert run(_ENTER, tmp_path).split() == ["0", "0", "False"], "Ray reads the file"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text() == before if before else len(file.read_text()) == 64
    assert [path.name for path in file.parent.iterdir()] == ["auth_token"]


def test_without_a_home_folder_the_environment_has_the_token_for_a_while() -> None:
    assert run(_ENTER, Path("/proc")).split() == ["64", "64", "False"]


@pytest.mark.slow
def test_a_private_ray_starts_again_and_again_without_a_home_folder() -> None:
    assert run(_START, Path("/proc")).split() == ["7", "7"]
