"""MLflow: an experiment for each study, a run for each trial, winner, and the study itself.

Runs carry a tag that no other run has. It is looked up where a run may have been made before, so
that neither an answer that was lost on the way nor ``--resume`` makes a run twice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from clsnf.core.errors import ClsnfError, SettingsError
from clsnf.core.uris import bare_uri, hide_secrets
from clsnf.study.folder import StudyFolder
from clsnf.study.tracked_run import TrackedRun

if TYPE_CHECKING:
    from mlflow import MlflowClient

# For MLflow's client, unless the user has set them. By itself it waits two minutes for an answer
# and asks eight times, and sends usage statistics. Here a failed call is tried again by its caller.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}
_FILE_STORES = ("", "file")
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_SCHEMES = ("http", "https", *_DATABASES, "databricks")
_KEY = "clsnf.run"  # the tag
_MOST_IN_A_BATCH = {"metrics": 1000, "params": 100}  # of MLflow's REST API
_LONGEST_VALUE = 5000  # characters of a parameter or tag
_STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}


def check_mlflow(uri: str, study: str) -> None:
    """Refuse MLflow where it can't be used: asks it for the study's experiment.

    Args:
        uri: as given with ``--mlflow``.
        study: the study's name.

    Raises:
        SettingsError: what is wrong, without the URI's secrets.
    """
    if find_spec("mlflow") is None:
        raise SettingsError(
            "--mlflow needs the package mlflow, which is not installed: pip install "
            "'clsnf[mlflow]'."
        )
    place = bare_uri(uri)
    scheme = uri.partition(":")[0].partition("+")[0] if ":" in uri else ""
    if scheme in _FILE_STORES and not os.environ.get("MLFLOW_ALLOW_FILE_STORE"):
        raise SettingsError(
            f"--mlflow {place} is a folder, which MLflow 3 no longer writes: give a database such "
            "as sqlite:////absolute/mlflow.db, or a server's URL."
        )
    if scheme not in (*_SCHEMES, *_FILE_STORES):
        raise SettingsError(
            f"--mlflow {place} is no URI that MLflow knows: give http://HOST:PORT or "
            f"sqlite:////absolute/mlflow.db (valid: {', '.join(_SCHEMES)})."
        )
    try:
        if scheme in _DATABASES:
            _connect_to_database(uri)
        experiment = _client(uri).get_experiment_by_name(study)
    except Exception as error:  # of MLflow, of the database's driver, of requests
        line = hide_secrets((str(error).strip().splitlines() or [type(error).__name__])[0], uri)
        raise SettingsError(
            f"No MLflow answers at {place} ({line[:300].rstrip(' .')}): start it, mend --mlflow, "
            "or leave it out."
        ) from None  # the cause's text may hold the URI
    if experiment is not None and experiment.lifecycle_stage == "deleted":
        raise SettingsError(
            f"The MLflow experiment {study!r} at {place} was deleted: restore it there (mlflow "
            "experiments restore), or choose another --out, which names it."
        )


def _connect_to_database(uri: str) -> None:
    """Raise what its driver raises; MLflow itself would try again for two minutes."""
    from sqlalchemy import create_engine

    engine = create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _client(uri: str) -> MlflowClient:
    import logging

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # a new database makes dozens of lines
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


class MlflowTracker:
    """Sends runs to MLflow; see :class:`clsnf.study.trackers.Tracker`.

    Args:
        uri: of the server or database.
        experiment: its name.
        study: distinct for each study, for the tag.
        resumed: whether runs may be there already.
        folder: the study's.
    """

    batch = 1

    def __init__(
        self, uri: str, experiment: str, study: str, resumed: bool, folder: StudyFolder
    ) -> None:
        self.place = f"MLflow at {bare_uri(uri)}"
        self._uri, self._experiment, self._study = uri, experiment, study
        self._resumed, self._folder = resumed, folder
        self._tried: set[str] = set()  # keys
        self._client: MlflowClient | None = None
        self._experiment_id = ""

    def send(self, runs: Sequence[TrackedRun]) -> None:
        """Send runs: three calls for a trial, and one for each file."""
        try:
            for run in runs:
                self._send(run)
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            raise ClsnfError(hide_secrets(line, self._uri)) from None

    def _send(self, run: TrackedRun) -> None:
        client = self._connected()
        key = f"{self._study}/{run.key}"
        known = self._find(client, key) if self._resumed or key in self._tried else None
        self._tried.add(key)
        ended = run.ended_at or time.time()
        run_id = (
            known
            or client.create_run(
                self._experiment_id,
                start_time=int(1000 * (ended - run.seconds)),
                tags=_tags(run) | {_KEY: key},
                run_name=run.name,
            ).info.run_id
        )
        self._log(client, run_id, run, int(1000 * ended))
        for name in run.files:
            path = self._folder.fetch(name)
            if path.is_dir():
                client.log_artifacts(run_id, str(path), path.parent.name)
            elif path.exists():
                client.log_artifact(run_id, str(path))
        client.set_terminated(run_id, _STATUS[run.status], int(1000 * ended))

    def _connected(self) -> MlflowClient:
        """The client, once the experiment is known."""
        client = self._client or _client(self._uri)
        if not self._experiment_id:
            found = client.get_experiment_by_name(self._experiment)
            self._experiment_id = (
                client.create_experiment(self._experiment) if found is None else found.experiment_id
            )
        self._client = client
        return client

    def _find(self, client: MlflowClient, key: str) -> str | None:
        quoted = key.replace("'", "\\'")
        found = client.search_runs(
            [self._experiment_id], f"tags.`{_KEY}` = '{quoted}'", max_results=1
        )
        return found[0].info.run_id if found else None

    def _log(self, client: MlflowClient, run_id: str, run: TrackedRun, at: int) -> None:
        from mlflow.entities import Metric, Param

        metrics = [Metric(name, value, at, run.step) for name, value in run.metrics.items()]
        params = [Param(name, str(v)[:_LONGEST_VALUE]) for name, v in run.config.items()]
        most = _MOST_IN_A_BATCH
        while metrics or params:
            client.log_batch(run_id, metrics[: most["metrics"]], params[: most["params"]])
            metrics, params = metrics[most["metrics"] :], params[most["params"] :]


def _tags(run: TrackedRun) -> dict[str, Any]:
    tags = {"clsnf.kind": run.kind, "category": run.category, "status": run.status}
    cause = {} if run.cause is None else {"cause": run.cause[:_LONGEST_VALUE]}
    return {name: value for name, value in tags.items() if value} | cause
