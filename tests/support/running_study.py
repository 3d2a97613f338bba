"""The real command on small data, for tests: in an interpreter without clsnf, with its own home."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.support.small_data import tiny_options

ROOT = Path(__file__).parents[2]
# With one of the learning rates the loss is not finite, and the trial fails; the first trial never
# gets it.
SPACE = """
fusion_weight: {type: float, low: 0.0, high: 1.0}
finetune_epochs: {type: choice, values: [0, 1]}
flow_depth: {type: choice, values: [0, 1]}
finetune.learning_rate: {type: choice, values: [5e-4, 1e30]}
"""


def without_clsnf(folder: Path) -> str:
    """An interpreter with all packages of this one except clsnf: the script promises to work
    without its installation.
    """
    venv.create(folder, with_pip=False)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # Python searches this folder, and does not read the .pth files in it; an editable installation
    # of clsnf needs those.
    (Path(packages) / "packages.pth").write_text(
        sysconfig.get_path("purelib") + "\n" + sysconfig.get_path("platlib") + "\n"
    )
    return str(folder / "bin" / "python")


def _accept_ctrl_c() -> None:
    """Undo what a shell does to background jobs: they, and all that they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Study:
    """A folder with data, a home for Ray's files, an interpreter, and the command on them."""

    def __init__(self, folder: Path, weights: Path) -> None:
        self.folder, self.data, self.out = folder, folder / "data", folder / "out"
        self.options = [
            *tiny_options(weights),
            "--set",
            "finetune.batch_size=3",
            "--space",
            str(folder / "space.yaml"),
        ]
        (folder / "space.yaml").write_text(SPACE)
        (folder / "home").mkdir()
        self.python = without_clsnf(folder / "python")

    def at(self, out: Path) -> Study:
        """The same with another study's folder."""
        other = copy.copy(self)
        other.out = out
        return other

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with another home, and with the interpreter as ``python``."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return inherited | {
            "HOME": str(self.folder / "home"),
            "PATH": os.pathsep.join((str(Path(self.python).parent), os.environ["PATH"])),
        }

    def start(
        self, *arguments: str, out: Path | str | None = None, **environment: str
    ) -> subprocess.Popen[str]:
        command = [
            self.python,
            str(ROOT / "tune" / "run_study.py"),
            "--data",
            str(self.data),
            "--out",
            str(out or self.out),
        ]
        return subprocess.Popen(
            [*command, *self.options, *arguments],
            env=self.environment | environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_accept_ctrl_c,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        process = self.start(*arguments)
        stdout, stderr = process.communicate(timeout=300)
        return process.returncode, stdout, stderr

    def summary(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.out / "summary.json").read_text())
        return content

    def trials(self) -> list[dict[str, Any]]:
        return self.read_trials(self.out)

    @staticmethod
    def read_trials(folder: Path) -> list[dict[str, Any]]:
        """The rows of ``trials.parquet`` in a folder."""
        rows: list[dict[str, Any]] = pq.read_table(folder / "trials.parquet").to_pylist()
        return rows


def wait_for_trial(process: subprocess.Popen[str], number: int) -> None:
    """Wait until this many trials of a running study have ended."""
    assert process.stderr is not None
    lines: list[str] = []
    while not any(line.startswith(f"{number} of ") and "trials ended: " in line for line in lines):
        lines.append(process.stderr.readline())
        assert lines[-1], "".join(lines)
