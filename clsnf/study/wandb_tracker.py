"""Weights & Biases: a run for each trial, winner, and the study itself, grouped by study.

Runs are written to ``wandb/`` in the study's folder first, as W&B's offline mode does, and ``wandb
sync`` sends them in a process of its own. Its client would wait for a dead server for minutes, at
the end of the study's process too; that process is ended when it takes too long, and nothing is
lost.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clsnf.core.errors import ClsnfError, SettingsError
from clsnf.core.hashing import content_key
from clsnf.study.folder import StudyFolder
from clsnf.study.tracked_run import TrackedRun

_TIMEOUT = 60.0  # seconds for one upload
_UPLOAD_EVERY = 20.0  # seconds; starting the client takes some of a core's
_FOLDER = "wandb"


def _mode() -> str:
    return os.environ.get("WANDB_MODE", "online")


def check_wandb(project: str) -> None:
    """Refuse W&B where it can't be used: no package, no key, no server.

    Args:
        project: PROJECT or ENTITY/PROJECT.

    Raises:
        SettingsError: what is wrong.
    """
    if find_spec("wandb") is None:
        raise SettingsError(
            "--wandb needs the package wandb, which is not installed: pip install 'clsnf[wandb]'."
        )
    if not re.fullmatch(r"([^/\\#?%:\s]+/)?[^/\\#?%:\s]{1,128}", project):
        raise SettingsError(f"--wandb {project!r} is no project: give PROJECT or ENTITY/PROJECT.")
    if _mode() != "online":
        return
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    try:
        # Without "prompt" it would ask for a key on a terminal.
        known = wandb.login(prompt=False, verify=True)
    except Exception as error:  # a wrong key, or no server
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SettingsError(
            f"Weights & Biases can't be used ({line[:300].rstrip(' .')}): mend the key (wandb "
            "login --relogin), set WANDB_MODE=offline, or leave --wandb out."
        ) from None
    if not known:
        raise SettingsError(
            "--wandb has no key: say wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline to "
            "send the runs later."
        )


class WandbTracker:
    """Writes runs, and sends them; see :class:`clsnf.study.trackers.Tracker`.

    Args:
        project: PROJECT or ENTITY/PROJECT.
        group: the study's name.
        study: distinct for each study, for the runs' ids.
        folder: the study's.
    """

    batch = 100

    def __init__(self, project: str, group: str, study: str, folder: StudyFolder) -> None:
        self.place = f"Weights & Biases ({project})"
        entity, _, self._project = project.rpartition("/")
        self._entity = entity or None
        self._group, self._study, self._folder = group, study, folder
        self._next_upload = 0.0
        self._written: dict[str, Path] = {}  # key -> the run's folder

    def send(self, runs: Sequence[TrackedRun]) -> None:
        """Write the runs that are not written yet, and upload all."""
        if _mode() == "disabled":
            return
        for run in runs:
            if run.key not in self._written:
                self._written[run.key] = self._write(run)
        if _mode() == "online":
            self._upload([self._written[run.key] for run in runs])
        for run in runs:
            written = self._written.pop(run.key)
            if _mode() == "online":
                shutil.rmtree(written, ignore_errors=True)

    def _write(self, run: TrackedRun) -> Path:
        import wandb

        # The client and its uploader share this folder of files that wait.
        os.environ.setdefault("WANDB_DATA_DIR", str(self._folder.path / _FOLDER))
        (self._folder.path / _FOLDER).mkdir(parents=True, exist_ok=True)
        made = wandb.init(
            project=self._project,
            entity=self._entity,
            group=self._group,
            job_type=run.kind,
            name=run.name,
            id=content_key([self._study, run.key])[:16],
            dir=str(self._folder.path),
            config=run.config,
            tags=[tag for tag in (run.category[:64], run.status) if tag],
            notes=run.cause,
            mode="offline",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        folder = Path(made.dir).parent
        made.log({**run.metrics, "trial": run.step})
        made.summary.update({"status": run.status, "cause": run.cause})
        if run.files:
            made.log_artifact(self._artifact(wandb, run))
        made.finish(exit_code=1 if run.status == "failed" else 0)
        return folder

    def _artifact(self, wandb: Any, run: TrackedRun) -> Any:
        name = re.sub(r"[^\w.-]", "-", f"{self._group}-{run.name}")
        artifact = wandb.Artifact(name, type="model" if run.kind == "winner" else "study")
        for entry in run.files:
            path = self._folder.fetch(entry)
            if path.is_dir():
                artifact.add_dir(str(path), path.parent.name)
            elif path.exists():
                artifact.add_file(str(path))
        return artifact

    def _upload(self, folders: Sequence[Path]) -> None:
        time.sleep(max(0.0, self._next_upload - time.monotonic()))
        self._next_upload = time.monotonic() + _UPLOAD_EVERY
        process = subprocess.Popen(
            [sys.executable, "-m", "wandb", "sync", *map(str, folders)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self._folder.path,  # it leaves logs in wandb/ of where it runs
            start_new_session=True,  # a Ctrl-C is for the study, which then waits for the upload
        )
        atexit.register(_end, process)
        try:
            output, _ = process.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise ClsnfError(f"no upload within {_TIMEOUT:.0f} s") from None
        finally:
            _end(process)
            atexit.unregister(_end)
        if process.returncode:
            lines = [line for line in output.splitlines() if line.strip()]
            raise ClsnfError(lines[-1][:300] if lines else f"exit code {process.returncode}")


def _end(process: subprocess.Popen[str]) -> None:
    """End an upload with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
