"""serve/Dockerfile without Docker: its commands in their order, in a fresh folder, as its user."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import requests

from tests.support.served import BODY, end, until
from tests.support.small_server import TOKEN, free_port

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the image is Linux'"),
]


def instructions() -> list[tuple[str, str]]:
    """Name and rest of each instruction of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", (ROOT / "serve" / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


class Image:
    """What the Dockerfile makes, below a folder that stands for the root of the file system."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root
        self.environment = {"PATH": f"{root / 'python' / 'bin'}:/usr/bin:/bin"}
        self.user, self.health = "", ""
        self.entrypoint: list[str] = []
        base = root / "python"  # with all packages of this interpreter, but without clsnf
        venv.create(base, with_pip=False, symlinks=True)
        packages = sysconfig.get_path("purelib", vars={"base": str(base), "platbase": str(base)})
        (Path(packages) / "packages.pth").write_text(
            "\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) + "\n"
        )
        pip = base / "bin" / "pip"
        pip.write_text(f'#!/bin/sh\nexec "{base}/bin/python" -m pip "$@"\n')
        pip.chmod(0o755)
        for name, rest in instructions():
            getattr(self, f"_{name.lower()}")(rest)

    def below(self, text: str) -> str:
        """A command whose absolute paths lie below the root."""
        return re.sub(r"(?<=[ =])/(?=\w)", f"{self.root}/", text)

    def _from(self, rest: str) -> None:
        assert rest.startswith("python:3.11")

    def _workdir(self, rest: str) -> None:
        self.folder = self.root / rest.lstrip("/")
        self.folder.mkdir(parents=True)

    def _copy(self, rest: str) -> None:
        *sources, target = rest.split()
        for source in sources:
            found, copy = ROOT / source, self.folder / target
            if found.is_dir():
                shutil.copytree(found, copy, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(found, copy)

    def _run(self, rest: str) -> None:
        here = {"HOME": str(self.root)}
        if int(version("setuptools").split(".")[0]) >= 77:  # what pyproject.toml builds with
            # All packages are here already, and pip finds them.
            here |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
        done = subprocess.run(
            ["/bin/sh", "-c", self.below(f" {rest}")],
            cwd=self.folder,
            env=self.environment | here,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def _user(self, rest: str) -> None:
        self.user = rest

    def _env(self, rest: str) -> None:
        self.environment |= dict(part.split("=") for part in self.below(f" {rest}").split())

    def _expose(self, rest: str) -> None:
        assert rest == "8000"

    def _healthcheck(self, rest: str) -> None:
        self.health = rest.partition("CMD ")[2]

    def _entrypoint(self, rest: str) -> None:
        self.entrypoint = [self.below(f" {part}").strip() for part in json.loads(rest)]

    def as_user(self, command: list[str]) -> list[str]:
        """The command as the image's user, where this process may become another one."""
        if os.getuid() != 0:
            return command
        user, group = self.user.split(":")
        become = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
        # This interpreter may lie in a home that is closed to others: reading is allowed.
        become += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        return [*become, *command]


@pytest.fixture
def root() -> Iterator[Path]:
    # Not pytest's own folder, which is closed to other users.
    with tempfile.TemporaryDirectory(prefix="image") as name:
        Path(name).chmod(0o755)
        (Path(name) / "tmp").mkdir(mode=0o777)
        (Path(name) / "tmp").chmod(0o1777)
        yield Path(name)


def test_the_image_serves_a_read_only_folder_as_another_user(winners: Path, root: Path) -> None:
    image = Image(root)
    shutil.copytree(winners, root / "models" / "winners")
    port, log = str(free_port()), root / "log"
    environment = image.environment | {"CLSNF_TOKEN": TOKEN}
    with log.open("wb") as file:
        process = subprocess.Popen(
            image.as_user([*image.entrypoint, "--port", port]),
            env=environment,
            cwd=image.folder,
            stdout=file,
            stderr=file,
        )
    try:
        url = f"http://127.0.0.1:{port}/"
        until(lambda: requests.get(f"{url}readyz", timeout=60).ok, process, log)
        health = shlex.split(image.health.replace("8000", port))
        subprocess.run(image.as_user(health), env=environment, check=True, timeout=60)
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        plate = f"{url}v1/models/plate"
        asked = requests.post(f"{plate}/inspect", data=BODY, headers=bearer, timeout=120)
        assert asked.json()["category"] == "plate"
        kept = requests.put(
            f"{plate}/threshold", json={"false_reject_rate": 0.3}, headers=bearer, timeout=60
        )
        assert kept.json()["threshold"]["source"] == "rate"
        written = root / "state" / "thresholds.json"
        if os.getuid() == 0:
            assert f"{written.stat().st_uid}" == image.user.split(":")[0]
        where = ["python", "-c", "import clsnf; print(clsnf.__file__)"]
        found = subprocess.run(
            image.as_user(where), env=environment, cwd=root, capture_output=True, text=True
        )
        assert found.stdout.startswith(str(root / "python")), found.stdout + found.stderr
        process.terminate()
        assert process.wait(60) == 0, log.read_text()
    finally:
        end(process)
